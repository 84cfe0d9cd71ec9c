-- tries: a text for a placement
-- expect: place: expected a table of layers
return {place = function(model, cluster)
    return 'x'
end}
