-- tries: a frontier at the end of the string
-- expect: ok
string.find("x", "%f[^\0]", 10)
string.gsub("x", "%f[%z]", "y")
return {}
