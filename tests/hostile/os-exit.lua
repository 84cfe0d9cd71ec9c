-- tries: the end of the process
-- expect: global 'os'
os.exit(0)
