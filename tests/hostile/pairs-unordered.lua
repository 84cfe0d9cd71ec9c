-- tries: an order that differs between runs
-- expect: have no order
for k in pairs({[{}] = 1}) do end
