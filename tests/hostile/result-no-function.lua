-- tries: a number for a function
-- expect: place: expected a function, got a number
return {place = 1}
