-- tries: another file, at once
-- expect: global 'dofile'
dofile("/etc/passwd")
