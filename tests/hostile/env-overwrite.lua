-- tries: to replace what the sandbox offers
-- expect: ok
pairs, next, setmetatable, tostring, moe = nil, nil, nil, nil, nil
string.format = function() return "%p" end
return {}
