-- tries: a table that holds itself 300 times
-- expect: stopped: what it returns
return {place = function(model, cluster)
    local t = {}
    for i = 1, 300 do t[i] = t end
    return t
end}
