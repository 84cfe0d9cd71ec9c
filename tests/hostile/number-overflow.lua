-- tries: numbers at their ends
-- expect: ok
assert(math.mininteger // -1 == math.mininteger and math.mininteger % -1 == 0)
assert(math.tointeger(2^63) == nil)
return {}
