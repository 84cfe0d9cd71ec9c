-- tries: an error of a line that no file has
-- expect: place: x
return {place = function() error("policy:99999999999999999999: x", 0) end}
