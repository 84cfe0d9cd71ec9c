-- tries: a string that does not end
-- expect: unfinished string
return "
