-- tries: a finalizer by rawset
-- expect: ok
local mt = setmetatable({}, {__index = function() return function() while true do end end end})
for i = 1, 1e5 do setmetatable({}, mt) end
return {}
