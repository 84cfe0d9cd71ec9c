-- tries: a million keys that are nearly right
-- expect: unknown key 'forbiddem1'; did you mean 'forbidden'? or stopped:  or stopped: it took 8 s
return {
    constraints = function()
        local t = {}
        for i = 1, 1000000 do
            t["forbiddem" .. i] = 1
        end
        return t
    end,
}
