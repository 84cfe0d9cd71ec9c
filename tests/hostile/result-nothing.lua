-- tries: to return nothing
-- expect: a policy returns a table

