-- tries: an expert as text
-- expect: place: layer 5, slot 0: expert '3' out of
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[5][1] = '3'
    return x
end}
