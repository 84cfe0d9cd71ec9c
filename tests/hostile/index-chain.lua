-- tries: __index in a circle
-- expect: '__index' chain too long
local t = {}
setmetatable(t, {__index = t})
return t.x
