-- tries: a length that is made up, in sort
-- expect: too many entries
table.sort(setmetatable({}, {__len = function() return 1e15 // 1 | 0 end}))
