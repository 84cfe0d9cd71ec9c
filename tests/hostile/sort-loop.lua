-- tries: a comparison that does not return
-- expect: stopped: it took
table.sort({2, 1}, function() while true do end end)
