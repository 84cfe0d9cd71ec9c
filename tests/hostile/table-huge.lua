-- tries: a table without end
-- expect: not enough memory
local t = {}
for i = 1, math.huge do t[i] = i end
