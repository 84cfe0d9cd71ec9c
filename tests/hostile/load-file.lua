-- tries: another file
-- expect: global 'loadfile'
loadfile("/etc/passwd")()
