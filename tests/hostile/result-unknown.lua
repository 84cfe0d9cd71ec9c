-- tries: a field that is misspelt
-- expect: did you mean 'place'?
return {plase = function() end}
