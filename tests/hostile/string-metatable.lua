-- tries: the metatable that all strings share
-- expect: attempt to index a boolean value
getmetatable("").__index = function() return os end
