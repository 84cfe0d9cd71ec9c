-- tries: a length that is made up, in remove
-- expect: stopped: it took
table.remove(setmetatable({}, {__len = function() return 1 << 40 end}), 1)
