-- tries: __concat without end
-- expect: stopped: it took
return setmetatable({}, {__concat = function() while true do end end}) .. 'x'
