-- tries: to-be-closed variables that call back for ever
-- expect: stopped: it took 3 s of processor time or stopped: it took 100 million or stack overflow or stopped: it took 8 s
local function again()
    local x <close> = setmetatable({}, {__close = function() again() end})
    again()
end
return {place = again}
