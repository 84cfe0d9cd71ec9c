-- tries: more constraints than there are places for them, by far
-- expect: ok
return {
    constraints = function()
        local forbidden, pins, one, two = {}, {}, {expert = 0, rank = 0}, {slot = 8, expert = 1}
        for i = 1, 350000 do
            forbidden[i], pins[i] = one, two
        end
        return {forbidden = forbidden, pins = pins}
    end,
}
