-- tries: more replicas than slots
-- expect: replicate: layer 1: 32 replicas for 24 slots
return {replicate = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for e = 1, model.num_experts do x[layer][e] = 2 end
    end
    return x
end}
