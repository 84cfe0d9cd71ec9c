-- tries: to print without end
-- expect: stopped: it took
while true do print(("x"):rep(1e4)) end
