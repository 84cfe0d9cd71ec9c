-- tries: tail calls without end
-- expect: stopped: it took
local function f() return f() end
f()
