-- tries: gsub with a function that does not return
-- expect: stopped: it took
string.gsub(("a"):rep(1000), "a", function() while true do end end)
