-- tries: gmatch over nothing, for ever
-- expect: stopped: it took
while true do for _ in string.gmatch("", "x*") do end end
