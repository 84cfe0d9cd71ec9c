-- tries: a layer that does not exist
-- expect: place: 2 is no MoE layer of small
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[2] = x[1]
    return x
end}
