-- tries: a pattern that takes a long polynomial time
-- expect: stopped: it took
string.match(("a"):rep(20000), (".-"):rep(20) .. "b")
