// Specimen of the one hole in the templates: the emitter writes a plan.cuh with these same names
// for each layer class. This one makes every template compile and format in place.
#pragma once

// Shape of the layer.
constexpr int kHidden = 256;     // H
constexpr int kInter = 96;       // I, one expert's intermediate size
constexpr int kExperts = 16;     // E
constexpr int kTopK = 4;         // k
constexpr int kSharedInter = 64; // SI, 0: no shared expert

// Routing. kRouter is a MOE_ROUTER_ value.
constexpr int kRouter = MOE_ROUTER_DEEPSEEK_V3;
constexpr int kGroups = 4; // n_group

// Experts. kActivation is a MOE_ACT_ value.
constexpr int kActivation = MOE_ACT_SWIGLU;
constexpr int kBias = 0;        // experts have biases
constexpr int kInputWeight = 0; // the weight multiplies the expert's input

// Slot records. kFormat is a MOE_FORMAT_ value, BF16 or FP8_BLOCK.
constexpr int kFormat = MOE_FORMAT_BF16;

// Variants. GEMM: X(id, BM weight rows, BN token rows, BK, warps over M, warps over N, stages)
#define MOE_GEMM_VARIANTS(X) \
    X(0, 64, 8, 64, 4, 1, 4) \
    X(1, 64, 32, 64, 4, 1, 3) \
    X(2, 128, 128, 64, 2, 2, 3)

// Router: X(id, tokens per block, experts per block, K splits)
#define MOE_ROUTER_VARIANTS(X) \
    X(0, 8, 16, 4) \
    X(1, 32, 16, 1)

// Every kernel of the plan. X(name expression)
#define MOE_KERNELS(X) \
    X(moe_router<0>) \
    X(moe_router<1>) \
    X(moe_route<0>) \
    X(moe_slots<64, 0>) \
    X(moe_count<0>) \
    X(moe_slots<64, 1>) \
    X(moe_gemm1<0>) \
    X(moe_gemm2<0>) \
    X(moe_shared1<0>) \
    X(moe_shared2<0>) \
    X(moe_gemm1<1>) \
    X(moe_gemm1<2>) \
    X(moe_gemm2<2>) \
    X(moe_combine<0>) \
    X(moe_convert<0>) \
    X(moe_quant<0>) \
    X(moe_random<0>)
