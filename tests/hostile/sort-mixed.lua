-- tries: values that do not compare
-- expect: attempt to compare
table.sort({1, 'x', {}})
