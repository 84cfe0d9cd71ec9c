-- tries: tables in tables without end
-- expect: not enough memory
local t = {}
while true do t = {t, t} end
