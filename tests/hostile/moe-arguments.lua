-- tries: arguments that no function of moe can want
-- expect: ok
local bad = {nil, false, -1, 0, 1e308, 0/0, 1 << 62, "x", {}, {0/0}, {-1}, {math.huge}, {{}}, print,
             setmetatable({}, {__index = function() return 1 end, __len = function() return 1e9 end})}
for name, f in pairs(moe) do
    for i = 1, 15 do
        for j = 1, 15 do
            local ok = pcall(f, bad[i], bad[j], bad[(i + j) % 15 + 1], bad[j], bad[i])
            assert(not ok, name)
        end
    end
end
return {}
