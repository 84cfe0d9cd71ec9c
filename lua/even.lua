-- even: experts in order, and again from expert 0 until every slot is filled. No loads are asked.
return {
    name = "even",
    place = function(model, cluster)
        local placement = {}
        for _, layer in ipairs(model.moe_layers) do
            local slots = {}
            for i = 1, cluster.ranks * cluster.slots_per_rank do
                slots[i] = i <= cluster.num_slots and (i - 1) % model.num_experts or -1
            end
            placement[layer] = slots
        end
        return placement
    end,
}
