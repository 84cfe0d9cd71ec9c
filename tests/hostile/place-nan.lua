-- tries: an expert that is not a number
-- expect: place: layer 1, slot 0: expert nan out of 0..15
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[1][1] = 0/0
    return x
end}
