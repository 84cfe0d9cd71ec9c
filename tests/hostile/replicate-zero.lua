-- tries: no replica of an expert
-- expect: replicate: layer 1, expert 0: 0 replicas out of 1..4
return {replicate = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for e = 1, model.num_experts do x[layer][e] = e - 1 end
    end
    return x
end}
