-- tries: __newindex in a circle
-- expect: '__newindex' chain too long
local t = {}
setmetatable(t, {__newindex = t})
t.x = 1
