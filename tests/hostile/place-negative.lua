-- tries: an expert below 0
-- expect: place: layer 3, slot 17: expert -1 out of 0..15
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[3][18] = -1
    return x
end}
