-- trtllm: what TensorRT-LLM computes, ties included. Several workloads are added up as loads[] has
-- them. A layer without loads has upstream's default assignment.
return {
    name = "trtllm",
    place = function(model, cluster, loads)
        local ranks, per_rank = cluster.ranks, cluster.slots_per_rank
        local placement = {}
        for _, layer in ipairs(model.moe_layers) do
            local recorded = false
            for _, workload in ipairs(loads.workloads) do
                recorded = recorded or workload.load[layer] ~= nil
            end
            if recorded then
                local counts = moe.trtllm_replicate(loads[layer], ranks * per_rank)
                placement[layer] = moe.trtllm_place(loads[layer], counts, ranks)
            else
                placement[layer] = moe.trtllm_default(model.num_experts, ranks, per_rank)
            end
        end
        return placement
    end,
}
