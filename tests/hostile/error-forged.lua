-- tries: an error that names another line
-- expect: no such thing
error('policy:99999: no such thing', 0)
