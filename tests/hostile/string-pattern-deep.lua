-- tries: a pattern that recurses in C
-- expect: pattern too complex
string.match(("a"):rep(300000), ("(a?)"):rep(30) .. ("a?"):rep(250) .. "$")
