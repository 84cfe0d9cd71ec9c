-- deepseek: what DeepSeek's EPLB computes. Hierarchical when the nodes divide the model's expert
-- groups, else global; equal replicas stay in order.
return {
    name = "deepseek",
    place = function(model, cluster, loads)
        local groups = math.max(model.router.n_group, 1)
        local nodes = 1
        if cluster.ranks % cluster.ranks_per_node == 0 then
            nodes = cluster.ranks // cluster.ranks_per_node
        end
        local placement = {}
        for _, layer in ipairs(model.moe_layers) do
            placement[layer] = moe.deepseek(loads[layer], cluster.ranks * cluster.slots_per_rank,
                                            groups, nodes, cluster.ranks)
        end
        return placement
    end,
}
