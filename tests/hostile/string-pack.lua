-- tries: a machine's own sizes
-- expect: field 'pack'
string.pack("!j", 1)
