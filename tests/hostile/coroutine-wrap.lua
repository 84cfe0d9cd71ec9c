-- tries: a coroutine whose steps are not counted
-- expect: global 'coroutine'
local f = coroutine.wrap(function() while true do coroutine.yield() end end)
while true do f() end
