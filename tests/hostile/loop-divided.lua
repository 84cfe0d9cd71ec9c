-- tries: to stay below the limit of a call, in every call
-- expect: stopped: it took or ok
local function spin() for i = 1, 4.8e7 do end end
spin()
return {
    constraints = function() spin() return {} end,
    exchange = function() spin() return "alltoall" end,
    variant = function() spin() return {} end,
}
