-- tries: a table without end through __index
-- expect: place: layer 1 is missing
return {place = function(model, cluster)
    local t = {}
    return setmetatable(t, {__index = function() return t end, __len = function() return 1e9 end})
end}
