-- tries: __eq without end
-- expect: stopped: it took
local mt = {__eq = function() while true do end end}
return setmetatable({}, mt) == setmetatable({}, mt)
