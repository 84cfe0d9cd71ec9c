// One MoE layer class: router, slots, grouped GEMMs, combine, exchange between ranks. The emitter
// flattens this file and what it includes into one text; plan.cuh is the hole.
#include "args.h"
#include "prim.cuh"
#include "plan.cuh"
#include "router.cuh"
#include "slots.cuh"
#include "quant.cuh"
#include "gemm.cuh"
#include "combine.cuh"
#include "hopper.cuh"
#include "exchange.cuh"
#include "random.cuh"

MOE_EXPORT(MOE_KERNELS)
