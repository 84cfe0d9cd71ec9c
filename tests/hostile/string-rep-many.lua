-- tries: long strings, one after the other
-- expect: stopped: it took
while true do
    local s = string.rep("x", 1e8)
end
