-- tries: to give strings another metatable
-- expect: table expected
setmetatable("", {})
