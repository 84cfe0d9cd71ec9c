-- tries: a name of 1 MB
-- expect: name: expected a text
return {name = ('x'):rep(1e6)}
