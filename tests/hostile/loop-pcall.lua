-- tries: to catch the end of its time and go on
-- expect: stopped: it took
while true do
    pcall(function() while true do end end)
end
