-- tries: to take the counting hook away
-- expect: global 'debug'
debug.sethook()
