-- tries: more effort than there is time
-- expect: stopped: it took
local load = {}
for e = 1, 1024 do load[e] = 1 + e % 97 end
while true do
    moe.plan({ranks = 128, slots_per_rank = 16, load = load, effort = 100000000})
end
