-- tries: division and modulo by zero
-- expect: attempt to
local n = 0
return 1 // n
