-- tries: a comparison that empties the table
-- expect: ok
local t = {}
for i = 1, 1000 do t[i] = i end
table.sort(t, function(a, b) t[a] = nil return a > b end)
return {}
