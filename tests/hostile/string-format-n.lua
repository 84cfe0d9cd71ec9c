-- tries: C's %n
-- expect: invalid conversion
string.format('%n', 1)
