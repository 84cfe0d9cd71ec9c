-- tries: a variable that does not close
-- expect: stopped: it took
do
    local x <close> = setmetatable({}, {__close = function() while true do end end})
end
