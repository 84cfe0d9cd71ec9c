// class0: layers of one shape.
#pragma once

// Shape of the layer.
constexpr int kHidden = 512;  // H
constexpr int kInter = 256;  // I, one expert's intermediate size
constexpr int kExperts = 16;  // E
constexpr int kTopK = 4;  // k
constexpr int kSharedInter = 512;  // SI, 0: no shared expert

// Routing. kRouter is a MOE_ROUTER_ value.
constexpr int kRouter = MOE_ROUTER_DEEPSEEK_V3;
constexpr int kGroups = 4;  // n_group

// Experts. kActivation is a MOE_ACT_ value.
constexpr int kActivation = MOE_ACT_SWIGLU;
constexpr int kBias = 0;  // experts have biases
constexpr int kInputWeight = 0;  // the weight multiplies the expert's input

// Slot records. kFormat is a MOE_FORMAT_ value, BF16 or FP8_BLOCK.
constexpr int kFormat = MOE_FORMAT_BF16;

// Variants. GEMM: X(id, BM weight rows, BN token rows, BK, warps over M, warps over N, stages)
#define MOE_GEMM_VARIANTS(X) \
    X(0, 32, 8, 64, 2, 1, 6) \
    X(2, 64, 16, 64, 4, 1, 6) \
    X(3, 128, 64, 64, 2, 2, 4) \
    X(4, 128, 128, 64, 2, 2, 3)

// Router: X(id, tokens per block, experts per block, K splits)
#define MOE_ROUTER_VARIANTS(X) \
    X(0, 8, 32, 16) \
    X(1, 16, 64, 4)

// Every kernel of the plan. X(name expression)
#define MOE_KERNELS(X) \
    X(moe_router<0>) \
    X(moe_route<0>) \
    X(moe_convert<0>) \
    X(moe_target<0>) \
    X(moe_place<0>) \
    X(moe_send<0>) \
    X(moe_shared1<0>) \
    X(moe_shared2<0>) \
    X(moe_receive<0>) \
    X(moe_slots<8,0>) \
    X(moe_gemm1<0>) \
    X(moe_gemm2<0>) \
    X(moe_return<0>) \
    X(moe_arrive<0>) \
    X(moe_combine<0>) \
    X(moe_random<0>) \
    X(moe_shared1<2>) \
    X(moe_shared2<2>) \
    X(moe_slots<16,0>) \
    X(moe_gemm1<2>) \
    X(moe_gemm2<2>) \
    X(moe_router<1>) \
    X(moe_shared1<3>) \
    X(moe_shared2<3>) \
    X(moe_slots<64,0>) \
    X(moe_gemm1<3>) \
    X(moe_gemm2<3>) \
    X(moe_shared1<4>) \
    X(moe_shared2<4>) \
    X(moe_slots<128,0>) \
    X(moe_gemm1<4>) \
    X(moe_gemm2<4>)
