-- tries: a range that overflows
-- expect: too many results
table.unpack({}, math.mininteger, math.maxinteger)
