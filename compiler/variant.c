/* Tile shapes: which exist, what they need, and which one a batch of a given size gets. */
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

/* Two K slices of 32 of fp32 x and weights (templates/router.cuh). */
int router_smem(const struct router_variant *v) {
    return 2 * 32 * (v->tokens + v->experts) * 4;
}

/* Totals, running places and tile starts per slot (templates/slots.cuh). */
int slots_smem(int slots) {
    return 3 * (slots + 1) * 4;
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

void variant_choose(enum moe_target target, const struct moe_plan_class *c, int tokens,
                    struct variant_choice *out) {
    double slots = c->slots_per_rank > 0 ? c->slots_per_rank : 1;
    double entries = (double)tokens * c->topk;
    double hit = entries < slots ? entries : slots;
    bool fp8 = c->record_format == MOE_FORMAT_FP8_BLOCK;
    out->gemm1 = out->gemm2 = gemm_choose(target, fp8, entries / slots, hit, c->inter);
    out->shared1 = out->shared2 = gemm_choose(target, fp8, tokens, 1, c->shared_inter);
    out->router = tokens <= 16 ? 0 : tokens <= 512 ? 1 : 2;
}

int variant_buckets(enum moe_target target, const struct moe_plan_class *c, int *tokens,
                    int max) {
    int n = 0;
    struct variant_choice last = {0}, next;
    for (int t = 4; n < max; t *= 2) {
        int bound = t < c->max_tokens ? t : c->max_tokens;
        variant_choose(target, c, bound, &next);
        bool same = n > 0 && last.router == next.router && last.gemm1 == next.gemm1 &&
                    last.shared1 == next.shared1;
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
