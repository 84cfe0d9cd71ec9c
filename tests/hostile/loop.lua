-- tries: a loop without end
-- expect: stopped: it took
while true do end
