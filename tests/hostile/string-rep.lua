-- tries: a string of 1 GB
-- expect: not enough memory
local s = string.rep("x", 1e9)
