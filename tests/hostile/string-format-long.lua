-- tries: a number that is as long as a buffer
-- expect: ok
assert(#string.format("%.99f", 1e308) > 300)
return {}
