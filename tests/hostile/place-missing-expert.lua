-- tries: an expert without a slot
-- expect: place: layer 1: expert 15 has no slot
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[1][16] = 0
    return x
end}
