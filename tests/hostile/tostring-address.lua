-- tries: addresses in text
-- expect: ok
assert(tostring({}) == "table" and tostring(print) == "function")
assert(string.format("%s %s", {}, print) == "table function")
assert(tostring(setmetatable({}, {__name = "x"})) == "table")
return {}
