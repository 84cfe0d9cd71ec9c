-- tries: an error with control characters
-- expect: plain
error('plain \27[31m \0 \r\n text', 0)
