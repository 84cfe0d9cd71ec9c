-- tries: as many empty strings as there are numbers
-- expect: stopped: it took 3 s of processor time or stopped: it took 8 s
return {place = function() return (""):rep(math.maxinteger, "") end}
