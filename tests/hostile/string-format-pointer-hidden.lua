-- tries: an address behind a zero byte
-- expect: has no %p
string.format('\0%p', {})
