// class0: layers of one shape.
#pragma once

// Shape of the layer.
constexpr int kHidden = 256;  // H
constexpr int kInter = 512;  // I, one expert's intermediate size
constexpr int kExperts = 16;  // E
constexpr int kTopK = 1;  // k
constexpr int kSlots = 16;  // slots of one rank
constexpr int kSharedInter = 512;  // SI, 0: no shared expert
constexpr int kSharedGate = 0;  // shared expert times sigmoid(x . gate)

// Routing. kRouter is a MOE_ROUTER_ value.
constexpr int kRouter = MOE_ROUTER_LLAMA4;
constexpr int kSigmoid = 1;  // scores: sigmoid, else softmax
constexpr int kGroups = 1;  // n_group
constexpr int kTopGroups = 1;  // topk_group
constexpr int kNormTopK = 0;  // weights divided by their sum
constexpr int kRouterBias = 0;  // bias added to the logits
constexpr int kCorrectionBias = 0;  // bias added to the scores, for the choice only
constexpr int kMaskZero = 0;  // masked groups score 0.0, else -inf
constexpr int kLogitsBf16 = 0;  // logits rounded to bf16 before scoring
constexpr float kScale = 1.0f;  // routed_scaling_factor
constexpr float kJitter = 0.0f;  // sparse_mixer's epsilon
__device__ constexpr int kStaticExperts[] = {0};  // router static: k expert ids

// Experts. kActivation is a MOE_ACT_ value.
constexpr int kActivation = MOE_ACT_SWIGLU;
constexpr float kActAlpha = 0.0f;  // swiglu_oai
constexpr float kActLimit = 0.0f;  // swiglu_oai
constexpr int kBias = 0;  // experts have biases
constexpr int kInputWeight = 1;  // the weight multiplies the expert's input

// Slot record, bytes.
constexpr long long kW1Offset = 0;
constexpr long long kW2Offset = 524288;
constexpr long long kB1Offset = 0;
constexpr long long kB2Offset = 0;
constexpr long long kSlotBytes = 786432;
constexpr long long kSharedW1Offset = 0;
constexpr long long kSharedW2Offset = 524288;

// Variants. GEMM: X(id, BM weight rows, BN token rows, BK, warps over M, warps over N, stages)
#define MOE_GEMM_VARIANTS(X) \
    X(0, 32, 8, 64, 2, 1, 6) \
    X(2, 64, 16, 64, 4, 1, 6)

// Router: X(id, tokens per block, experts per block, K splits)
#define MOE_ROUTER_VARIANTS(X) \
    X(0, 8, 32, 16)

// Every kernel of the plan. X(name expression)
#define MOE_KERNELS(X) \
    X(moe_router<0>) \
    X(moe_route<0>) \
    X(moe_slots<8>) \
    X(moe_convert<0>) \
    X(moe_gemm1<0>) \
    X(moe_gemm2<0>) \
    X(moe_shared1<2>) \
    X(moe_shared2<2>) \
    X(moe_combine<0>) \
    X(moe_random<0>)
