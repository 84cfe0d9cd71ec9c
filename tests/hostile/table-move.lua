-- tries: a loop in C over a thousand billion entries
-- expect: stopped: it took
table.move({}, 1, 1e12, 2)
