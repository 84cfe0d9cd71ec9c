-- tries: an error handler that does not return
-- expect: stopped: it took
xpcall(function() error("x") end, function() while true do end end)
