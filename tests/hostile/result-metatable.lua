-- tries: functions that a metatable makes up
-- expect: ok
return setmetatable({}, {__index = function() return function() end end})
