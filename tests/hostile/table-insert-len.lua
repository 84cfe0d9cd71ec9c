-- tries: a length that is made up, in insert
-- expect: stopped: it took
table.insert(setmetatable({}, {__len = function() return 1 << 40 end}), 1, 1)
