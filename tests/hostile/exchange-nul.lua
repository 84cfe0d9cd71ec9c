-- tries: a name that goes on after a byte 0
-- expect: exchange: expected one of onesided, allgather, alltoall, got 'alltoall
return {exchange = function() return "alltoall\0and more" end}
