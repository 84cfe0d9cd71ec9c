-- tries: a message that ends where a word is looked for
-- expect: place: x near '
return {place = function() error("x near '") end}
