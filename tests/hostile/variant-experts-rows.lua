-- tries: weight rows that no product has
-- expect: variant: experts: w1_rows is 100; it must be a multiple of 16, 16 to 256
return {variant = function() return {experts = {w1_rows = 100}} end}
