-- tries: to go on in __close after an error
-- expect: stopped: it took
pcall(function()
    local x <close> = setmetatable({}, {__close = function() while true do end end})
    error("x")
end)
