-- tries: a module, its failure caught
-- expect: ok
local ok, io = pcall(function() return require("io") end)
if ok then io.open("escaped", "w"):write("x") end
return {}
