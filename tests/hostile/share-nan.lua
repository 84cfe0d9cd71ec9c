-- tries: a share that is not a number
-- expect: share: layer 1, slot 0: share nan out of 0..1
return {share = function(model, cluster, loads, placement)
    local x = {}
    for layer, slots in pairs(placement) do
        x[layer] = {}
        for i in ipairs(slots) do x[layer][i] = 0/0 end
    end
    return x
end}
