-- tries: Lua 5.1's loader
-- expect: global 'loadstring'
loadstring("return 1")()
