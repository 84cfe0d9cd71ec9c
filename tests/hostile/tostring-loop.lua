-- tries: __tostring without end
-- expect: stopped: it took
print(setmetatable({}, {__tostring = function() while true do end end}))
