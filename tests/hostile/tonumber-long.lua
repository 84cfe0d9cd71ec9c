-- tries: numbers of a hundred million digits
-- expect: expected a table of layers or stopped: it took 8 s
return {place = function() return tonumber(("9"):rep(50000000), 36) end}
