-- tries: workloads that all weigh nothing
-- expect: at least one must be above 0
return {constraints = function() return {workload_weights = {0, 0}} end}
