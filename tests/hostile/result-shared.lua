-- tries: a table that is in itself a million times
-- expect: what it returns is larger than 64 MiB or what it returns has more than 4 million or stopped: it took 8 s
return {
    place = function()
        local t = {}
        for i = 1, 1000000 do
            t[i] = t
        end
        return t
    end,
}
