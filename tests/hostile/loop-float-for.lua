-- tries: a for loop to infinity
-- expect: stopped: it took
for i = 1, math.huge do end
