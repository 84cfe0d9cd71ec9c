/* Tile shapes: which exist, what they need, and which one a batch of a given size gets. */
#include <math.h>
#include <string.h>

#include "moec.h"

/* Weight rows are the M side of every tile, token rows the N side, so that a decode step with a
 * few tokens per expert wastes no tensor-core work and reads each weight once. */
const struct gemm_variant gemm_variants[] = {
    /* id bm  bn  bk wm wn stages */
    {0, 32, 8, 64, 2, 1, 6},    {1, 64, 8, 64, 4, 1, 4},    {2, 64, 16, 64, 4, 1, 6},
    {3, 128, 64, 64, 2, 2, 4},  {4, 128, 128, 64, 2, 2, 3}, {5, 256, 128, 64, 4, 2, 4},
    {6, 128, 128, 64, 2, 4, 3}, /* fp8's widest: sums and totals of 64 results a thread */
};
const int num_gemm_variants = sizeof gemm_variants / sizeof *gemm_variants;

const struct router_variant router_variants[] = {
    /* id tokens experts split */
    {0, 8, 32, 16},
    {1, 16, 64, 4},
    {2, 64, 64, 1},
};
const int num_router_variants = sizeof router_variants / sizeof *router_variants;

int gemm_smem(const struct gemm_variant *v) {
    return v->stages * (v->bm + v->bn) * v->bk * 2;
}

int gemm_threads(const struct gemm_variant *v) {
    return 32 * v->warps_m * v->warps_n;
}

enum {
    HOPPER_SMS = 132,
    HOPPER_ENTRIES = 1024, /* a block sorts so many as fast as a launch of its own could */
    HOPPER_STAGES = 28,    /* below the ring of items */
    HOPPER_PASSED = 8,     /* items on their way from one block of a cluster to the other */
};

/* In the order of templates/hopper.cuh: slices, their scales, barriers, the ring of items, results on
 * their way out, tables of slots and of entries. */
int hopper_smem(const struct hopper_variant *v, const struct moe_plan_class *c) {
    enum { RING = 32, ITEM = 32, PITCH = 144 };
    int rows = v->w1_rows > v->w2_rows ? v->w1_rows : v->w2_rows;
    int scales = moe_is_fp8(c) ? (v->tokens + 8) * 4 : 0;
    return v->stages * ((rows + v->tokens) * 128 + scales + 16) +
           (2 * RING + HOPPER_PASSED + 2) * 8 + RING * ITEM + 128 * PITCH +
           4 * (HOPPER_PASSED + 3 * (c->slots_per_rank + 1) + 2 * v->entries);
}

/* Tensor maps want rows of whole 16 bytes. */
bool hopper_serves(enum moe_target target, const struct moe_plan_class *c) {
    int whole = moe_is_fp8(c) ? 16 : 8;
    return target == MOE_TARGET_SM_90A && c->hidden % whole == 0 && c->inter % whole == 0 &&
           c->shared_inter % whole == 0;
}

/* Two K slices of 32 of fp32 x and weights (templates/router.cuh). */
int router_smem(const struct router_variant *v) {
    return 2 * 32 * (v->tokens + v->experts) * 4;
}

/* Counts by warp; totals, places and tile starts (templates/slots.cuh). */
int slots_smem(int slots, int threads) {
    return slots * (threads / 32) + 3 * (slots + 1) * 4;
}

int64_t entries_received(const struct moe_plan_class *c, int64_t tokens) {
    return tokens * c->ranks * c->topk;
}

bool slots_counted(const struct moe_plan_class *c, int tokens) {
    return entries_received(c, tokens) > SLOTS_ALONE;
}

static int target_smem(enum moe_target t) {
    static const int bytes[] = {
#define X(name, spelling, smem) smem,
        MOE_TARGETS(X)
#undef X
    };
    return bytes[t];
}

/* What measurements on an H200 chose for `rows` token rows per expert on the mean and `experts`
 * experts hit. Few weight tiles want to be spread thin; a few rows want a narrow tile, since the
 * second-level cache serves weights that several tiles of an expert read; the widest tile wants
 * many rows and a long reduction, having one block per SM to hide its epilogue. */
static int gemm_for(double rows, double experts, int inter) {
    if (rows <= 2)
        return experts * 2 * inter / 64 < 384 ? 0 : 1;
    if (rows <= 20)
        return 2;
    if (rows <= 80)
        return 3;
    return rows >= 400 && inter >= 1536 ? 5 : 4;
}

static int gemm_choose(enum moe_target target, bool fp8, double rows, double experts,
                       int inter) {
    int id = gemm_for(rows, experts, inter);
    if (fp8 && id > 3)
        return 6;
    while (id > 0 && gemm_smem(&gemm_variants[id]) > target_smem(target))
        id--;
    return id;
}

/* fp8: a tile's rows are halves of each other, as blocks of scales are. */
static bool in_scale_blocks(int rows) {
    return rows <= 256 && (rows & (rows - 1)) == 0;
}

bool hopper_fill(struct hopper_variant *v, const struct moe_plan_class *c, int tokens) {
    int64_t entries = entries_received(c, tokens);
    if (moe_is_fp8(c) && !(in_scale_blocks(v->w1_rows) && in_scale_blocks(v->w2_rows)))
        return false;
    v->entries = v->cluster == 1 && entries <= HOPPER_ENTRIES ? HOPPER_ENTRIES : 0;
    v->stages = v->cluster == 1 ? HOPPER_STAGES : HOPPER_PASSED - 1;
    for (; v->stages >= 3; v->stages--)
        if (hopper_smem(v, c) <= target_smem(MOE_TARGET_SM_90A))
            return true;
    return false;
}

/* Weight rows of a tile, of `rows` that each of `hits` experts has. One token's experts are known: all
 * SMs are to be busy to the end, in waves of a tile each, which in fp8 is a power of two and has more
 * to do at its end. Else narrow tiles only where wide ones would be few. */
static int hopper_rows(double hits, int rows, bool known, bool fp8) {
    int best = 128;
    double least = 1e30;
    if (!known)
        return hits * rows < 2.0 * HOPPER_SMS * 128 ? 64 : 128;
    for (int bm = 128; bm >= (fp8 ? 64 : 32); bm = fp8 ? bm / 2 : bm - 16) {
        double items = hits * ((rows + bm - 1) / bm),
               time = ceil(items / HOPPER_SMS) * (bm + (fp8 ? 40 : 4));
        if (time < least) {
            least = time;
            best = bm;
        }
    }
    return best;
}

/* Slots of a rank that a batch of `tokens` over all ranks hits, all experts weighing the same. */
static double expected_hits(const struct moe_plan_class *c, int64_t tokens) {
    double miss = 1;
    for (int64_t t = 0; t < tokens && miss > 1e-9; t++)
        miss *= 1 - (double)c->topk / c->experts;
    return c->slots_per_rank * (1 - miss);
}

/* fp8: tiles of 256 weight rows know the scales of what they made, others leave that to a later pass
 * over the rows; but many small tiles keep all SMs busy for longer. */
static bool hopper_scales(double rows, double hits, int w1) {
    double items = hits * ((w1 + 255) / 256);
    return items >= 3.5 * HOPPER_SMS || (rows >= 8 && items >= HOPPER_SMS);
}

/* Few rows an expert: narrow tiles of tokens, weight tiles that suit the number of SMs. Many: wide ones
 * while all SMs have two, shared by two blocks once an expert fills several. */
static struct hopper_variant hopper_choose(const struct moe_plan_class *c, int tokens) {
    int64_t all = (int64_t)tokens * c->ranks;
    double rows = (double)all * c->topk / c->experts, hits = expected_hits(c, all);
    int w1 = c->activation == MOE_ACT_RELU2 ? c->inter : 2 * c->inter;
    struct hopper_variant v = {.tokens = rows <= 24 ? 64 : 128, .cluster = 1};
    if (rows > 24) {
        bool many = hits * ceil(rows / 128) * w1 / 256 >= 2 * HOPPER_SMS;
        v.w1_rows = v.w2_rows = many || moe_is_fp8(c) ? 256 : 128;
        v.cluster = rows >= 1024 && !moe_is_fp8(c) ? 2 : 1;
    } else if (moe_is_fp8(c) && all > 1 && hopper_scales(rows, hits, w1)) {
        v.w1_rows = v.w2_rows = 256;
    } else {
        v.w1_rows = hopper_rows(hits, w1, all == 1, moe_is_fp8(c));
        v.w2_rows = hopper_rows(hits, c->hidden, all == 1, moe_is_fp8(c));
    }
    return hopper_fill(&v, c, tokens) ? v : (struct hopper_variant){0};
}

void variant_choose(enum moe_target target, const struct moe_plan_class *c, int tokens,
                    struct variant_choice *out) {
    double slots = c->slots_per_rank > 0 ? c->slots_per_rank : 1;
    double entries = (double)tokens * c->topk;
    double hit = entries < slots ? entries : slots;
    bool fp8 = moe_is_fp8(c);
    out->gemm1 = out->gemm2 = gemm_choose(target, fp8, entries / slots, hit, c->inter);
    out->shared1 = out->shared2 = gemm_choose(target, fp8, tokens, 1, c->shared_inter);
    out->experts =
        hopper_serves(target, c) ? hopper_choose(c, tokens) : (struct hopper_variant){0};
    out->router = tokens <= 16 ? 0 : tokens <= 512 ? 1 : 2;
}

int variant_buckets(enum moe_target target, const struct moe_plan_class *c, int *tokens,
                    int max) {
    int n = 0;
    struct variant_choice last = {0}, next;
    for (int t = 1; n < max; t *= 2) {
        int bound = t < c->max_tokens ? t : c->max_tokens;
        variant_choose(target, c, bound, &next);
        bool same = n > 0 && last.router == next.router && last.gemm1 == next.gemm1 &&
                    last.shared1 == next.shared1 &&
                    !memcmp(&last.experts, &next.experts, sizeof last.experts) &&
                    slots_counted(c, tokens[n - 1]) == slots_counted(c, bound);
        if (same)
            n--;
        tokens[n++] = bound;
        last = next;
        if (bound == c->max_tokens)
            break;
    }
    tokens[n - 1] = c->max_tokens;
    return n;
}
