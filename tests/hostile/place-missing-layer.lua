-- tries: a layer that is missing
-- expect: place: layer 3 is missing
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[3] = nil
    return x
end}
