-- tries: more captures than there is room for
-- expect: too many captures
string.find("x", ("()"):rep(40))
