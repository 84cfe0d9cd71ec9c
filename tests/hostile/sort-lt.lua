-- tries: a comparison that does not end
-- expect: stopped: it took 100 million instructions or stopped: it took 3 s or stopped: it took 8 s
return {
    place = function()
        local mt = {__lt = function() while true do end end}
        table.sort {setmetatable({}, mt), setmetatable({}, mt)}
    end,
}
