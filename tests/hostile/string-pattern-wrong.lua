-- tries: a pattern that ends too soon
-- expect: malformed pattern
string.find("x", "[a")
