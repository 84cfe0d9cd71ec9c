-- tries: tokens that no block has
-- expect: variant: experts: tokens is 32; it must be 64 or 128
return {variant = function() return {experts = {tokens = 32}} end}
