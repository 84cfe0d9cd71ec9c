-- tries: to load code
-- expect: global 'load'
load("return 1")()
