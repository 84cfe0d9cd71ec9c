-- tries: tables nested a million deep
-- expect: place: layer 1
return {place = function(model, cluster)
    local t = {}
    for i = 1, 1e6 do t = {t} end
    return {[1] = t, [3] = t, [5] = t}
end}
