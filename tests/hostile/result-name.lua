-- tries: a name that is no text
-- expect: name: expected a text
return {name = {}}
