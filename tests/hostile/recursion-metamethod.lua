-- tries: a metamethod that calls itself
-- expect: stack overflow
local t = setmetatable({}, {})
getmetatable(t).__add = function(a, b) return a + b end
getmetatable(t).__index = function(s, k) return s[k] end
return t + t
