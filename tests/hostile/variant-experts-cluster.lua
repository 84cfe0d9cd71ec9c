-- tries: a cluster of three
-- expect: variant: experts: cluster is 3; it must be 1 or 2
return {variant = function() return {experts = {cluster = 3}} end}
