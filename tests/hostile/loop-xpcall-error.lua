-- tries: an error handler that fails, again and again
-- expect: ok
for _ = 1, 1000 do
    xpcall(error, function(e) error(e) end, "x")
end
return {}
