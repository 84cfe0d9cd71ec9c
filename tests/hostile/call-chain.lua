-- tries: functions behind 300 metatables
-- expect: place: it returned nothing or C stack overflow
local f = function() end
for _ = 1, 300 do
    f = setmetatable({}, {__call = f})
end
return {place = function() return f() end}
