-- tries: a finalizer put in after setmetatable looked
-- expect: ok
local mt = {}
for i = 1, 1e5 do setmetatable({}, mt) end
mt.__gc = function() while true do end end
for i = 1, 1e5 do setmetatable({}, {__index = mt}) end
return {}
