-- tries: one of the host's functions as a policy's
-- expect: place: bad argument
return {place = string.rep}
