-- tries: to catch the lack of memory and go on
-- expect: stopped: it took
while true do
    pcall(string.rep, "x", 1e9)
end
