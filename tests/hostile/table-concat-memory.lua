-- tries: one text of many
-- expect: not enough memory
local t, s = {}, ("x"):rep(1e5)
for i = 1, 1e4 do t[i] = s end
table.concat(t)
