-- tries: fewer replicas than slots
-- expect: replicate: layer 1: 16 replicas, but there are 24 slots to fill
return {replicate = function(model, cluster)
    local x = {}
    for _, layer in ipairs(model.moe_layers) do
        x[layer] = {}
        for e = 1, model.num_experts do x[layer][e] = 1 end
    end
    return x
end}
