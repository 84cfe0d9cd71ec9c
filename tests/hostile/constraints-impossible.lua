-- tries: an expert that may live nowhere
-- expect: layer 3 cannot be placed
return {constraints = function(model, cluster)
    local f = {}
    for rank = 0, cluster.ranks - 1 do f[#f + 1] = {layer = 3, expert = 0, rank = rank} end
    return {forbidden = f}
end}
