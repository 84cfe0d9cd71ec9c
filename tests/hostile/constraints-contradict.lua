-- tries: two experts in one slot
-- expect: constraints: pins[2].expert: 2, but an earlier record pins expert 1 to layer 1, slot 8
return {
    constraints = function()
        return {pins = {{slot = 8, expert = 1}, {layer = 1, slot = 8, expert = 2}}}
    end,
}
