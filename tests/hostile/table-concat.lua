-- tries: a billion entries that are not there
-- expect: invalid value
table.concat({}, ',', 1, 1e9)
