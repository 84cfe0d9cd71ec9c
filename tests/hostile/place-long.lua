-- tries: a slot too many
-- expect: place: layer 3: 25 entries for 24 slots
return {place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    x[3][25] = 0
    return x
end}
