/* Files that moec carries inside itself: embed_NAME up to embed_NAME_end, NAME being the file's
 * name with every character that is not alphanumeric as '_'. */
    .section .rodata

    .macro embed name, path
    .global embed_\name
    .global embed_\name\()_end
embed_\name:
    .incbin "\path"
embed_\name\()_end:
    .byte 0
    .endm

    embed args_h, "templates/args.h"
    embed prim_cuh, "templates/prim.cuh"
    embed moe_cu, "templates/moe.cu"
    embed router_cuh, "templates/router.cuh"
    embed slots_cuh, "templates/slots.cuh"
    embed quant_cuh, "templates/quant.cuh"
    embed gemm_cuh, "templates/gemm.cuh"
    embed combine_cuh, "templates/combine.cuh"
    embed hopper_cuh, "templates/hopper.cuh"
    embed exchange_cuh, "templates/exchange.cuh"
    embed random_cuh, "templates/random.cuh"
    embed gpus_yaml, "plans/clusters/gpus.yaml"
    embed robust_lua, "lua/robust.lua"
    embed even_lua, "lua/even.lua"
    embed trtllm_lua, "lua/trtllm.lua"
    embed deepseek_lua, "lua/deepseek.lua"

    .section .note.GNU-stack, "", %progbits
