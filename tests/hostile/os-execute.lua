-- tries: a command
-- expect: global 'os'
os.execute("touch escaped")
