-- tries: more results than the stack holds
-- expect: string slice too long
string.byte(("x"):rep(1e7), 1, -1)
