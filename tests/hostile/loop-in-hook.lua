-- tries: a function of the policy that does not return
-- expect: stopped: it took
return {
    constraints = function() while true do end end,
}
