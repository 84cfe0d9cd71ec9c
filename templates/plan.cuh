// Specimen of the one hole in the templates: the emitter writes a plan.cuh with these same names
// for each layer class. This one makes every template compile and format in place.
#pragma once

// Shape of the layer.
constexpr int kHidden = 256;     // H
constexpr int kInter = 96;       // I, one expert's intermediate size
constexpr int kExperts = 16;     // E
constexpr int kTopK = 4;         // k
constexpr int kSlots = 16;       // slots of one rank
constexpr int kSharedInter = 64; // SI, 0: no shared expert
constexpr int kSharedGate = 1;   // shared expert times sigmoid(x . gate)

// Routing. kRouter is a MOE_ROUTER_ value.
constexpr int kRouter = MOE_ROUTER_DEEPSEEK_V3;
constexpr int kSigmoid = 1;        // scores: sigmoid, else softmax
constexpr int kGroups = 4;         // n_group
constexpr int kTopGroups = 2;      // topk_group
constexpr int kNormTopK = 1;       // weights divided by their sum
constexpr int kRouterBias = 0;     // bias added to the logits
constexpr int kCorrectionBias = 1; // bias added to the scores, for the choice only
constexpr int kMaskZero = 0;       // masked groups score 0.0, else -inf
constexpr int kLogitsBf16 = 0;     // logits rounded to bf16 before scoring
constexpr float kScale = 2.5f;     // routed_scaling_factor
constexpr float kJitter = 0.0f;    // sparse_mixer's epsilon
__device__ constexpr int kStaticExperts[] = {0}; // router static: k expert ids

// Experts. kActivation is a MOE_ACT_ value.
constexpr int kActivation = MOE_ACT_SWIGLU;
constexpr float kActAlpha = 1.702f; // swiglu_oai
constexpr float kActLimit = 7.0f;   // swiglu_oai
constexpr int kBias = 0;            // experts have biases
constexpr int kInputWeight = 0;     // the weight multiplies the expert's input

// Slot record, bytes (runtime/bundle.h).
constexpr long long kW1Offset = 0;
constexpr long long kW2Offset = 98304;
constexpr long long kB1Offset = 0;
constexpr long long kB2Offset = 0;
constexpr long long kSlotBytes = 147456;
constexpr long long kSharedW1Offset = 0;
constexpr long long kSharedW2Offset = 65536;

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
    X(moe_slots<64>) \
    X(moe_gemm1<0>) \
    X(moe_gemm2<0>) \
    X(moe_shared1<0>) \
    X(moe_shared2<0>) \
    X(moe_gemm1<1>) \
    X(moe_gemm1<2>) \
    X(moe_gemm2<2>) \
    X(moe_combine<0>) \
    X(moe_convert<0>) \
    X(moe_random<0>)
