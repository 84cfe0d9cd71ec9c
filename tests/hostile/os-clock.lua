-- tries: the time, which is not the same on every machine
-- expect: global 'os'
return {name = tostring(os.clock())}
