-- tries: pcall in pcall around the limit
-- expect: stopped: it took
local function spin() while true do end end
for _ = 1, 1000 do
    pcall(pcall, pcall, pcall, spin)
end
