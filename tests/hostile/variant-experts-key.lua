-- tries: a misspelt key of experts
-- expect: variant: experts: unknown key 'token'; did you mean 'tokens'?
return {variant = function() return {experts = {token = 64}} end}
