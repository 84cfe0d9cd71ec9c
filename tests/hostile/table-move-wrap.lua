-- tries: a move that overflows
-- expect: too many elements
table.move({}, math.mininteger, math.maxinteger, 1)
