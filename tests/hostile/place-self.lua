-- tries: a table that holds itself
-- expect: place: 
return {place = function(model, cluster)
    local t = {}
    t[1], t[3], t[5] = t, t, t
    return t
end}
