-- tries: a finalizer that does not return, where hooks are off
-- expect: has no __gc
setmetatable({}, {__gc = function() while true do end end})
for i = 1, 1e7 do local t = {} end
