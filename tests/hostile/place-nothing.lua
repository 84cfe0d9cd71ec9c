-- tries: a function that returns nothing
-- expect: place: it returned nothing
return {place = function(model, cluster)
    local x = {}
end}
