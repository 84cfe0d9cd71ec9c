-- tries: __pairs without end
-- expect: ok
local t = setmetatable({1}, {__pairs = function() return function() return 1 end end})
for k in pairs(t) do end
return {}
