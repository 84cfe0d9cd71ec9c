-- tries: the largest problem there may be, again and again
-- expect: stopped: it took
while true do moe.trtllm_default(1, 1, 1 << 20) end
