-- tries: one workload and several at once
-- expect: place: a problem has load or loads, not both
return {place = function() moe.plan {ranks = 2, slots_per_rank = 2, load = {1, 2}, loads = {{1, 2}}} end}
