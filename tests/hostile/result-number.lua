-- tries: to return a number
-- expect: a policy returns a table
return 1
