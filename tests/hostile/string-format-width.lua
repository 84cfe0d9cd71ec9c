-- tries: a width that overruns a buffer
-- expect: invalid conversion
string.format('%99999d', 1)
