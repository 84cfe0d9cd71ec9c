-- tries: bytecode through a string's methods
-- expect: method 'dump'
return ("x"):dump()
