-- tries: a place far outside
-- expect: position out of bounds
table.insert({}, 1e9, 1)
