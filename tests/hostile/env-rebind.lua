-- tries: globals through another _ENV
-- expect: global 'os'
local _ENV = setmetatable({}, {__index = _G, __newindex = _G})
os.exit(0)
