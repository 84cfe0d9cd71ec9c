-- tries: recursion through pcall
-- expect: ok
local function f() return pcall(f) end
f()
return {}
