-- tries: a string as long as a number can say
-- expect: resulting string too large
local s = string.rep("xx", math.maxinteger)
