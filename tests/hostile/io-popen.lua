-- tries: a command's output
-- expect: global 'io'
io.popen("id"):read("a")
