-- A policy to start from: delete what you do not need. What is left out is built in. README.md in
-- this folder explains every argument and every function of moe.
return {
    name = "template",

    -- How often each expert is replicated: [layer][expert] -> count, which sum to
    -- cluster.num_slots. Here: one more for the expert whose replicas are the heaviest.
    replicate = function(model, cluster, loads)
        local counts = {}
        for _, layer in ipairs(model.moe_layers) do
            counts[layer] = moe.replicate(loads[layer], cluster.num_slots, cluster.ranks)
        end
        return counts
    end,

    -- Which expert each slot holds: [layer][slot] -> expert id, ids from 0.
    place = function(model, cluster, loads, counts)
        local placement = {}
        for _, layer in ipairs(model.moe_layers) do
            placement[layer] = moe.place(loads[layer], counts[layer], cluster.ranks,
                                         cluster.slots_per_rank)
        end
        return placement
    end,

    -- The part of its expert's tokens that each slot takes: [layer][slot] -> 0 to 1, parts of an
    -- expert sum to 1, an empty slot has 0. Here: equal parts.
    share = function(model, cluster, loads, placement)
        local shares = {}
        for layer, slots in pairs(placement) do
            local replicas = {}
            for _, expert in ipairs(slots) do
                replicas[expert] = (replicas[expert] or 0) + 1
            end
            shares[layer] = {}
            for i, expert in ipairs(slots) do
                shares[layer][i] = expert < 0 and 0 or 1 / replicas[expert]
            end
        end
        return shares
    end,

    -- What has to hold, now and while the load is balanced online.
    constraints = function(model, cluster)
        return {
            pins = {},              -- {layer = 3, slot = 17, expert = 5}; no layer: every layer
            forbidden = {},         -- {layer = 3, expert = 5, rank = 2}
            -- workload_weights = {["trace/"] = 2},
            -- move_budget = 4,     -- slots a layer may change in one step online
        }
    end,
}
