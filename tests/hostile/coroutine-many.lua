-- tries: many coroutines, each below the counting step
-- expect: global 'coroutine'
while true do
    coroutine.resume(coroutine.create(function() for i = 1, 100 do end end))
end
