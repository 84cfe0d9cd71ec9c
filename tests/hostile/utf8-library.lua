-- tries: a library that is not offered
-- expect: global 'utf8'
return {name = utf8.char(65)}
