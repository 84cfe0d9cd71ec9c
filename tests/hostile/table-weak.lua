-- tries: weak tables, so that memory is never full
-- expect: stopped: it took 100 million instructions or stopped: it took 3 s or stopped: it took 8 s
return {
    replicate = function()
        local t = setmetatable({}, {__mode = "kv"})
        for i = 1, 1e9 do
            t[i] = {}
        end
    end,
}
