-- tries: half an expert
-- expect: place: layer 5, slot 23: expert 1.5 out of
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[5][24] = 1.5
    return x
end}
