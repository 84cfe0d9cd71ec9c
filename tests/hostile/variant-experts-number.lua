-- tries: experts is no table
-- expect: variant: experts: expected false or a table
return {variant = function() return {experts = 7} end}
