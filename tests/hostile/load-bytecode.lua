-- tries: bytecode that the loader would not check
-- expect: global 'load'
load("\27Lua\x54\0\x19\x93\r\n\x1a\n", "x", "b")()
