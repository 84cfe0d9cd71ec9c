/* The launch path: chunks, buckets, grids. Neither allocates nor synchronises. */
#include "internal.h"

#include <string.h>

enum { HOST_PERSISTENT = 4, MAX_GRID = 65535 };
#define STAGE(name) (1u << MOE_STAGE_##name)
/* Stages that work on what a rank received. */
#define RECEIVED (STAGE(PREPARE) | STAGE(EXPERTS) | STAGE(COMBINE_SEND))
/* Stages that read x, and those that write out. */
#define READS \
    (STAGE(PREPARE) | STAGE(EXPERTS) | STAGE(COMBINE) | STAGE(DISPATCH_SEND) | STAGE(SHARED) | \
     STAGE(COMBINE_WAIT))
#define WRITES (STAGE(COMBINE) | STAGE(COMBINE_WAIT))

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int persistent_blocks(const moert_context *c, const struct rt_kernel *k,
                             const int32_t *p) {
    int resident = p[0] && p[0] < k->resident ? p[0] : k->resident;
    int blocks = c->info.target == MOE_TARGET_HOST ? HOST_PERSISTENT : c->info.sms * resident;
    return p[1] && p[1] < blocks ? p[1] : blocks;
}

static void set_grid(const moert_layer *l, const struct moe_plan_launch *p,
                     const struct moe_args *a, struct rt_launch *out) {
    int64_t x = 0;
    out->grid[1] = (unsigned)p->p[1];
    out->grid[2] = (unsigned)p->p[2];
    switch ((enum moe_grid)p->grid) {
    case MOE_GRID_FIXED:
        x = p->p[0];
        break;
    case MOE_GRID_TOKENS:
        x = ceil_div(a->num_tokens, p->p[0]);
        break;
    case MOE_GRID_ENTRIES:
        x = ceil_div((int64_t)a->num_tokens * l->c->topk, p->p[0]);
        break;
    case MOE_GRID_PERSISTENT:
        x = persistent_blocks(l->context, out->kernel, p->p);
        out->grid[1] = out->grid[2] = 1;
        break;
    case MOE_GRID_FILL:
        x = ceil_div(a->fill_count, p->p[0]);
        x = x < MAX_GRID ? x : MAX_GRID;
        out->grid[1] = out->grid[2] = 1;
        break;
    case MOE_GRID_COUNT:
        break;
    }
    out->grid[0] = (unsigned)(out->cluster > 1 ? x - x % out->cluster : x);
}

static moert_result launch(const moert_layer *l, const struct moe_plan_launch *p,
                           const struct moe_args *a, moert_stream s) {
    const moert_context *c = l->context;
    const struct moe_plan_kernel *k = &c->bundle->kernels[p->kernel];
    struct rt_launch x = {.kernel = &c->kernels[p->kernel],
                          .expression = rt_string(c->bundle, k->expression),
                          .block = k->block,
                          .smem = k->smem,
                          .cluster = (unsigned)k->cluster,
                          .early = p->flags & MOE_LAUNCH_EARLY,
                          .maps = k->num_maps ? (char *)l->maps + k->first_map * RT_MAP_BYTES
                                              : NULL};
    if ((p->condition == MOE_COND_IF_X_FP32 && !(a->flags & MOE_X_FP32)) ||
        (p->condition == MOE_COND_ALONE && a->flags & MOE_COMBINE))
        return MOERT_OK;
    set_grid(l, p, a, &x);
    if (!x.grid[0]) /* no tokens here, while other ranks have some */
        return MOERT_OK;
    RT_TRY(c->ops->launch(c->device, &x, a, s));
    return p->flags & MOE_LAUNCH_COLLECTIVE ? rt_world_collect(l, &a->exchange, p->flags, s)
                                            : MOERT_OK;
}

/* The first bucket that holds so many tokens. */
static const struct moe_plan_bucket *choose_bucket(const moert_layer *l, int tokens) {
    const struct moe_plan_bucket *u = l->context->bundle->buckets + l->target->first_bucket;
    while (u->max_tokens < tokens)
        u++;
    return u;
}

/* Several ranks: the arguments as a stage sees them. What was received are the tokens of some; the
 * last one's rows are the results that came back, in the order of the entries. */
static void stage_args(const moert_layer *l, int exchange, int stage, struct moe_args *a) {
    const struct moe_peers *x = &a->exchange;
    char *arena = (char *)l->context->arena;
    if (RECEIVED >> stage & 1) {
        a->x16 = a->ws[MOE_WS_X8] = arena + x->hidden;
        a->ws[MOE_WS_XS] = arena + x->scales;
        a->topk_idx = (int *)(arena + x->ids);
        a->topk_weight = (float *)(arena + x->weights);
        a->num_tokens = x->ranks * x->stride;
        a->flags = (a->flags & ~MOE_X_FP32) | MOE_ROUTED;
    } else if (stage == MOE_STAGE_SHARED) {
        a->flags |= MOE_SHARED;
    } else if (stage == MOE_STAGE_COMBINE_WAIT) {
        a->ws[MOE_WS_ROW_OF] = a->ws[MOE_WS_SENT];
        a->ws[MOE_WS_Y] = arena + (exchange == MOE_EXCHANGE_ONESIDED ? x->results : x->sums);
        a->flags |= exchange == MOE_EXCHANGE_ONESIDED ? 0 : MOE_SUMMED;
    }
}

/* The bucket depends on the tokens of the rank that has the most in this chunk. */
static moert_result run_chunk(const moert_layer *l, const struct moe_args *a, unsigned stages,
                              moert_stream s) {
    const struct moe_plan_bucket *u = choose_bucket(l, a->exchange.stride);
    const struct moe_plan_launch *p = l->context->bundle->launches + u->first_launch;
    for (int i = 0; i < u->num_launches; i++) {
        struct moe_args view = *a;
        if (!(stages >> p[i].stage & 1))
            continue;
        if (l->context->world)
            stage_args(l, u->exchange, p[i].stage, &view);
        RT_TRY(launch(l, &p[i], &view, s));
    }
    return MOERT_OK;
}

/* ---- arguments ---- */

static const void *advance(const void *p, int64_t elements, int bytes) {
    return p ? (const char *)p + elements * bytes : NULL;
}

static int dtype_bytes(moert_dtype d) {
    return d == MOERT_FP32 ? 4 : 2;
}

/* first: the chunk's first token. */
static void chunk_args(const moert_layer *l, const moert_io *io, int first, int tokens,
                       struct moe_args *a) {
    int64_t h = first * (int64_t)l->c->hidden, k = first * (int64_t)l->c->topk;
    int64_t e = first * (int64_t)l->c->experts;
    *a = l->args;
    a->x = advance(io->x, h, dtype_bytes(io->x_dtype));
    a->x16 = io->x_dtype == MOERT_BF16 ? a->x : a->ws[MOE_WS_X16];
    a->out = (void *)advance(io->out, h, dtype_bytes(io->out_dtype));
    a->logits_in = advance(io->logits, e, dtype_bytes(io->logits_dtype));
    a->topk_idx = io->topk_idx ? io->topk_idx + k : NULL;
    a->topk_weight = io->topk_weight ? io->topk_weight + k : NULL;
    a->num_tokens = tokens;
    a->flags = (io->x_dtype == MOERT_FP32 ? MOE_X_FP32 : 0) |
               (io->out_dtype == MOERT_FP32 ? MOE_OUT_FP32 : 0) |
               (l->router_fp32 ? MOE_ROUTER_FP32 : 0) |
               (io->logits && io->logits_dtype == MOERT_BF16 ? MOE_LOGITS_BF16 : 0);
}

static moert_result check_pointer(const char *name, const void *p, unsigned align) {
    if (!p)
        return rt_fail(MOERT_INVALID, "moert_io: %s is NULL", name);
    if ((uintptr_t)p % align)
        return rt_fail(MOERT_INVALID, "moert_io: %s is not aligned to %u bytes", name, align);
    return MOERT_OK;
}

static bool is_dtype(moert_dtype d) {
    return d == MOERT_FP32 || d == MOERT_BF16;
}

static moert_result check_io(const moert_layer *l, const moert_io *io, unsigned stages) {
    bool route_alone = !(stages & READS);
    if (!l->loaded)
        return rt_fail(MOERT_INVALID, "layer %d has no weights yet", l->layer);
    if (io->num_tokens < 0)
        return rt_fail(MOERT_INVALID, "moert_io: num_tokens is %d", io->num_tokens);
    if (!is_dtype(io->x_dtype) || !is_dtype(io->out_dtype) || !is_dtype(io->logits_dtype))
        return rt_fail(MOERT_INVALID, "moert_io: no such dtype");
    if (!io->num_tokens)
        return MOERT_OK;
    if (!route_alone || !io->logits)
        RT_TRY(check_pointer("x", io->x, 16));
    if (stages & WRITES)
        RT_TRY(check_pointer("out", io->out, 16));
    RT_TRY(check_pointer("topk_idx", io->topk_idx, 4));
    RT_TRY(check_pointer("topk_weight", io->topk_weight, 4));
    return io->logits
               ? check_pointer("logits", io->logits, (unsigned)dtype_bytes(io->logits_dtype))
               : MOERT_OK;
}

/* Every rank's count is the caller's to know. */
static moert_result check_counts(const moert_layer *l, const moert_io *io) {
    if (!l->context->world)
        return MOERT_OK;
    if (!l->context->world->connected)
        return rt_fail(MOERT_INVALID, "moert_world_connect comes before the first forward");
    if (!io->rank_tokens)
        return rt_fail(MOERT_INVALID, "moert_io: rank_tokens is NULL: with several ranks every "
                                      "rank's number of tokens is needed");
    if (!rt_world_lives(l->context->world, l->context->rank))
        return rt_fail(MOERT_PEER, "rank %d is left out", l->context->rank);
    for (int r = 0; r < l->c->ranks; r++) {
        if (io->rank_tokens[r] && !rt_world_lives(l->context->world, r))
            return rt_fail(MOERT_INVALID,
                           "moert_io: rank_tokens[%d] is %d, but rank %d is left out", r,
                           io->rank_tokens[r], r);
        if (io->rank_tokens[r] < 0)
            return rt_fail(MOERT_INVALID, "moert_io: rank_tokens[%d] is %d", r,
                           io->rank_tokens[r]);
    }
    if (io->rank_tokens[l->context->rank] != io->num_tokens)
        return rt_fail(MOERT_INVALID,
                       "moert_io: num_tokens is %d, rank_tokens[%d], of this rank, is %d",
                       io->num_tokens, l->context->rank, io->rank_tokens[l->context->rank]);
    return MOERT_OK;
}

/* ---- forward and its steps ---- */

/* Where chunk i of `chunks` even ones begins in a batch. */
static int chunk_begin(int64_t tokens, int64_t i, int64_t chunks) {
    return (int)(tokens * i / chunks);
}

/* The most tokens that a rank has. */
static int most_tokens(const moert_layer *l, const moert_io *io) {
    int most = io->num_tokens;
    for (int r = 0; l->context->world && r < l->c->ranks; r++)
        most = io->rank_tokens[r] > most ? io->rank_tokens[r] : most;
    return most;
}

static int64_t chunks_of(const moert_layer *l, const moert_io *io) {
    return ceil_div(most_tokens(l, io), l->c->max_tokens);
}

/* The most tokens that a rank has in a chunk. */
static int most_in_chunk(const moert_layer *l, const moert_io *io, int64_t i, int64_t chunks) {
    const int *tokens = l->context->world ? io->rank_tokens : &io->num_tokens;
    int most = 0;
    for (int r = 0; r < l->c->ranks; r++) {
        int n = chunk_begin(tokens[r], i + 1, chunks) - chunk_begin(tokens[r], i, chunks);
        most = n > most ? n : most;
    }
    return most;
}

moert_result rt_io(const moert_layer *l, const moert_io *given, unsigned *stages, moert_io *out,
                   int64_t *chunks) {
    *out = (moert_io)MOERT_IO_INIT;
    if (!l)
        return rt_fail(MOERT_INVALID, "the layer must be given");
    RT_TRY(rt_config(out, sizeof *out, given, "moert_io"));
    if (*stages & STAGE(ROUTE) && out->logits)
        *stages ^= STAGE(ROUTE) | STAGE(ROUTE_LOGITS);
    RT_TRY(check_io(l, out, *stages));
    RT_TRY(check_counts(l, out));
    RT_TRY(rt_world_fault(l->context));
    *chunks = chunks_of(l, out);
    return MOERT_OK;
}

moert_result rt_forward_chunk(moert_layer *l, const moert_io *io, int64_t i, unsigned stages,
                              moert_stream s) {
    struct moe_args a;
    const moert_context *c = l->context;
    int64_t chunks = chunks_of(l, io);
    int first = chunk_begin(io->num_tokens, i, chunks);
    chunk_args(l, io, first, chunk_begin(io->num_tokens, i + 1, chunks) - first, &a);
    a.exchange.stride = most_in_chunk(l, io, i, chunks);
    if (!c->world && stages & STAGE(EXPERTS) && stages & STAGE(COMBINE))
        a.flags |= MOE_COMBINE;
    RT_TRY(c->ops->enter(c->device));
    moert_result r = run_chunk(l, &a, stages, s);
    c->ops->leave(c->device);
    return r == MOERT_OK ? rt_world_fault(c) : r;
}

moert_result rt_forward(moert_layer *l, const moert_io *given, unsigned stages,
                        moert_stream s) {
    moert_io io;
    int64_t chunks;
    RT_TRY(rt_io(l, given, &stages, &io, &chunks));
    for (int64_t i = 0; i < chunks; i++)
        RT_TRY(rt_forward_chunk(l, &io, i, stages, s));
    return MOERT_OK;
}

/* A step alone leaves its results in the workspace for the next: there is one chunk. */
static moert_result step(moert_layer *l, const moert_io *given, unsigned stages,
                         moert_stream s) {
    moert_io io;
    int64_t chunks;
    RT_TRY(rt_io(l, given, &stages, &io, &chunks));
    if (chunks > 1)
        return rt_fail(MOERT_INVALID,
                       "%d tokens of a rank in one step: at most %d (moert_forward splits)",
                       most_tokens(l, &io), l->c->max_tokens);
    return chunks ? rt_forward_chunk(l, &io, 0, stages, s) : MOERT_OK;
}

/* All but FILL and the choice from given logits. */
#define FORWARD (((1u << MOE_STAGE_COUNT) - 1) & ~(STAGE(FILL) | STAGE(ROUTE_LOGITS)))

moert_result moert_forward(moert_layer *l, const moert_io *io, moert_stream s) {
    return rt_forward(l, io, FORWARD, s);
}

moert_result moert_route(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(ROUTE), s);
}

moert_result moert_dispatch_send(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(DISPATCH_SEND), s);
}

moert_result moert_dispatch_wait(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(DISPATCH_WAIT), s);
}

moert_result moert_experts(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(PREPARE) | STAGE(EXPERTS) | STAGE(SHARED), s);
}

moert_result moert_combine_send(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(COMBINE_SEND), s);
}

moert_result moert_combine_wait(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(COMBINE_WAIT) | STAGE(COMBINE), s);
}

moert_result moert_experts_combine(moert_layer *l, const moert_io *io, moert_stream s) {
    return rt_forward(l, io, FORWARD & ~STAGE(ROUTE), s);
}

moert_result moert_combine(moert_layer *l, const moert_io *io, moert_stream s) {
    return step(l, io, STAGE(COMBINE_SEND) | STAGE(COMBINE_WAIT) | STAGE(COMBINE), s);
}

moert_result moert_tool_stage(moert_layer *l, const moert_io *io, enum moe_stage stage,
                              moert_stream s) {
    if ((int)stage < 0 || stage >= MOE_STAGE_COUNT || stage == MOE_STAGE_FILL)
        return rt_fail(MOERT_INVALID, "stage %d cannot run alone", (int)stage);
    return step(l, io, 1u << stage, s);
}

moert_result rt_fill(moert_layer *l, void *p, int64_t count, enum moe_fill kind, float scale,
                     uint64_t seed) {
    const moert_bundle *b = l->context->bundle;
    struct moe_args a = {
        .seed = seed, .fill = p, .fill_count = count, .fill_scale = scale, .fill_kind = kind};
    for (int i = 0; i < l->target->num_buckets; i++) {
        const struct moe_plan_bucket *u = &b->buckets[l->target->first_bucket + i];
        for (int j = 0; j < u->num_launches; j++)
            if (b->launches[u->first_launch + j].stage == MOE_STAGE_FILL)
                return launch(l, &b->launches[u->first_launch + j], &a, NULL);
    }
    return rt_fail(MOERT_UNSUPPORTED, "layer %d: the bundle has no kernel for random weights",
                   l->layer);
}
