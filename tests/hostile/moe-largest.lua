-- tries: the largest problem, with the most workloads
-- expect: stopped: it took 3 s of processor time or stopped: it took 8 s
return {
    place = function()
        local load, loads = {}, {}
        for e = 1, 1024 do
            load[e] = e
        end
        for w = 1, 64 do
            loads[w] = load
        end
        moe.plan {ranks = 1024, slots_per_rank = 1024, loads = loads, split = "balanced"}
    end,
}
