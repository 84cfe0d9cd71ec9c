-- tries: a table that grows while it is walked
-- expect: ok
local t = {1}
for k in pairs(t) do t[#t + 1] = 1 end
return {}
