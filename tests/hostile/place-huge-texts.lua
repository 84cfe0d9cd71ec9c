-- tries: ten texts of 50 MB, each the same one
-- expect: larger than 64 MiB or not enough memory
return {place = function(model, cluster)
    local s = ('x'):rep(5e7)
    return {s, s, s, s, s, s, s, s, s, s}
end}
