-- tries: a key of 50 MB
-- expect: is no MoE layer
return {place = function(model, cluster)
    return {[('x'):rep(5e7)] = 1}
end}
