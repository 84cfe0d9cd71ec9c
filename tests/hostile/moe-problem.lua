-- tries: a problem whose arrays do not fit
-- expect: ok
local base = {ranks = 4, slots_per_rank = 6, load = {1, 2, 3, 4}}
local bad = {ranks = {0, -1, 1e9, "x"}, slots_per_rank = {0, 1 << 40}, load = {{}, {-1}, 1},
             pin = {{}, {9}}, current = {{1}}, speed = {{}, {1}}, capacity = {{9, 9, 9, 9}},
             weight = {{}, {1, 2}}, split = {"x", 1}, moves = {-2}, typo = {1}}
for key, values in pairs(bad) do
    for _, value in ipairs(values) do
        local problem = {}
        for k, v in pairs(base) do problem[k] = v end
        problem[key] = value
        assert(not pcall(moe.plan, problem), key)
    end
end
return {}
