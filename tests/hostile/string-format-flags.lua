-- tries: an address with flags
-- expect: has no %p
string.format('%-20p', print)
