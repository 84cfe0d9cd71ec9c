-- tries: keys that have no order
-- expect: have no order
next({[{}] = 1, [print] = 2})
