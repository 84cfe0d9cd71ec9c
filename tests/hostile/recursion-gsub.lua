-- tries: recursion through gsub's callback
-- expect: stack overflow
local function f(s) return (string.gsub(s, ".", f)) end
f("x")
