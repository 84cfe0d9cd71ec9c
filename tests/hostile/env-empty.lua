-- tries: to run without globals
-- expect: global 'pairs'
_ENV = {}
pairs({})
