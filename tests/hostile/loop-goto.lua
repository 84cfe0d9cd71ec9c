-- tries: a loop of gotos
-- expect: stopped: it took
::again:: goto again
