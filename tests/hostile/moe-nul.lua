-- tries: a key of a problem that goes on after a byte 0
-- expect: place: a problem has no key 'split'
return {place = function() moe.plan {ranks = 2, slots_per_rank = 2, load = {1, 2}, ["split\0"] = 1} end}
