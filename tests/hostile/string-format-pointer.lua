-- tries: an address, which differs between runs
-- expect: has no %p
string.format('%p', {})
