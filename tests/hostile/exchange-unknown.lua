-- tries: a way of exchanging that does not exist
-- expect: exchange: expected one of onesided, allgather, alltoall, got 'pigeon'
return {exchange = function() return 'pigeon' end}
