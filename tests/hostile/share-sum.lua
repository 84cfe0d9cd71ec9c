-- tries: shares that do not sum to 1
-- expect: its shares sum to
return {share = function(model, cluster, loads, placement)
    local x = {}
    for layer, slots in pairs(placement) do
        x[layer] = {}
        for i in ipairs(slots) do x[layer][i] = 0.3 end
    end
    return x
end}
