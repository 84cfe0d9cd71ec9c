-- tries: to take a protected metatable away
-- expect: protected metatable
setmetatable(setmetatable({}, {__metatable = 1}), {})
