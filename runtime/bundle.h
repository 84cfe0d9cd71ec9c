/* The bundle on disk: what the compiler writes and the runtime reads, and nothing else is known
 * on both sides (with templates/args.h, the kernels' argument).
 *
 * A bundle is a directory:
 *   MANIFEST     text, see below
 *   plan.yaml    every decision, for people
 *   plan.bin     the same, for the runtime: the structs of this file
 *   CLASS.cu     one flattened source per layer class
 *   ARCH/K.cubin one per kernel and architecture
 *
 * MANIFEST lines, in this order, fields separated by one space:
 *   moec-bundle 1
 *   compiler VERSION
 *   nvrtc MAJOR.MINOR | none
 *   plan HASH                      BLAKE2b-256 of plan.yaml, hex
 *   file HASH BYTES PATH           one per file, PATH ascending (strcmp), MANIFEST itself left out
 *
 * plan.bin is little-endian, 8-byte aligned sections of fixed-size records behind a header.
 * Strings are offsets into the STRINGS section (NUL-terminated, offset 0 is ""). Every index,
 * offset and count is checked at open; nothing in a bundle is trusted.
 */
#ifndef MOE_BUNDLE_H
#define MOE_BUNDLE_H

#include <stdint.h>

#include "../templates/args.h"

#define MOE_PLAN_MAGIC "MOECPLAN"
#define MOE_PLAN_VERSION 6
#define MOE_MANIFEST_VERSION 1
#define MOE_PACK_VERSION 1     /* of bf16 records */
#define MOE_PACK_FP8_VERSION 2 /* of fp8 records */

/* Enumerations whose values are written to plan.bin: append, never reorder. */

/* sm, and the shared memory a block may use there. host last. X(NAME, spelling, smem bytes) */
#define MOE_TARGETS(X) \
    X(SM_80, "sm_80", 166912) \
    X(SM_89, "sm_89", 101376) \
    X(SM_90A, "sm_90a", 232448) \
    X(SM_100A, "sm_100a", 232448) \
    X(SM_103A, "sm_103a", 232448) \
    X(SM_120A, "sm_120a", 101376) \
    X(HOST, "host", 232448)

/* Steps of a forward that can be called alone; a launch belongs to one. With several ranks, of which
 * each sees the tokens of its own batch in most stages, PREPARE, EXPERTS and COMBINE_SEND work on
 * what it received: ranks * stride rows (struct moe_peers), and COMBINE_WAIT takes the place of
 * COMBINE; the shared expert, on a rank's own tokens, is SHARED. X(NAME, spelling) */
#define MOE_STAGES(X) \
    X(ROUTE, "route") \
    X(ROUTE_LOGITS, "route_logits") \
    X(PREPARE, "prepare") \
    X(EXPERTS, "experts") \
    X(COMBINE, "combine") \
    X(FILL, "fill") \
    X(DISPATCH_SEND, "dispatch_send") \
    X(SHARED, "shared") \
    X(DISPATCH_WAIT, "dispatch_wait") \
    X(COMBINE_SEND, "combine_send") \
    X(COMBINE_WAIT, "combine_wait")

/* How a batch is split over the replicas of an expert. Entry i of rank r, the nth of its expert, goes
 * to replica (n + r) % count with EVEN, as the shares say with SHARE; with ROUNDROBIN, as TensorRT-LLM
 * does, n counts from the beginning of each MOE_TURN entries and i / MOE_TURN is added to it.
 * X(NAME, spelling) */
#define MOE_DISPATCHES(X) \
    X(ROUNDROBIN, "roundrobin") \
    X(EVEN, "even") \
    X(SHARE, "share") \
    X(BALANCED, "balanced")

enum { MOE_TURN = 1024 };

/* How the ranks of a layer exchange tokens. X(NAME, spelling): stores to peers' memory, inside one
 * NVLink domain; an all-gather of all tokens; an all-to-all of the tokens that a rank has experts for.
 * With the latter two, blocks have room for the longest batch of any rank, and what comes back is the
 * sum over a rank's experts, which the token's own rank adds in a fixed order. */
#define MOE_EXCHANGES(X) \
    X(ONESIDED, "onesided") \
    X(ALLGATHER, "allgather") \
    X(ALLTOALL, "alltoall")

/* When a launch is made: ALONE, unless the experts' launch was told to combine (MOE_COMBINE). */
#define MOE_CONDITIONS(X) X(ALWAYS) X(IF_X_FP32) X(ALONE)

/* How a launch is made. X(NAME, bit): EARLY, as a programmatic dependent of the one before it, which
 * may still run; the kernel waits for it by itself. A collective of all ranks follows it: GATHER, the
 * tokens that each has to send come to all; SWAP, those for a rank come to it; BACK, a rank's partial
 * sums come back to it. */
#define MOE_LAUNCH_FLAGS(X) X(EARLY, 1) X(GATHER, 2) X(SWAP, 4) X(BACK, 8)
#define MOE_LAUNCH_COLLECTIVE (MOE_LAUNCH_GATHER | MOE_LAUNCH_SWAP | MOE_LAUNCH_BACK)

/* What a tensor map's addresses start from. */
#define MOE_MAP_BASES(X) X(POOL) X(SHARED)

/* How a grid follows from T (tokens of the chunk). p is the launch's three numbers.
 *   FIXED       (p0, p1, p2)
 *   TOKENS      (ceil(T/p0), p1, p2)
 *   ENTRIES     (ceil(T*k/p0), p1, p2)
 *   PERSISTENT  (min(p1, SMs * resident blocks of the kernel per SM), 1, 1), p1 = 0: no cap;
 *               p0 caps resident blocks per SM, 0: no cap. On the host: 4 blocks.
 *   FILL        (min(ceil(fill_count/p0), 65535), 1, 1) */
#define MOE_GRIDS(X) X(FIXED) X(TOKENS) X(ENTRIES) X(PERSISTENT) X(FILL)

#define MOE_SECTIONS(X) \
    X(CLASS, struct moe_plan_class) \
    X(LAYER, struct moe_plan_layer) \
    X(TABLE, int32_t) \
    X(TARGET, struct moe_plan_target) \
    X(KERNEL, struct moe_plan_kernel) \
    X(BUFFER, struct moe_plan_buffer) \
    X(BUCKET, struct moe_plan_bucket) \
    X(LAUNCH, struct moe_plan_launch) \
    X(STRINGS, char) \
    X(BALANCE, struct moe_plan_balance) \
    X(PIN, struct moe_plan_pin) \
    X(FORBIDDEN, struct moe_plan_forbidden) \
    X(WEIGHT, double) \
    X(RANK, struct moe_plan_rank) \
    X(MAP, struct moe_plan_map)

#define X(name, ...) MOE_TARGET_##name,
enum moe_target { MOE_TARGETS(X) MOE_TARGET_COUNT };
#undef X
#define X(name, ...) MOE_STAGE_##name,
enum moe_stage { MOE_STAGES(X) MOE_STAGE_COUNT };
#undef X
#define X(name, ...) MOE_DISPATCH_##name,
enum moe_dispatch { MOE_DISPATCHES(X) MOE_DISPATCH_COUNT };
#undef X
#define X(name, ...) MOE_EXCHANGE_##name,
enum moe_exchange { MOE_EXCHANGES(X) MOE_EXCHANGE_COUNT };
#undef X
#define X(name, ...) MOE_COND_##name,
enum moe_condition { MOE_CONDITIONS(X) MOE_COND_COUNT };
#undef X
#define X(name, ...) MOE_GRID_##name,
enum moe_grid { MOE_GRIDS(X) MOE_GRID_COUNT };
#undef X
#define X(name, bit) MOE_LAUNCH_##name = bit,
enum moe_launch_flags { MOE_LAUNCH_FLAGS(X) };
#undef X
#define X(name) MOE_MAP_##name,
enum moe_map_base { MOE_MAP_BASES(X) MOE_MAP_BASE_COUNT };
#undef X
#define X(name, ...) MOE_SECTION_##name,
enum moe_section { MOE_SECTIONS(X) MOE_SECTION_COUNT };
#undef X

/* A layer class: layers of equal shape, one source. Offsets are bytes inside a slot record, each
 * part 256-byte aligned. bf16 records (pack version 1):
 *   w1  bf16 [R1][H]; gated activations: R1 = 2*I, rows in blocks of 16: 8 gate rows i..i+7, then
 *       the 8 up rows i..i+7. relu2: R1 = I, plain rows.
 *   w2  bf16 [H][I]
 *   b1  fp32 [R1], in w1's row order; b2 fp32 [H]; offsets 0 when has_bias is 0
 * fp8 records (pack version 2): w1 and w2 are e4m3, rows as above; between w2 and b1 come
 *   s1  fp32 [ceil(I/128)][2: gate, up][ceil(H/128)], the scale of each block of 128 gate rows or
 *       128 up rows x 128 columns; relu2: [ceil(I/128)][ceil(H/128)]
 *   s2  fp32 [ceil(H/128)][ceil(I/128)], the same for w2
 * The shared expert's record is the same with SI for I and no biases. */
struct moe_plan_class {
    uint32_t name;   /* string: "class0" */
    uint32_t source; /* string: "class0.cu" */
    int32_t hidden, inter, experts, topk;
    int32_t ranks, slots_per_rank, max_replicas;
    int32_t max_tokens; /* tokens of this rank in one chunk; buffers are sized by it */

    int32_t router; /* enum moe_router */
    int32_t n_group, topk_group, norm_topk_prob;
    int32_t has_router_bias, has_correction_bias;
    int32_t sigmoid;      /* scoring: 0 softmax, 1 sigmoid */
    int32_t mask_zero;    /* masked groups score 0.0, else -inf */
    int32_t group_best;   /* a group scores its best expert, else the sum of its best two */
    int32_t logits_bf16;  /* round logits to bf16 before scoring */
    float scale;          /* routed_scaling_factor */
    float jitter;         /* sparse_mixer's epsilon */
    int32_t static_table; /* TABLE index of k expert ids, router static; else -1 */

    int32_t activation; /* enum moe_activation */
    float act_alpha, act_limit;
    int32_t has_bias;     /* expert biases b1, b2 */
    int32_t input_weight; /* 1: the weight multiplies the expert's input (llama4) */

    int32_t shared_inter; /* 0: none */
    int32_t shared_gate;  /* 1: times sigmoid(x . gate) */

    int32_t weights_format; /* enum moe_format the checkpoint is said to have */
    int32_t record_format;  /* enum moe_format of the records: BF16 or FP8_BLOCK */
    int32_t pack_version;
    int32_t collective; /* a bucket exchanges by collectives: arenas have room for it */
    int64_t w1_offset, w2_offset, b1_offset, b2_offset, slot_bytes;
    int64_t shared_w1_offset, shared_w2_offset, shared_bytes;
    int64_t s1_offset, s2_offset, shared_s1_offset, shared_s2_offset; /* fp8; else 0 */

    int32_t first_buffer, num_buffers;
};

/* Whether its records, and so its kernels, are fp8. */
static inline int moe_is_fp8(const struct moe_plan_class *c) {
    return c->record_format == MOE_FORMAT_FP8_BLOCK;
}

/* What of a class the kernels take at run time. */
static inline struct moe_params moe_params_of(const struct moe_plan_class *c) {
    return (struct moe_params){.slot_bytes = c->slot_bytes,
                               .w2_offset = c->w2_offset,
                               .b1_offset = c->b1_offset,
                               .b2_offset = c->b2_offset,
                               .shared_w2_offset = c->shared_w2_offset,
                               .s1_offset = c->s1_offset,
                               .s2_offset = c->s2_offset,
                               .shared_s1_offset = c->shared_s1_offset,
                               .shared_s2_offset = c->shared_s2_offset,
                               .slots = c->slots_per_rank,
                               .sigmoid = c->sigmoid,
                               .top_groups = c->topk_group,
                               .norm_topk = c->norm_topk_prob,
                               .mask_zero = c->mask_zero,
                               .group_best = c->group_best,
                               .logits_bf16 = c->logits_bf16,
                               .scale = c->scale,
                               .jitter = c->jitter,
                               .act_alpha = c->act_alpha,
                               .act_limit = c->act_limit};
}

/* Offsets of a class's parts inside an arena, and its size: the same on every rank. */
static inline long long moe_arena_layout(const struct moe_plan_class *c,
                                         struct moe_peers *out) {
    long long rows = (long long)c->ranks * c->max_tokens, at = 0;
    long long scales = moe_is_fp8(c) ? (c->hidden + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK : 0;
    long long choices = rows * c->topk * 4, hidden = rows * c->hidden * (moe_is_fp8(c) ? 1 : 2);
    long long results = (long long)c->max_tokens * c->topk * c->hidden * 2;
    long long sums = rows * c->hidden * 2, bytes[] = {sizeof(struct moe_arena_head),
                                                      choices,
                                                      choices,
                                                      rows * 4,
                                                      hidden,
                                                      rows * scales * 4,
                                                      results, /* the rest: collectives */
                                                      choices,
                                                      choices,
                                                      hidden,
                                                      rows * scales * 4,
                                                      sums,
                                                      sums};
    enum { PARTS = sizeof bytes / sizeof *bytes, STORES = 7 };
    long long offset[PARTS] = {0};
    for (int i = 0; i < (c->collective ? PARTS : STORES); i++) {
        offset[i] = at;
        at += (bytes[i] + 255) / 256 * 256;
    }
    out->ids = offset[1];
    out->weights = offset[2];
    out->sources = offset[3];
    out->hidden = offset[4];
    out->scales = offset[5];
    out->results = offset[6];
    out->sent_ids = offset[7];
    out->sent_weights = offset[8];
    out->sent_hidden = offset[9];
    out->sent_scales = offset[10];
    out->partials = offset[11];
    out->sums = offset[12];
    return at;
}

/* Shares are whole parts of MOE_SHARE_ONE; those of an expert's slots add up to it exactly. */
#define MOE_SHARE_ONE 65536

/* Imbalance is max/mean rank load over the recorded loads (1 is best): under the plan's dispatch,
 * under an even split, and what no placement is below. Nothing depends on these three figures. */
struct moe_plan_layer {
    int32_t layer; /* the model's own number */
    int32_t class_index;
    int32_t expert_of_slot; /* TABLE index of ranks*slots_per_rank ids, -1 empty */
    int32_t share_of_slot;  /* TABLE index of as many shares, 0 for an empty slot */
    double imbalance, imbalance_even, bound;
};

/* What one class has for one target. */
struct moe_plan_target {
    int32_t target; /* enum moe_target */
    int32_t class_index;
    int32_t first_bucket, num_buckets; /* ascending max_tokens; last covers max_tokens */
};

struct moe_plan_kernel {
    uint32_t expression; /* string: "moe_gemm1<3>", NVRTC name expression, the host's key */
    uint32_t symbol;     /* string: lowered name in the cubin; "" for host */
    uint32_t file;       /* string: "sm_90a/class0.moe_gemm1_3.cubin"; "" for host */
    int32_t target;
    uint32_t block;              /* threads */
    uint32_t smem;               /* dynamic shared memory, bytes */
    int32_t first_map, num_maps; /* its second argument: so many tensor maps, in order */
    int32_t cluster;             /* blocks of a cluster; 0 or 1: none */
};

/* A tensor map over [slots][rows][columns] of bf16 or bytes, columns adjacent; what the driver encodes
 * of it is 128 bytes. A box is one slot's `box_rows` rows of 128 bytes, whose 16-byte chunks are
 * permuted by the row's low three bits; what lies outside the tensor is zeros. */
struct moe_plan_map {
    int32_t base; /* enum moe_map_base */
    int32_t columns, rows, slots;
    int32_t box_rows;
    int32_t element;     /* bytes: 1 or 2 */
    int64_t offset;      /* bytes from the base */
    int64_t slot_stride; /* bytes */
};

struct moe_plan_buffer {
    int32_t ws;   /* enum moe_ws_id */
    int32_t zero; /* zeroed once when made */
    int64_t bytes;
};

struct moe_plan_bucket {
    int32_t max_tokens;
    int32_t first_launch, num_launches; /* in order; stages may be run alone */
    int32_t exchange;                   /* enum moe_exchange; -1: one rank */
};

struct moe_plan_launch {
    int32_t kernel; /* KERNEL index */
    int32_t stage, condition, grid;
    int32_t p[3];
    int32_t flags; /* enum moe_launch_flags */
};

/* What binds whoever moves experts later; there is one record. The placement keeps the limits, the
 * pins and the forbidden ranks. WEIGHT holds one number per workload the plan was made for, or nothing. */
struct moe_plan_balance {
    int32_t dispatch;               /* enum moe_dispatch */
    int32_t layer_updates_per_iter; /* 0: the placement is fixed */
    int32_t move_budget;            /* slots a layer that one update may change; -1: no limit */
    int32_t ranks_per_node;         /* of the nodes that limits speak of; 0: none does */
    int32_t groups; /* experts in so many consecutive groups, each on one node; 0: none */
    int32_t
        cross_node_slots; /* with groups: slots of a layer that may hold an expert elsewhere */
    int32_t max_replicas, max_per_node; /* of one expert; 0: no limit */
};
/* One record per rank where ranks differ, else none. */
struct moe_plan_rank {
    double speed;  /* relative; a rank's time is its load / speed */
    int32_t slots; /* its first ones, which may hold an expert */
    int32_t pad;
};
struct moe_plan_pin {
    int32_t layer, slot, expert, pad; /* the model's number; slot over all ranks */
};
struct moe_plan_forbidden {
    int32_t layer, expert, rank, pad;
};

struct moe_plan_section {
    uint32_t count, stride;
    uint64_t offset;
};

struct moe_plan_header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t total_bytes;
    uint32_t args_id, args_version, args_bytes;
    uint32_t num_sections;
    struct moe_plan_section sections[MOE_SECTION_COUNT];
};

#endif
