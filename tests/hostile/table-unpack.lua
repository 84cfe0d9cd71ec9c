-- tries: more results than the stack holds
-- expect: too many results
table.unpack({}, 1, 1e8)
