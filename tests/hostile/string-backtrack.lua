-- tries: a pattern that takes exponential time
-- expect: stopped: it took
string.find(("a"):rep(40), ("a?"):rep(40) .. ("a"):rep(40))
