-- tries: to write a file
-- expect: global 'io'
io.open("escaped", "w"):write("x")
