-- tries: a tile shape that does not exist
-- expect: variant: gemm1: variant 9999 out of 0..
return {variant = function() return {gemm1 = 9999} end}
