-- tries: a placement that breaks its own pins
-- expect: constraints pin expert 5 here
return {constraints = function() return {pins = {{slot = 0, expert = 5}}} end,
place = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for i = 1, cluster.ranks * cluster.slots_per_rank do
            x[layer][i] = (i - 1) % model.num_experts
        end
    end
    return x
end}
