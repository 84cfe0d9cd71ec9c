/* The argument of every kernel: one struct, known to both sides of the bundle.
 *
 * Plain C11 that is also CUDA. plan.bin records MOE_ARGS_ID, MOE_ARGS_VERSION and
 * sizeof(struct moe_args); the runtime refuses a bundle whose figures differ from its own.
 *
 * Shapes: T tokens of this chunk, H hidden, I intermediate, E experts, k top-k, S slots of this
 * rank, SI shared intermediate. An "entry" is t*k+j, the j-th choice of token t. A "row" is a
 * place in the permuted order: rows of slot 0 first, in ascending entry order, then slot 1, ...
 */
#ifndef MOE_ARGS_H
#define MOE_ARGS_H

#define MOE_ARGS_ID 1
#define MOE_ARGS_VERSION 8

/* Enumerations whose values are written to plan.bin: append, never reorder.
 * X(NAME, spelling in YAML) */
#define MOE_ROUTERS(X) \
    X(SOFTMAX_TOPK, "softmax_topk") \
    X(TOPK_SOFTMAX, "topk_softmax") \
    X(DEEPSEEK_V3, "deepseek_v3") \
    X(LLAMA4, "llama4") \
    X(MINIMAX2, "minimax2") \
    X(SPARSE_MIXER, "sparse_mixer") \
    X(STATIC, "static") \
    X(BALANCED, "balanced")

#define MOE_ACTIVATIONS(X) \
    X(SWIGLU, "swiglu") \
    X(SWIGLU_OAI, "swiglu_oai") \
    X(GEGLU, "geglu") \
    X(GEGLU_TANH, "geglu_tanh") \
    X(RELU2, "relu2")

/* Of weights. Records are BF16 or FP8_BLOCK. */
#define MOE_FORMATS(X) \
    X(BF16, "bf16") \
    X(FP8_BLOCK, "fp8_block") \
    X(FP8_TENSOR, "fp8_tensor") \
    X(MXFP4, "mxfp4")

#define X(name, ...) MOE_ROUTER_##name,
enum moe_router { MOE_ROUTERS(X) MOE_ROUTER_COUNT };
#undef X
#define X(name, ...) MOE_ACT_##name,
enum moe_activation { MOE_ACTIVATIONS(X) MOE_ACT_COUNT };
#undef X
#define X(name, ...) MOE_FORMAT_##name,
enum moe_format { MOE_FORMATS(X) MOE_FORMAT_COUNT };
#undef X

/* fp8 records and activations: e4m3 numbers, of which so many along K (of weights: in both
 * directions) share an fp32 scale. A number is e4m3 x scale; scale = max |number| / MOE_E4M3_MAX,
 * and no less than MOE_SCALE_MIN, so that a block of zeros is zeros. */
enum { MOE_SCALE_BLOCK = 128 };
#define MOE_E4M3_MAX 448.0f
#define MOE_SCALE_MIN 1e-30f

/* Workspace buffers. X(NAME, what it holds) */
#define MOE_WS(X) \
    X(LOGITS, "fp32 [split][T][E], the router's partial sums; [0] becomes the logits") \
    X(SYNC, "int32 counters, zero between launches") \
    X(OFFSETS, "int32 [S+1], first row of each slot") \
    X(TILES, "struct moe_tile [1 + tiles]; .slot of the first is the number of tiles") \
    X(ROW_ENTRY, "int32 [T*k], row -> entry") \
    X(ROW_OF, "int32 [T*k], entry -> row, -1 when its expert is not on this rank") \
    X(X16, "bf16 [T][H], x converted when it came as fp32") \
    X(HID, "bf16, with fp8 records fp32 [T*k][I], activations between the two grouped GEMMs") \
    X(Y, "bf16 [T*k][H], expert outputs, row order") \
    X(SHID, "bf16, with fp8 records fp32 [T][SI], the shared expert's activations") \
    X(SY, "bf16 [T][H], the shared expert's output") \
    X(X8, "e4m3 [T][H], x quantised; this and the next five: fp8 records only") \
    X(XS, "fp32 [T][ceil(H/128)], its scales") \
    X(HID8, "e4m3 [T*k][I], HID quantised") \
    X(HIDS, "fp32 [T*k][ceil(I/128)], its scales") \
    X(SHID8, "e4m3 [T][SI], SHID quantised") \
    X(SHIDS, "fp32 [T][ceil(SI/128)], its scales") \
    X(QUEUE, "int32 counters of moe_experts: next item, parts done, parts done per tile") \
    X(COUNTS, "int32 [ceil(T*k/MOE_SLOTS_PART)][S], entries of each slot in a part of them") \
    X(TARGET, "int32 [T*k], entry -> slot over all ranks, -1: none") \
    X(PLACE, "int32 [T*k], entry -> its token's place in what that slot's rank receives") \
    X(SENT, "int32 [T*k], entry -> itself, -1 when no rank has its expert") \
    X(TOKENS_TO, "int32 [R], tokens that each rank is sent")

enum moe_ws_id {
#define X(name, what) MOE_WS_##name,
    MOE_WS(X)
#undef X
        MOE_WS_COUNT
};

enum { MOE_SLOTS_PART = 1024 }; /* entries of a row of COUNTS */

/* One tile of rows of a grouped GEMM. A slot's tiles are consecutive. */
struct moe_tile {
    int slot;  /* local slot */
    int row;   /* first row */
    int rows;  /* rows in this tile, 1..BN */
    int first; /* index of the slot's first tile */
    int count; /* tiles of this slot */
    int pad[3];
};

enum moe_args_flags {
    MOE_X_FP32 = 1,      /* x is fp32, else bf16 */
    MOE_OUT_FP32 = 2,    /* out is fp32, else bf16 */
    MOE_ROUTER_FP32 = 4, /* router_weight is fp32, else bf16 */
    MOE_LOGITS_BF16 = 8, /* logits_in is bf16, else fp32 */
    MOE_COMBINE = 16,    /* the experts' launch combines too where it can */
    MOE_ROUTED =
        32, /* the experts' launch has no shared expert to do: rows are received ones */
    MOE_SHARED = 64,  /* it has nothing else to do */
    MOE_SUMMED = 128, /* what is combined was multiplied by its weights already */
};

/* Elements that moe_random writes. */
enum moe_fill {
    MOE_FILL_BF16,
    MOE_FILL_FP32,
    MOE_FILL_E4M3,  /* of value * MOE_FILL_E4M3_UNIT; the scale is left to its scales */
    MOE_FILL_SCALE, /* fp32, moe_random_scale */
};

/* What a layer class says in numbers, of which no kernel is faster for knowing it when it is
 * compiled (make bench measures those that are: plan.cuh). */
struct moe_params {
    long long
        slot_bytes; /* of a record; the parts below are offsets into one, w1 comes first */
    long long w2_offset, b1_offset, b2_offset, shared_w2_offset;
    long long s1_offset, s2_offset, shared_s1_offset, shared_s2_offset; /* fp8 records only */
    int slots;                                                          /* of this rank */
    int sigmoid;     /* scores: sigmoid, else softmax */
    int top_groups;  /* topk_group */
    int norm_topk;   /* weights divided by their sum */
    int mask_zero;   /* masked groups score 0.0, else -inf */
    int group_best;  /* a group scores its best expert, else the sum of its best two */
    int logits_bf16; /* logits rounded to bf16 before scoring */
    float scale;     /* routed_scaling_factor */
    float jitter;    /* sparse_mixer's epsilon */
    float act_alpha; /* swiglu_oai */
    float act_limit; /* swiglu_oai */
};

/* Several ranks (exchange.cuh). Every rank has one arena of equal size, which all others reach:
 * this head, then per class, at the offsets of struct moe_peers,
 *   ids      int32 [R][N][k]     by source rank: slot of this rank, -1 when the choice is not here
 *   weights  fp32  [R][N][k]
 *   sources  int32 [R][N]        the token's number on its source rank
 *   hidden   bf16  [R][N][H], with fp8 records e4m3
 *   scales   fp32  [R][N][ceil(H/128)], fp8 records only
 *   results  bf16  [N*k][H]      of this rank's own tokens, by entry
 * and where a bucket exchanges by collectives, what they take and give:
 *   sent_ids, sent_weights, sent_hidden, sent_scales   as above, by target rank; allgather: [1][N]
 *   partials bf16  [R][N][H]     of each received token, the sum over its experts that are here
 *   sums     bf16  [R][N][H]     of this rank's own tokens, by the rank that made them
 * R ranks, N tokens that a rank may have in one chunk. A chunk packs its rows by `stride` <= N, the
 * highest count of any rank, on which all ranks agree. */
#define MOE_MAX_RANKS 128

struct moe_arena_head {
    unsigned epoch;      /* of the last dispatch; counts on the device, so that graphs replay */
    int failed;          /* a wait gave up: what follows sends nothing */
    int sent, returned;  /* blocks that are done, 0 between launches */
    unsigned generation; /* ranks left out so far, with each of which epochs begin anew */
    int pad[11];
    unsigned long long dispatched[MOE_MAX_RANKS]; /* by source: moe_flag of its tokens */
    unsigned long long combined[MOE_MAX_RANKS];   /* by source: moe_flag of 0 */
};

/* A flag says of which epoch it is, in which generation, and how many tokens came. */
enum { MOE_FLAG_TOKENS = 0xffffff };
static inline unsigned long long moe_flag(unsigned epoch, unsigned generation,
                                          unsigned tokens) {
    return (unsigned long long)epoch << 32 | (generation & 0xff) << 24 | tokens;
}

enum moe_phase { MOE_PHASE_DISPATCH = 1, MOE_PHASE_COMBINE };

/* In memory that the host reads while kernels run. The first wait that gives up fills it. */
struct moe_status {
    int abort;      /* set by the host: waits give up at once */
    int failed;     /* set last */
    int rank, peer; /* who waited for whom */
    int phase;      /* enum moe_phase */
    unsigned epoch;
    unsigned char missing[MOE_MAX_RANKS]; /* 1: this rank had not answered either */
};

/* How this rank exchanges tokens; one rank: zeros. */
struct moe_peers {
    char *const *peer; /* [R] every rank's arena, this rank's own among them; null: left out */
    struct moe_status *status; /* this rank's */
    const int *first_slot;     /* [E+1] an expert's slots are slot_list[first_slot[e]], ... */
    const int *slot_list;      /* slots over all ranks, ascending for each expert */
    const int *share_end;      /* as slot_list: shares added up; null: slots take turns */
    long long ids, weights, sources, hidden, scales, results; /* bytes from an arena's begin */
    long long sent_ids, sent_weights, sent_hidden, sent_scales, partials, sums;
    unsigned long long timeout; /* of a wait, ns */
    int rank, ranks, stride;
    int turn; /* entries after which replicas take their turns anew; 0: never */
};

struct moe_args {
    const void *x;                /* [T][H] */
    const void *x16;              /* [T][H] bf16: x itself, or ws[X16] */
    void *out;                    /* [T][H] */
    const void *logits_in;        /* [T][E], the caller's own logits, or null */
    int *topk_idx;                /* [T][k] expert ids */
    float *topk_weight;           /* [T][k] */
    const void *router_weight;    /* [E][H] */
    const float *router_bias;     /* [E], or null */
    const float *correction_bias; /* [E], or null */
    const int *static_experts;    /* [k], router static, or null */
    const char *pool;             /* slot records, params.slot_bytes each */
    const int *phys_of_slot;      /* [S] record of each local slot */
    const int *slot_of_expert;    /* [E] local slot of an expert, or -1 */
    const char *shared;           /* the shared expert's record, or null */
    const float *shared_gate;     /* [H], or null */
    void *ws[MOE_WS_COUNT];
    struct moe_params params;
    struct moe_peers exchange;
    unsigned long long seed; /* moe_random only: the tensor's seed */
    void *fill;              /* moe_random only: where */
    long long fill_count;    /* moe_random only: elements */
    float fill_scale;        /* moe_random only */
    int fill_kind;           /* moe_random only: enum moe_fill */
    int num_tokens;          /* T */
    int flags;               /* enum moe_args_flags */
};

/* Random tensors for tests and benchmarks: element i of the tensor with this seed, about normal
 * with variance 1 (the sum of four 16-bit uniforms of a splitmix64 hash; Steele et al. 2014),
 * exact in fp32 before the one multiplication by a scale. The kernel and the host agree bit for
 * bit. */
static inline unsigned long long moe_hash(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
static inline unsigned long long moe_tensor_seed(unsigned long long seed, int layer,
                                                 int tensor) {
    return moe_hash(moe_hash(seed + 1) ^ ((unsigned long long)layer << 32 | (unsigned)tensor));
}
static inline float moe_random_value(unsigned long long seed, unsigned long long i) {
    unsigned long long h = moe_hash(seed + (i + 1) * 0x9e3779b97f4a7c15ull);
    int sum =
        (int)(h & 65535) + (int)(h >> 16 & 65535) + (int)(h >> 32 & 65535) + (int)(h >> 48);
    return (float)(sum - 131070) * (1.0f / 37837.0f);
}
/* Random fp8 weights: e4m3 of value * MOE_FILL_E4M3_UNIT (at most 444), times a scale per block
 * that is between 3/4 and 5/4 of scale / MOE_FILL_E4M3_UNIT. A tensor's scales have a seed of
 * their own. */
#define MOE_FILL_E4M3_UNIT 128.0f
static inline unsigned long long moe_scale_seed(unsigned long long tensor_seed) {
    return moe_hash(tensor_seed ^ 0x5ca1e5);
}
static inline float moe_random_scale(unsigned long long seed, unsigned long long i) {
    unsigned long long h = moe_hash(seed + (i + 1) * 0x9e3779b97f4a7c15ull);
    return (0.75f + (float)(h & 127) * (1.0f / 256.0f)) * (1.0f / MOE_FILL_E4M3_UNIT);
}
/* Tensor numbers for moe_tensor_seed. Expert e's four parts: MOE_TENSOR_EXPERT + 4*e + part. Their
 * elements are counted in the record's own (packed) order. */
enum moe_tensor {
    MOE_TENSOR_ROUTER,
    MOE_TENSOR_ROUTER_BIAS,
    MOE_TENSOR_CORRECTION,
    MOE_TENSOR_SHARED_W1,
    MOE_TENSOR_SHARED_W2,
    MOE_TENSOR_SHARED_GATE,
    MOE_TENSOR_X,
    MOE_TENSOR_EXPERT = 16 /* + 0 w1, 1 w2, 2 b1, 3 b2 */
};

#endif
