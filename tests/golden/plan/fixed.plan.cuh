// class0: layers of one shape.
#pragma once

// Shape of the layer.
constexpr int kHidden = 128;  // H
constexpr int kInter = 64;  // I, one expert's intermediate size
constexpr int kExperts = 8;  // E
constexpr int kTopK = 3;  // k
constexpr int kSharedInter = 0;  // SI, 0: no shared expert

// Routing. kRouter is a MOE_ROUTER_ value.
constexpr int kRouter = MOE_ROUTER_STATIC;
constexpr int kGroups = 1;  // n_group

// Experts. kActivation is a MOE_ACT_ value.
constexpr int kActivation = MOE_ACT_RELU2;
constexpr int kBias = 0;  // experts have biases
constexpr int kInputWeight = 0;  // the weight multiplies the expert's input

// Slot records. kFormat is a MOE_FORMAT_ value, BF16 or FP8_BLOCK.
constexpr int kFormat = MOE_FORMAT_BF16;

// Variants. GEMM: X(id, BM weight rows, BN token rows, BK, warps over M, warps over N, stages)
#define MOE_GEMM_VARIANTS(X) \
    X(0, 32, 8, 64, 2, 1, 6) \
    X(2, 64, 16, 64, 4, 1, 6)

// Router: X(id, tokens per block, experts per block, K splits)
#define MOE_ROUTER_VARIANTS(X)

// Every kernel of the plan. X(name expression)
#define MOE_KERNELS(X) \
    X(moe_route<0>) \
    X(moe_slots<8,0>) \
    X(moe_convert<0>) \
    X(moe_gemm1<0>) \
    X(moe_gemm2<0>) \
    X(moe_combine<0>) \
    X(moe_random<0>) \
    X(moe_slots<16,0>) \
    X(moe_gemm1<2>) \
    X(moe_gemm2<2>)
