-- tries: a stage that does not exist
-- expect: variant: unknown key 'gem1'; did you mean 'gemm1'?
return {variant = function() return {gem1 = 1} end}
