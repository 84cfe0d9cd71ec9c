-- tries: an error of 50 MB
-- expect: xxxx
error(('x'):rep(5e7), 0)
