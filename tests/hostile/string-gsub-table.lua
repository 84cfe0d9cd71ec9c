-- tries: gsub through a table that makes up values
-- expect: stopped: it took
local t = setmetatable({}, {__index = function(t) return ("x"):rep(1e6) end})
while true do string.gsub("abc", ".", t) end
