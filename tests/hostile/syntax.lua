-- tries: text that is no Lua
-- expect: near 'is'
this is no Lua
