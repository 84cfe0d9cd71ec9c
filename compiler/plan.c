/* Placement, layer classes, buffers, buckets and launch lists: from a deployment to the records of
 * plan.bin, and their two spellings, plan.bin and plan.yaml. */
#include <ctype.h>
#include <string.h>

#include "balance.h"
#include "policy.h"

enum {
    MAX_BUCKETS = 32,
    PART_ALIGN = 256,     /* parts of a slot record */
    BUFFER_MIN = 256,     /* bytes; no buffer is empty */
    SYNC_MIN = 4096,      /* bytes */
    SYNC_TOKENS = 8,      /* tokens per counter */
    CONVERT_ELEMENTS = 8, /* elements that a thread of moe_convert takes at a time */
    COMBINE_ELEMENTS = 8, /* of moe_combine */
    FILL_ELEMENTS = 8,    /* of moe_random */
    ARRIVE_THREADS = 128, /* of moe_arrive */
    PLACE_SMEM = 32 * 4,  /* of moe_place */
    FLAG_SMEM = 16,       /* of moe_receive and moe_return */
};

/* ---- growing arrays ---- */

static uint32_t capacity(uint32_t n) {
    uint32_t cap = 64;
    while (cap < n)
        cap *= 2;
    return cap;
}

static void *grow(struct arena *a, void *old, uint32_t *count, size_t stride, uint32_t n) {
    uint32_t cap = capacity(*count + n);
    if (!old || cap != capacity(*count)) {
        void *data = arena_alloc(a, cap * stride);
        if (*count)
            memcpy(data, old, *count * stride);
        old = data;
    }
    *count += n;
    return old;
}

/* Adds n zeroed records to an array of the plan and gives the first one's index. */
#define PUSH(p, SECTION, array, n) \
    ((p)->array = grow((p)->arena, (p)->array, &(p)->count[MOE_SECTION_##SECTION], \
                       sizeof *(p)->array, (uint32_t)(n)), \
     (int)((p)->count[MOE_SECTION_##SECTION] - (uint32_t)(n)))

uint32_t plan_intern(struct plan *p, const char *s) {
    uint32_t end = p->count[MOE_SECTION_STRINGS];
    for (uint32_t at = 0; at < end; at += (uint32_t)strlen(p->strings + at) + 1)
        if (!strcmp(p->strings + at, s))
            return at;
    int at = PUSH(p, STRINGS, strings, strlen(s) + 1);
    memcpy(p->strings + at, s, strlen(s) + 1);
    return (uint32_t)at;
}

const char *plan_string(const struct plan *p, uint32_t offset) {
    return p->strings + offset;
}

/* ---- placement ---- */

static void add_layer(struct plan *p, const struct placement *at, int i) {
    int total = at->ranks * at->slots_per_rank;
    int experts = PUSH(p, TABLE, tables, total), shares = PUSH(p, TABLE, tables, total);
    int index = PUSH(p, LAYER, layers, 1);
    memcpy(p->tables + experts, at->expert_of_slot + i * total,
           sizeof *p->tables * (size_t)total);
    balance_whole_shares(at->experts, total, at->expert_of_slot + i * total,
                         at->share_of_slot + i * total, MOE_SHARE_ONE, p->tables + shares);
    p->layers[index] = (struct moe_plan_layer){.layer = at->layers[i],
                                               .expert_of_slot = experts,
                                               .share_of_slot = shares,
                                               .imbalance = at->imbalance[i],
                                               .imbalance_even = at->imbalance_even[i],
                                               .bound = at->bound[i]};
}

static void add_ranks(struct plan *p, const struct balance_problem *limits) {
    int n = limits->capacity || limits->speed ? p->placement->ranks : 0;
    int first = PUSH(p, RANK, ranks, n);
    for (int r = 0; r < n; r++)
        p->ranks[first + r] = (struct moe_plan_rank){
            limits->speed ? limits->speed[r] : 1,
            limits->capacity ? limits->capacity[r] : p->placement->slots_per_rank, 0};
}

/* What binds whoever moves experts later. */
static void add_balance(struct plan *p) {
    const struct constraints *c = p->placement->constraints;
    const struct loads *l = p->dep->loads;
    int index = PUSH(p, BALANCE, balance, 1), n;
    struct balance_problem limits = {0};
    place_limits(p->dep, &limits);
    p->balance[index] =
        (struct moe_plan_balance){.dispatch = p->dep->dispatch,
                                  .layer_updates_per_iter = p->dep->layer_updates_per_iter,
                                  .move_budget = c ? c->move_budget : -1,
                                  .ranks_per_node = limits.ranks_per_node,
                                  .groups = limits.groups,
                                  .cross_node_slots = limits.cross_node_slots,
                                  .max_replicas = limits.max_replicas,
                                  .max_per_node = limits.max_per_node};
    add_ranks(p, &limits);
    n = l ? l->num_workloads : 0;
    int first = PUSH(p, WEIGHT, weights, n);
    for (int i = 0; i < n; i++)
        p->weights[first + i] =
            c && c->workload_weights ? c->workload_weights[i] : l->workloads[i].weight;
    n = c ? c->num_pins : 0;
    first = PUSH(p, PIN, pins, n);
    for (int i = 0; i < n; i++)
        p->pins[first + i] =
            (struct moe_plan_pin){c->pins[i].layer, c->pins[i].slot, c->pins[i].expert, 0};
    n = c ? c->num_forbidden : 0;
    first = PUSH(p, FORBIDDEN, forbidden, n);
    for (int i = 0; i < n; i++)
        p->forbidden[first + i] = (struct moe_plan_forbidden){
            c->forbidden[i].layer, c->forbidden[i].expert, c->forbidden[i].rank, 0};
}

static bool add_layers(struct plan *p, struct diags *d, int n_threads) {
    p->placement = place_layers(p->arena, d, p->dep, n_threads);
    if (!p->placement)
        return false;
    for (int i = 0; i < p->placement->num_layers; i++)
        add_layer(p, p->placement, i);
    add_balance(p);
    return true;
}

/* The most slots that any expert of any layer has. */
static int max_replicas(const struct plan *p, int experts, int total_slots) {
    int most = 0, *count = arena_array(p->arena, int, experts);
    for (uint32_t i = 0; i < p->count[MOE_SECTION_LAYER]; i++) {
        memset(count, 0, sizeof *count * (size_t)experts);
        for (int s = 0; s < total_slots; s++) {
            int e = p->tables[p->layers[i].expert_of_slot + s];
            if (e >= 0 && ++count[e] > most)
                most = count[e];
        }
    }
    return most;
}

/* ---- layer classes ---- */

static int64_t align_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

static int64_t div_up(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

/* Rows of w1 for an intermediate size: gated activations hold gate and up. */
static int w1_rows(const struct moe_plan_class *c, int inter) {
    return c->activation == MOE_ACT_RELU2 ? inter : 2 * inter;
}

/* Scales of an expert's w1, and of its w2: gate and up of blocks each, or up alone. */
static int64_t scale_blocks(const struct moe_plan_class *c, int inter) {
    return div_up(inter, MOE_SCALE_BLOCK) * div_up(c->hidden, MOE_SCALE_BLOCK);
}

/* The weights of a record (runtime/bundle.h) and their scales; gives where they end. */
static int64_t lay_out_weights(const struct moe_plan_class *c, int inter, int64_t *w2,
                               int64_t *s1, int64_t *s2) {
    int64_t width = moe_is_fp8(c) ? 1 : 2, rows = w1_rows(c, inter);
    *w2 = align_up(width * rows * c->hidden, PART_ALIGN);
    int64_t end = align_up(*w2 + width * c->hidden * inter, PART_ALIGN);
    if (!moe_is_fp8(c))
        return end;
    *s1 = end;
    *s2 = align_up(*s1 + 4 * rows / inter * scale_blocks(c, inter), PART_ALIGN);
    return align_up(*s2 + 4 * scale_blocks(c, inter), PART_ALIGN);
}

static void lay_out_record(struct moe_plan_class *c) {
    c->pack_version = moe_is_fp8(c) ? MOE_PACK_FP8_VERSION : MOE_PACK_VERSION;
    c->slot_bytes = lay_out_weights(c, c->inter, &c->w2_offset, &c->s1_offset, &c->s2_offset);
    if (c->has_bias) {
        c->b1_offset = c->slot_bytes;
        c->b2_offset = align_up(c->b1_offset + 4ll * w1_rows(c, c->inter), PART_ALIGN);
        c->slot_bytes = align_up(c->b2_offset + 4ll * c->hidden, PART_ALIGN);
    }
    if (c->shared_inter)
        c->shared_bytes = lay_out_weights(c, c->shared_inter, &c->shared_w2_offset,
                                          &c->shared_s1_offset, &c->shared_s2_offset);
}

static void fill_routing(struct plan *p, struct moe_plan_class *c, const struct model *m) {
    c->router = m->router.method;
    c->n_group = m->router.n_group;
    c->topk_group = m->router.topk_group;
    c->norm_topk_prob = m->router.norm_topk_prob;
    c->has_router_bias = m->router.bias;
    c->has_correction_bias = m->router.correction_bias;
    c->sigmoid = m->router.sigmoid;
    c->mask_zero = m->router.mask_zero;
    c->group_best = m->router.group_best;
    c->logits_bf16 = m->router.logits_bf16;
    c->scale = (float)m->router.routed_scaling_factor;
    c->jitter = (float)m->router.jitter;
    c->input_weight = m->router.method == MOE_ROUTER_LLAMA4;
    c->static_table = -1;
    if (m->router.method != MOE_ROUTER_STATIC)
        return;
    c->static_table = PUSH(p, TABLE, tables, m->num_experts_per_tok);
    for (int j = 0; j < m->num_experts_per_tok; j++)
        p->tables[c->static_table + j] = m->router.experts[j];
}

/* A model file gives all its MoE layers one shape, so there is one class. */
static void make_class(struct plan *p) {
    const struct deployment *dep = p->dep;
    const struct model *m = dep->model;
    int index = PUSH(p, CLASS, classes, 1);
    struct moe_plan_class *c = &p->classes[index];
    c->name = plan_intern(p, "class0");
    c->source = plan_intern(p, "class0.cu");
    c->hidden = m->hidden_size;
    c->inter = m->moe_intermediate_size;
    c->experts = m->num_experts;
    c->topk = m->num_experts_per_tok;
    c->ranks = dep->cluster->ranks;
    c->slots_per_rank = deployment_slots(dep);
    c->max_replicas = max_replicas(p, c->experts, c->ranks * c->slots_per_rank);
    c->max_tokens = (int)div_up(dep->max_num_tokens, c->ranks);
    fill_routing(p, c, m);
    c->activation = m->activation;
    c->act_alpha = (float)m->act_alpha;
    c->act_limit = (float)m->act_limit;
    c->has_bias = m->weights.bias;
    c->shared_inter = m->shared.intermediate_size;
    c->shared_gate = m->shared.gate;
    c->weights_format = m->weights.format;
    c->record_format = model_record_format(m);
    lay_out_record(c);
}

static void say_blocks(struct diags *d, const struct model *m) {
    if (m->weights.format == MOE_FORMAT_FP8_BLOCK && model_record_format(m) == MOE_FORMAT_BF16)
        diag_add(d, DIAG_WARNING, m->at.weights,
                 "weights: fp8 kernels have blocks of %d x %d; those of %d x %d are multiplied "
                 "out into bf16",
                 MOE_SCALE_BLOCK, MOE_SCALE_BLOCK, m->weights.block[0], m->weights.block[1]);
}

/* The other methods choose experts without logits. */
static bool has_router_gemm(const struct moe_plan_class *c) {
    return c->router != MOE_ROUTER_STATIC && c->router != MOE_ROUTER_BALANCED;
}

/* ---- launch lists ---- */

/* One bucket of one class on one target, while its launches are written. */
struct bucket {
    struct plan *plan;
    const struct moe_plan_class *c;
    enum moe_target target;
    int first_kernel; /* of this target and class */
    int tokens;
    struct variant_choice v;
};

/* moe_gemm1<3> -> moe_gemm1_3 */
static char *file_stem(struct arena *a, const char *expression) {
    char *stem = arena_strdup(a, expression);
    size_t n = 0;
    for (const char *s = expression; *s; s++)
        if (isalnum((unsigned char)*s) || *s == '_')
            stem[n++] = *s;
        else if (*s == '<' || *s == ',')
            stem[n++] = '_';
    stem[n] = 0;
    return stem;
}

/* Tokens of a tile of the grouped GEMMs. */
static int tile_tokens(const struct bucket *b) {
    const struct hopper_variant *v = &b->v.experts;
    return v->w1_rows ? v->tokens * v->cluster : gemm_variants[b->v.gemm1].bn;
}

/* The kernel of this target and class with this name, made when it is new. */
static int kernel_get(struct bucket *b, int block, int smem, const char *expression) {
    struct plan *p = b->plan;
    uint32_t name = plan_intern(p, expression);
    for (int i = b->first_kernel; i < (int)p->count[MOE_SECTION_KERNEL]; i++)
        if (p->kernels[i].expression == name)
            return i;
    int i = PUSH(p, KERNEL, kernels, 1);
    struct moe_plan_kernel *k = &p->kernels[i];
    k->expression = name;
    k->target = b->target;
    k->block = (uint32_t)block;
    k->smem = (uint32_t)smem;
    if (b->target != MOE_TARGET_HOST)
        k->file = plan_intern(
            p, arena_printf(p->arena, "%s/%s.%s.cubin", target_names[b->target],
                            plan_string(p, b->c->name), file_stem(p->arena, expression)));
    return i;
}

static struct moe_plan_launch *add_launch(struct bucket *b, enum moe_stage stage, int kernel,
                                          enum moe_grid grid, int p0, int p1, int p2) {
    int i = PUSH(b->plan, LAUNCH, launches, 1);
    struct moe_plan_launch *l = &b->plan->launches[i];
    *l = (struct moe_plan_launch){
        .kernel = kernel, .stage = stage, .grid = grid, .p = {p0, p1, p2}};
    return l;
}

/* Tiles of bn rows that `entries` rows spread over `slots` slots can make: a slot with rows adds
 * at most one that is not full. */
static int64_t tile_bound(int64_t entries, int bn, int slots) {
    return entries / bn + (slots < entries ? slots : entries);
}

/* A GEMM over `rows` weight rows and at most `tiles` tiles of tokens. */
static void add_gemm(struct bucket *b, enum moe_stage stage, const char *name, int variant,
                     int64_t tiles, int rows) {
    const struct gemm_variant *v = &gemm_variants[variant];
    const char *expression = arena_printf(b->plan->arena, "%s<%d>", name, v->id);
    int kernel = kernel_get(b, gemm_threads(v), gemm_smem(v), expression);
    int64_t items = tiles * div_up(rows, v->bm);
    add_launch(b, stage, kernel, MOE_GRID_PERSISTENT, 0,
               (int)(items < INT32_MAX ? items : INT32_MAX), 0);
}

static void add_route(struct bucket *b) {
    int direct = kernel_get(b, ROUTE_TOKENS * 32, 0, "moe_route<0>");
    if (!has_router_gemm(b->c)) {
        add_launch(b, MOE_STAGE_ROUTE, direct, MOE_GRID_TOKENS, ROUTE_TOKENS, 1, 1);
    } else {
        const struct router_variant *r = &router_variants[b->v.router];
        int kernel = kernel_get(b, ROUTER_THREADS, router_smem(r),
                                arena_printf(b->plan->arena, "moe_router<%d>", r->id));
        add_launch(b, MOE_STAGE_ROUTE, kernel, MOE_GRID_TOKENS, r->tokens,
                   (int)div_up(b->c->experts, r->experts), r->split);
    }
    add_launch(b, MOE_STAGE_ROUTE_LOGITS, direct, MOE_GRID_TOKENS, ROUTE_TOKENS, 1, 1);
}

/* A record's weights as a tensor of the pool or of the shared expert's memory. */
static void add_map(struct bucket *b, enum moe_map_base base, int64_t offset, int rows,
                    int columns, int box_rows) {
    const struct moe_plan_class *c = b->c;
    bool pool = base == MOE_MAP_POOL;
    int i = PUSH(b->plan, MAP, maps, 1);
    b->plan->maps[i] =
        (struct moe_plan_map){.base = base,
                              .columns = columns,
                              .rows = rows,
                              .slots = pool ? c->slots_per_rank : 1,
                              .box_rows = box_rows,
                              .element = moe_is_fp8(c) ? 1 : 2,
                              .offset = offset,
                              .slot_stride = pool ? c->slot_bytes : c->shared_bytes};
}

/* hopper_maps of a kernel of templates/hopper.cuh, by kind of work; a class without a shared expert
 * gives its routed weights' maps in that place, which nothing reads. */
static void add_hopper_maps(struct bucket *b, struct moe_plan_kernel *k) {
    const struct moe_plan_class *c = b->c;
    const struct hopper_variant *v = &b->v.experts;
    bool has = c->shared_inter;
    enum moe_map_base shared = has ? MOE_MAP_SHARED : MOE_MAP_POOL;
    int inter = has ? c->shared_inter : c->inter;
    int w1 = v->w1_rows / v->cluster, w2 = v->w2_rows / v->cluster;
    k->first_map = (int)b->plan->count[MOE_SECTION_MAP];
    k->num_maps = 4;
    add_map(b, shared, has ? c->shared_w1_offset : c->w1_offset, w1_rows(c, inter), c->hidden,
            w1);
    add_map(b, MOE_MAP_POOL, c->w1_offset, w1_rows(c, c->inter), c->hidden, w1);
    add_map(b, shared, has ? c->shared_w2_offset : c->w2_offset, c->hidden, inter, w2);
    add_map(b, MOE_MAP_POOL, c->w2_offset, c->hidden, c->inter, w2);
}

/* What a launch of the experts part works on. */
struct part {
    enum moe_stage stage;
    int64_t entries; /* that are sorted; 0: no routed expert */
    int shared;      /* tokens of the shared expert */
};

/* A launch of templates/hopper.cuh. */
static void add_hopper(struct bucket *b, const struct part *at) {
    const struct moe_plan_class *c = b->c;
    const struct hopper_variant *v = &b->v.experts;
    int64_t tiles = tile_bound(at->entries, tile_tokens(b), c->slots_per_rank);
    int64_t shared_tiles = div_up(at->shared, tile_tokens(b));
    int64_t items = tiles * div_up(w1_rows(c, c->inter), v->w1_rows) +
                    shared_tiles * div_up(w1_rows(c, c->shared_inter), v->w1_rows) +
                    (tiles + shared_tiles) * div_up(c->hidden, v->w2_rows);
    items *= v->cluster;
    uint32_t known = b->plan->count[MOE_SECTION_KERNEL];
    int kernel =
        kernel_get(b, HOPPER_THREADS, hopper_smem(v, c),
                   arena_printf(b->plan->arena, "moe_experts<%d,%d,%d,%d,%d,%d>", v->w1_rows,
                                v->w2_rows, v->tokens, v->stages, v->entries, v->cluster));
    if (b->plan->count[MOE_SECTION_KERNEL] > known) {
        add_hopper_maps(b, &b->plan->kernels[kernel]);
        b->plan->kernels[kernel].cluster = v->cluster;
    }
    add_launch(b, at->stage, kernel, MOE_GRID_PERSISTENT, 0,
               (int)(items < INT32_MAX ? items : INT32_MAX), 0)
        ->flags = MOE_LAUNCH_EARLY;
}

/* fp8: `rows` rows of so many columns become e4m3. */
static void add_quant(struct bucket *b, enum moe_stage stage, const char *kernel, int64_t rows,
                      int columns) {
    int64_t blocks = div_up(rows * div_up(columns, MOE_SCALE_BLOCK), ROW_THREADS / 32);
    if (moe_is_fp8(b->c) && blocks)
        add_launch(b, stage, kernel_get(b, ROW_THREADS, 0, kernel), MOE_GRID_PERSISTENT, 0,
                   (int)(blocks < INT32_MAX ? blocks : INT32_MAX), 0)
            ->flags = b->v.experts.w1_rows ? MOE_LAUNCH_EARLY : 0;
}

/* x as the experts take it: e4m3, or bf16, which it may be. */
static void add_x(struct bucket *b, enum moe_stage stage) {
    int64_t elements = (int64_t)b->tokens * b->c->hidden;
    add_quant(b, stage, "moe_quant<0>", b->tokens, b->c->hidden);
    if (!moe_is_fp8(b->c))
        add_launch(b, stage, kernel_get(b, ROW_THREADS, 0, "moe_convert<0>"),
                   MOE_GRID_PERSISTENT, 0,
                   (int)div_up(elements, ROW_THREADS * CONVERT_ELEMENTS), 0)
            ->condition = MOE_COND_IF_X_FP32;
}

static void add_routed_gemms(struct bucket *b, const struct part *at) {
    const struct moe_plan_class *c = b->c;
    int64_t tiles = tile_bound(at->entries, tile_tokens(b), c->slots_per_rank);
    add_gemm(b, at->stage, "moe_gemm1", b->v.gemm1, tiles, w1_rows(c, c->inter));
    add_quant(b, at->stage, "moe_quant<1>", at->entries, c->inter);
    add_gemm(b, at->stage, "moe_gemm2", b->v.gemm2, tiles, c->hidden);
}

static void add_shared_gemms(struct bucket *b, const struct part *at) {
    const struct moe_plan_class *c = b->c;
    add_gemm(b, at->stage, "moe_shared1", b->v.shared1,
             div_up(at->shared, gemm_variants[b->v.shared1].bn), w1_rows(c, c->shared_inter));
    add_quant(b, at->stage, "moe_quant<2>", at->shared, c->shared_inter);
    add_gemm(b, at->stage, "moe_shared2", b->v.shared2,
             div_up(at->shared, gemm_variants[b->v.shared2].bn), c->hidden);
}

static void add_experts(struct bucket *b, const struct part *at) {
    if (b->v.experts.w1_rows) {
        add_hopper(b, at);
        return;
    }
    if (at->entries)
        add_routed_gemms(b, at);
    if (at->shared)
        add_shared_gemms(b, at);
}

/* Where entries are many, their counts come first; where the experts' launch sorts, nothing. */
static void add_prepare(struct bucket *b) {
    int slots = b->c->slots_per_rank, flags = b->v.experts.w1_rows ? MOE_LAUNCH_EARLY : 0;
    bool counted = slots_counted(b->c, b->tokens);
    int threads = counted ? MOE_SLOTS_PART : SLOTS_THREADS;
    if (flags && b->v.experts.entries)
        return;
    if (counted)
        add_launch(b, MOE_STAGE_PREPARE, kernel_get(b, ROW_THREADS, 4 * slots, "moe_count<0>"),
                   MOE_GRID_ENTRIES, MOE_SLOTS_PART, 1, 1)
            ->flags = flags;
    add_launch(
        b, MOE_STAGE_PREPARE,
        kernel_get(b, threads, slots_smem(slots, threads),
                   arena_printf(b->plan->arena, "moe_slots<%d,%d>", tile_tokens(b), counted)),
        MOE_GRID_ENTRIES, threads, 1, 1)
        ->flags = flags;
}

static struct moe_plan_launch *add_combine(struct bucket *b, enum moe_stage stage) {
    return add_launch(b, stage, kernel_get(b, ROW_THREADS, 0, "moe_combine<0>"),
                      MOE_GRID_TOKENS, 1,
                      (int)div_up(b->c->hidden, ROW_THREADS * COMBINE_ELEMENTS), 1);
}

/* One rank. */
static void add_alone(struct bucket *b) {
    bool hopper = b->v.experts.w1_rows, alone = hopper && b->v.experts.entries;
    struct part all = {MOE_STAGE_EXPERTS, entries_received(b->c, b->tokens),
                       b->c->shared_inter ? b->tokens : 0};
    add_prepare(b);
    add_x(b, MOE_STAGE_EXPERTS);
    add_experts(b, &all);
    struct moe_plan_launch *combine = add_combine(b, MOE_STAGE_COMBINE);
    combine->condition = alone ? MOE_COND_ALONE : MOE_COND_ALWAYS;
    combine->flags = hopper && !alone ? MOE_LAUNCH_EARLY : 0;
}

/* A kernel of templates/exchange.cuh with its template argument, the enum's value being another. */
static int exchange_kernel(struct bucket *b, int threads, int smem, const char *name,
                           enum moe_exchange how) {
    static const int argument[] = {
        [MOE_EXCHANGE_ONESIDED] = 0, [MOE_EXCHANGE_ALLTOALL] = 1, [MOE_EXCHANGE_ALLGATHER] = 2};
    return kernel_get(b, threads, smem,
                      arena_printf(b->plan->arena, "%s<%d>", name, argument[how]));
}

/* From the routed tokens to peers' arenas and back, by stores or by collectives. */
static void add_exchange(struct bucket *b, enum moe_exchange how) {
    bool gather = how == MOE_EXCHANGE_ALLGATHER, stores = how == MOE_EXCHANGE_ONESIDED;
    const struct moe_plan_class *c = b->c;
    int64_t rows = (int64_t)b->tokens * c->ranks;
    struct part routed = {MOE_STAGE_EXPERTS, entries_received(c, b->tokens), 0};
    struct part shared = {MOE_STAGE_SHARED, 0, b->tokens};
    add_x(b, MOE_STAGE_DISPATCH_SEND);
    add_launch(b, MOE_STAGE_DISPATCH_SEND,
               kernel_get(b, SLOTS_THREADS, 4 * c->experts, "moe_target<0>"), MOE_GRID_ENTRIES,
               SLOTS_THREADS, 1, 1);
    add_launch(b, MOE_STAGE_DISPATCH_SEND,
               kernel_get(b, ROW_THREADS, PLACE_SMEM, "moe_place<0>"), MOE_GRID_FIXED, c->ranks,
               1, 1);
    add_launch(b, MOE_STAGE_DISPATCH_SEND,
               exchange_kernel(b, ROW_THREADS, (8 + 4) * c->topk + FLAG_SMEM, "moe_send", how),
               MOE_GRID_PERSISTENT, 0, b->tokens, 0);
    if (c->shared_inter)
        add_experts(b, &shared);
    add_launch(b, MOE_STAGE_DISPATCH_WAIT,
               exchange_kernel(b, ROW_THREADS, FLAG_SMEM, "moe_receive", how), MOE_GRID_FIXED,
               c->ranks, 1, 1)
        ->flags = stores   ? 0
                  : gather ? MOE_LAUNCH_GATHER
                           : MOE_LAUNCH_SWAP;
    if (gather)
        add_launch(b, MOE_STAGE_PREPARE, kernel_get(b, ROW_THREADS, 0, "moe_keep<0>"),
                   MOE_GRID_ENTRIES, ROW_THREADS, 1, 1);
    add_prepare(b);
    add_experts(b, &routed);
    add_launch(b, MOE_STAGE_COMBINE_SEND,
               exchange_kernel(b, ROW_THREADS, FLAG_SMEM, "moe_return", how),
               MOE_GRID_PERSISTENT, 0, (int)(rows < INT32_MAX ? rows : INT32_MAX), 0);
    add_launch(b, MOE_STAGE_COMBINE_WAIT, kernel_get(b, ARRIVE_THREADS, 0, "moe_arrive<0>"),
               MOE_GRID_FIXED, 1, 1, 1)
        ->flags = stores ? 0 : MOE_LAUNCH_BACK;
    add_combine(b, MOE_STAGE_COMBINE_WAIT);
}

static void add_launches(struct bucket *b, int32_t exchange) {
    add_route(b);
    if (exchange >= 0)
        add_exchange(b, (enum moe_exchange)exchange);
    else
        add_alone(b);
    add_launch(b, MOE_STAGE_FILL, kernel_get(b, ROW_THREADS, 0, "moe_random<0>"), MOE_GRID_FILL,
               ROW_THREADS * FILL_ELEMENTS, 1, 1);
}

/* What a bucket needs of the buffers whose size depends on its variants. */
struct needs {
    int64_t logits, tiles, counters;
};

static void add_needs(const struct bucket *b, struct needs *n) {
    const struct moe_plan_class *c = b->c;
    int64_t split = has_router_gemm(c) ? router_variants[b->v.router].split : 0;
    int64_t logits = split * b->tokens * c->experts * 4;
    int64_t tiles =
        tile_bound(entries_received(c, b->tokens), tile_tokens(b), c->slots_per_rank);
    int64_t counters = 3 + tiles + div_up(b->tokens, tile_tokens(b));
    n->counters = counters > n->counters ? counters : n->counters;
    n->logits = logits > n->logits ? logits : n->logits;
    n->tiles = tiles > n->tiles ? tiles : n->tiles;
}

/* The built-in choice, changed where the policy has an opinion; it must fit the target. */
static bool choose_variant(const struct plan *p, struct diags *d, const struct bucket *b,
                           struct variant_choice *v) {
    static const int smem[] = {
#define X(name, spelling, bytes) bytes,
        MOE_TARGETS(X)
#undef X
    };
    struct policy *y = p->placement->policy;
    const struct deployment *dep = p->dep;
    variant_choose(b->target, b->c, b->tokens, v);
    if (!y || !y->defines[HOOK_variant])
        return true;
    struct policy_world w = {dep->model,           dep->cluster,      dep->loads,
                             b->c->slots_per_rank, place_usable(dep), &dep->limits};
    if (!policy_variant(y, p->arena, d, &w, b->target, b->tokens, v))
        return false;
    struct loc at = {y->source, y->line[HOOK_variant], 1};
    if (v->experts.w1_rows && !hopper_serves(b->target, b->c)) {
        diag_error(d, at,
                   "variant: %s has no launch of the whole experts part (experts = false)",
                   target_names[b->target]);
        return false;
    }
    if (v->experts.w1_rows && !hopper_fill(&v->experts, b->c, b->tokens)) {
        diag_error(
            d, at,
            "variant: experts: three stages of such tiles do not fit in %d bytes, or fp8 "
            "tiles are not in blocks of scales (16, 32, 64, 128 or 256 rows)",
            smem[b->target]);
        return false;
    }
    int gemm[] = {v->gemm1, v->gemm2, v->shared1, v->shared2};
    for (int i = 0; i < 4; i++) {
        int bytes = gemm_smem(&gemm_variants[gemm[i]]);
        struct loc loc = {y->source, y->line[HOOK_variant], 1};
        if (bytes <= smem[b->target])
            continue;
        diag_error(d, loc,
                   "variant: GEMM variant %d needs %d bytes of shared memory; %s has %d",
                   gemm[i], bytes, target_names[b->target], smem[b->target]);
        return false;
    }
    return true;
}

/* What the placement costs on paper; n 0: there is no exchange, or the cluster's figures are not
 * known. */
struct paper {
    struct cost_setup base, *setups;
    int n;
};

static void make_paper(struct plan *p, struct paper *out) {
    const struct placement *at = p->placement;
    size_t total = (size_t)at->ranks * (size_t)at->slots_per_rank;
    const int **experts = arena_array(p->arena, const int *, at->num_layers);
    const double **shares = arena_array(p->arena, const double *, at->num_layers);
    cost_setup(&out->base, p->dep);
    out->n = 0;
    if (at->ranks == 1 || cost_lacks(&out->base))
        return;
    for (int i = 0; i < at->num_layers; i++) {
        experts[i] = at->expert_of_slot + (size_t)i * total;
        shares[i] = at->share_of_slot + (size_t)i * total;
    }
    struct cost_placement c = {at->num_layers, at->ranks, at->slots_per_rank, at->layers,
                               experts,        shares,    p->dep->dispatch,   p->dep->loads};
    out->n = cost_placed(p->arena, &out->base, &c, &out->setups);
}

/* The policy's choice, which must be possible, else the cheapest, else by reach alone. Tokens are
 * all that it depends on, so all ranks agree. */
static bool choose_exchange(struct plan *p, struct diags *d, const struct paper *paper,
                            int tokens, int32_t *out) {
    const struct cluster *k = p->dep->cluster;
    struct policy *y = p->placement->policy;
    bool reach = k->nvlink_domain >= k->ranks;
    struct cost cost;
    *out = -1;
    if (k->ranks == 1)
        return true;
    if (y && y->defines[HOOK_exchange]) {
        struct loc loc = {y->source, y->line[HOOK_exchange], 1};
        struct policy_world w = {p->dep->model,        k,
                                 p->dep->loads,        p->placement->slots_per_rank,
                                 place_usable(p->dep), &p->dep->limits};
        *out = policy_exchange(y, p->arena, d, &w, tokens);
        if (*out == MOE_EXCHANGE_ONESIDED && !reach)
            diag_error(d, loc,
                       "exchange: onesided reaches %d ranks, the NVLink domain; there are %d",
                       k->nvlink_domain, k->ranks);
        return *out >= 0 && (*out != MOE_EXCHANGE_ONESIDED || reach);
    }
    *out = reach ? MOE_EXCHANGE_ONESIDED : MOE_EXCHANGE_ALLTOALL;
    if (!paper->n)
        return true;
    cost_layers(paper->setups, paper->n, tokens, &cost);
    *out = cost.exchange;
    return true;
}

static bool add_target(struct plan *p, struct diags *d, int class_index, enum moe_target target,
                       const struct paper *paper, struct needs *needs) {
    const struct moe_plan_class *c = &p->classes[class_index];
    int tokens[MAX_BUCKETS], n = variant_buckets(target, c, tokens, MAX_BUCKETS);
    int index = PUSH(p, TARGET, targets, 1), first = PUSH(p, BUCKET, buckets, n);
    struct variant_choice *variants = arena_array(p->arena, struct variant_choice, first + n);
    if (first)
        memcpy(variants, p->variants, sizeof *variants * (size_t)first);
    p->variants = variants;
    p->targets[index] = (struct moe_plan_target){target, class_index, first, n};
    struct bucket b = {p, c, target, (int)p->count[MOE_SECTION_KERNEL], 0, {0}};
    for (int i = 0; i < n; i++) {
        int launch = (int)p->count[MOE_SECTION_LAUNCH];
        int32_t exchange;
        b.tokens = tokens[i];
        if (!choose_variant(p, d, &b, &b.v) ||
            !choose_exchange(p, d, paper, tokens[i], &exchange))
            return false;
        variants[first + i] = b.v;
        add_launches(&b, exchange);
        if (exchange > MOE_EXCHANGE_ONESIDED)
            p->classes[class_index].collective = 1;
        add_needs(&b, needs);
        p->buckets[first + i] = (struct moe_plan_bucket){
            tokens[i], launch, (int)p->count[MOE_SECTION_LAUNCH] - launch, exchange};
    }
    return true;
}

void plan_variants(const struct plan *p, int class_index, bool *gemm, bool *router) {
    const struct moe_plan_class *c = &p->classes[class_index];
    memset(gemm, 0, sizeof *gemm * (size_t)num_gemm_variants);
    memset(router, 0, sizeof *router * (size_t)num_router_variants);
    for (uint32_t t = 0; t < p->count[MOE_SECTION_TARGET]; t++)
        for (int b = 0; b < p->targets[t].num_buckets; b++) {
            const struct variant_choice *v = &p->variants[p->targets[t].first_bucket + b];
            if (!v->experts.w1_rows)
                gemm[v->gemm1] = gemm[v->gemm2] = true;
            if (c->shared_inter && !v->experts.w1_rows)
                gemm[v->shared1] = gemm[v->shared2] = true;
            if (has_router_gemm(c))
                router[v->router] = true;
        }
}

/* ---- buffers ---- */

static int64_t buffer_bytes(const struct moe_plan_class *c, const struct needs *n,
                            enum moe_ws_id ws) {
    int64_t t = c->max_tokens, entries = t * c->topk, sync = 4 * div_up(t, SYNC_TOKENS);
    int64_t rows = entries_received(c, t);
    int64_t fp8 = moe_is_fp8(c), hidden = fp8 ? 4 : 2; /* bytes of a hidden activation */
    switch (ws) {
    case MOE_WS_LOGITS:
        return n->logits;
    case MOE_WS_SYNC:
        return sync > SYNC_MIN ? sync : SYNC_MIN;
    case MOE_WS_OFFSETS:
        return 4ll * (c->slots_per_rank + 2);
    case MOE_WS_TILES:
        return (int64_t)sizeof(struct moe_tile) * (1 + n->tiles);
    case MOE_WS_ROW_ENTRY:
    case MOE_WS_ROW_OF:
        return 4 * rows;
    case MOE_WS_X16:
        return fp8 ? 0 : 2 * t * c->hidden;
    case MOE_WS_HID:
        return hidden * rows * c->inter;
    case MOE_WS_Y:
        return 2 * rows * c->hidden;
    case MOE_WS_SHID:
        return hidden * t * c->shared_inter;
    case MOE_WS_SY:
        return c->shared_inter ? 2 * t * c->hidden : 0;
    case MOE_WS_X8:
        return fp8 * t * c->hidden;
    case MOE_WS_XS:
        return fp8 * 4 * t * div_up(c->hidden, MOE_SCALE_BLOCK);
    case MOE_WS_HID8:
        return fp8 * rows * c->inter;
    case MOE_WS_HIDS:
        return fp8 * 4 * rows * div_up(c->inter, MOE_SCALE_BLOCK);
    case MOE_WS_SHID8:
        return fp8 * t * c->shared_inter;
    case MOE_WS_SHIDS:
        return fp8 * 4 * t * div_up(c->shared_inter, MOE_SCALE_BLOCK);
    case MOE_WS_QUEUE:
        return 4 * n->counters;
    case MOE_WS_COUNTS:
        return 4 * div_up(rows, MOE_SLOTS_PART) * c->slots_per_rank;
    case MOE_WS_TARGET:
    case MOE_WS_PLACE:
    case MOE_WS_SENT:
        return c->ranks > 1 ? 4 * entries : 0;
    case MOE_WS_TOKENS_TO:
        return c->ranks > 1 ? 4ll * c->ranks : 0;
    case MOE_WS_COUNT:
        break;
    }
    return 0;
}

static void make_buffers(struct plan *p, int class_index, const struct needs *n) {
    int first = PUSH(p, BUFFER, buffers, MOE_WS_COUNT);
    struct moe_plan_class *c = &p->classes[class_index];
    c->first_buffer = first;
    c->num_buffers = MOE_WS_COUNT;
    for (int ws = 0; ws < MOE_WS_COUNT; ws++) {
        int64_t bytes = buffer_bytes(c, n, ws);
        p->buffers[first + ws] =
            (struct moe_plan_buffer){ws, ws == MOE_WS_SYNC || ws == MOE_WS_QUEUE,
                                     align_up(bytes > BUFFER_MIN ? bytes : BUFFER_MIN, 256)};
    }
}

/* ---- all of it ---- */

static const char *size_text(struct arena *a, double bytes) {
    double unit = bytes >= 1e9 ? 1e9 : bytes >= 1e6 ? 1e6 : 1e3;
    return arena_printf(a, "%.1f %s", bytes / unit,
                        unit == 1e9   ? "GB"
                        : unit == 1e6 ? "MB"
                                      : "kB");
}

/* What one rank needs and has, in bytes. */
struct rank_memory {
    double layers, slots, record, shared, router, work, has;
};

static double weights_of(const struct rank_memory *m) {
    return m->layers * (m->slots * m->record + m->shared + m->router);
}

static void say_memory(const struct plan *p, struct diags *d, const struct rank_memory *m,
                       int rank) {
    const struct cluster *k = p->dep->cluster;
    struct arena *a = p->arena;
    struct loc loc = k->rank_memory_gb ? k->rank_memory_loc
                     : k->loc.source   ? k->loc
                                       : p->dep->model->loc;
    bool alike = !k->rank_memory_gb && !k->rank_slots;
    double weights = weights_of(m);
    double fit = ((m->has - m->work) / m->layers - m->shared - m->router) / m->record;
    const char *who = alike ? "a rank" : arena_printf(a, "rank %d", rank);
    const char *with_shared =
        m->shared > 0 ? arena_printf(a, "%s of shared expert + ", size_text(a, m->shared)) : "";
    diag_error(d, loc,
               "%s needs %s, but has %s: %.0f layers x (%.0f slots x %s + %s%s of router) = "
               "%s, and %s of workspace for %d tokens",
               who, size_text(a, weights + m->work), size_text(a, m->has), m->layers, m->slots,
               size_text(a, m->record), with_shared, size_text(a, m->router),
               size_text(a, weights), size_text(a, m->work), p->classes[0].max_tokens);
    diag_add(d, DIAG_NOTE, loc,
             "more ranks, fewer slots (num_slots is %d) or a smaller max_num_tokens (%d over "
             "all ranks) need less",
             p->classes[0].ranks * p->classes[0].slots_per_rank, p->dep->max_num_tokens);
    if (!alike && fit >= 0)
        diag_add(d, DIAG_NOTE, k->rank_slots ? k->rank_slots_loc : loc,
                 "rank_slots of %d would fit rank %d", (int)fit, rank);
}

/* Everything that a rank holds for all its layers, against its memory. */
static bool check_memory(const struct plan *p, struct diags *d) {
    const struct cluster *k = p->dep->cluster;
    const struct moe_plan_class *c = &p->classes[0];
    struct rank_memory m = {.layers = p->count[MOE_SECTION_LAYER],
                            .record = (double)c->slot_bytes,
                            .shared = (double)c->shared_bytes,
                            .router = 4.0 * c->experts * c->hidden};
    for (int i = 0; i < c->num_buffers; i++)
        m.work += (double)p->buffers[c->first_buffer + i].bytes;
    struct moe_peers ignored;
    if (c->ranks > 1)
        m.work += (double)moe_arena_layout(c, &ignored);
    for (int r = 0; r < k->ranks; r++) {
        m.slots = k->rank_slots ? k->rank_slots[r] : c->slots_per_rank;
        m.has = (k->rank_memory_gb ? k->rank_memory_gb[r] : k->memory_gb) * 1e9;
        if (m.has == 0 || weights_of(&m) + m.work <= m.has)
            continue;
        say_memory(p, d, &m, r);
        return false;
    }
    return true;
}

struct plan *plan_make(struct arena *a, struct diags *d, const struct deployment *dep,
                       int n_threads) {
    struct plan *p = arena_alloc(a, sizeof *p);
    struct needs needs = {0};
    struct paper paper;
    p->arena = a;
    p->dep = dep;
    plan_intern(p, "");
    if (!add_layers(p, d, n_threads))
        return NULL;
    make_class(p);
    say_blocks(d, dep->model);
    make_paper(p, &paper);
    for (int t = 0; t < MOE_TARGET_COUNT; t++)
        if (dep->targets[t] && !add_target(p, d, 0, t, &paper, &needs))
            return NULL;
    make_buffers(p, 0, &needs);
    return check_memory(p, d) ? p : NULL;
}

/* ---- plan.bin ---- */

static void add_section(struct buf *out, size_t header, enum moe_section s, const void *data,
                        uint32_t count, size_t stride) {
    static const char zeros[8];
    struct moe_plan_section section = {count, (uint32_t)stride, out->len};
    memcpy(out->data + header + offsetof(struct moe_plan_header, sections) +
               (size_t)s * sizeof section,
           &section, sizeof section);
    buf_add(out, data, count * stride);
    buf_add(out, zeros, (8 - out->len % 8) % 8);
}

void plan_binary(const struct plan *p, struct buf *out) {
    struct moe_plan_header h = {.version = MOE_PLAN_VERSION,
                                .header_bytes = sizeof h,
                                .args_id = MOE_ARGS_ID,
                                .args_version = MOE_ARGS_VERSION,
                                .args_bytes = sizeof(struct moe_args),
                                .num_sections = MOE_SECTION_COUNT};
    const void *data[] = {p->classes, p->layers,    p->tables,   p->targets, p->kernels,
                          p->buffers, p->buckets,   p->launches, p->strings, p->balance,
                          p->pins,    p->forbidden, p->weights,  p->ranks,   p->maps};
    static const size_t stride[] = {
#define X(name, type) sizeof(type),
        MOE_SECTIONS(X)
#undef X
    };
    memcpy(h.magic, MOE_PLAN_MAGIC, sizeof h.magic);
    buf_add(out, &h, sizeof h);
    for (int s = 0; s < MOE_SECTION_COUNT; s++)
        add_section(out, 0, s, data[s], p->count[s], stride[s]);
    uint64_t total = out->len;
    memcpy(out->data + offsetof(struct moe_plan_header, total_bytes), &total, sizeof total);
}

/* ---- plan.yaml ---- */

static const char *const ws_names[] = {
#define X(name, what) #name,
    MOE_WS(X)
#undef X
};
static const char *const grid_names[] = {
#define X(name) #name,
    MOE_GRIDS(X)
#undef X
};
static const char *const condition_names[] = {
#define X(name) #name,
    MOE_CONDITIONS(X)
#undef X
};

static const char *yes_no(int v) {
    return v ? "true" : "false";
}

static void yaml_pins(const struct plan *p, struct buf *out) {
    uint32_t pins = p->count[MOE_SECTION_PIN], forbidden = p->count[MOE_SECTION_FORBIDDEN];
    buf_printf(out, "pins:%s\n", pins ? "" : " []");
    for (uint32_t i = 0; i < pins; i++)
        buf_printf(out, "- {layer: %d, slot: %d, expert: %d}\n", p->pins[i].layer,
                   p->pins[i].slot, p->pins[i].expert);
    buf_printf(out, "forbidden:%s\n", forbidden ? "" : " []");
    for (uint32_t i = 0; i < forbidden; i++)
        buf_printf(out, "- {layer: %d, expert: %d, rank: %d}\n", p->forbidden[i].layer,
                   p->forbidden[i].expert, p->forbidden[i].rank);
}

/* What the placement was made for, and what binds who changes it. */
static void yaml_balance(const struct plan *p, struct buf *out) {
    const struct loads *l = p->dep->loads;
    int n = l ? l->num_workloads : 0, budget = p->balance->move_budget;
    buf_printf(out, "workloads:%s\n", n ? "" : " [] # all experts weigh the same");
    for (int i = 0; i < n; i++) {
        buf_printf(out, "- {name: ");
        buf_json_string(out, l->workloads[i].name);
        buf_printf(out, ", weight: %.9g}\n", p->weights[i]);
    }
    if (budget < 0)
        buf_printf(out, "move_budget: null\n");
    else
        buf_printf(out, "move_budget: %d # slots a layer that one update may change\n", budget);
    yaml_pins(p, out);
}

static void yaml_doubles(struct buf *out, const char *key, const double *x, int n) {
    for (int i = 0; x && i < n; i++)
        buf_printf(out, "%s%.9g%s", i ? ", " : arena_printf(out->arena, "  %s: [", key), x[i],
                   i == n - 1 ? "]\n" : "");
}

/* What ranks do not have in common. */
static void yaml_ranks(const struct cluster *k, struct buf *out) {
    yaml_doubles(out, "rank_speed", k->rank_speed, k->ranks);
    yaml_doubles(out, "rank_memory_gb", k->rank_memory_gb, k->ranks);
    for (int i = 0; k->rank_slots && i < k->ranks; i++)
        buf_printf(out, "%s%d%s", i ? ", " : "  rank_slots: [", k->rank_slots[i],
                   i == k->ranks - 1 ? "]\n" : "");
}

static void yaml_limits(const struct placement_limits *l, struct buf *out) {
    buf_printf(out, "placement: # 0: no limit\n  keep_groups_in_nodes: %s\n",
               yes_no(l->keep_groups_in_nodes));
    buf_printf(out, "  cross_node_slots: %d\n  max_replicas: %d\n", l->cross_node_slots,
               l->max_replicas);
    buf_printf(out, "  max_replicas_per_node: %d\n", l->max_replicas_per_node);
}

static void yaml_deployment(const struct plan *p, struct buf *out) {
    const struct deployment *dep = p->dep;
    const struct cluster *k = dep->cluster;
    buf_printf(out, "# What moec decided. plan.bin says the same to the runtime.\n");
    buf_printf(out, "moec: %s\nmodel: ", MOEC_VERSION);
    buf_json_string(out, dep->model->name);
    buf_printf(out, "\ncluster:\n  gpu: ");
    if (k->gpu)
        buf_json_string(out, k->gpu);
    else
        buf_printf(out, "null");
    buf_printf(out, "\n  ranks: %d\n  ranks_per_node: %d\n  nvlink_domain: %d\n", k->ranks,
               k->ranks_per_node, k->nvlink_domain);
    yaml_ranks(k, out);
    buf_printf(out, "max_num_tokens: %d # over all ranks\n", dep->max_num_tokens);
    buf_printf(out, "policy: ");
    buf_json_string(out, dep->policy);
    buf_printf(out, "\ndispatch: %s\nlayer_updates_per_iter: %d\n",
               dispatch_names[dep->dispatch], dep->layer_updates_per_iter);
    yaml_limits(&dep->limits, out);
    yaml_balance(p, out);
    buf_printf(out, "deterministic_combine: %s\n", yes_no(dep->deterministic_combine));
}

static void yaml_routing(const struct plan *p, const struct moe_plan_class *c,
                         struct buf *out) {
    buf_printf(out, "    router:\n      method: %s\n      scoring: %s\n",
               router_names[c->router], c->sigmoid ? "sigmoid" : "softmax");
    buf_printf(out, "      n_group: %d\n      topk_group: %d\n      norm_topk_prob: %s\n",
               c->n_group, c->topk_group, yes_no(c->norm_topk_prob));
    buf_printf(out, "      bias: %s\n      correction_bias: %s\n      masked_groups: %s\n",
               yes_no(c->has_router_bias), yes_no(c->has_correction_bias),
               c->mask_zero ? "zero" : "-inf");
    buf_printf(out, "      group_score: %s\n", c->group_best ? "best" : "best_two");
    buf_printf(out, "      logits_dtype: %s\n      routed_scaling_factor: %.9g\n",
               c->logits_bf16 ? "bfloat16" : "float32", c->scale);
    buf_printf(out, "      jitter_eps: %.9g\n      weight_on_input: %s\n", c->jitter,
               yes_no(c->input_weight));
    if (c->static_table < 0)
        return;
    buf_printf(out, "      experts: [");
    for (int j = 0; j < c->topk; j++)
        buf_printf(out, "%s%d", j ? ", " : "", p->tables[c->static_table + j]);
    buf_printf(out, "]\n");
}

static void yaml_record(const struct moe_plan_class *c, struct buf *out) {
    buf_printf(out, "    record: # bytes, pack version %d\n", c->pack_version);
    buf_printf(out, "      slot: %lld\n      w1: %lld\n      w2: %lld\n",
               (long long)c->slot_bytes, (long long)c->w1_offset, (long long)c->w2_offset);
    if (moe_is_fp8(c))
        buf_printf(out, "      s1: %lld\n      s2: %lld\n", (long long)c->s1_offset,
                   (long long)c->s2_offset);
    if (c->has_bias)
        buf_printf(out, "      b1: %lld\n      b2: %lld\n", (long long)c->b1_offset,
                   (long long)c->b2_offset);
    if (c->shared_inter)
        buf_printf(out, "      shared: %lld\n      shared_w1: %lld\n      shared_w2: %lld\n",
                   (long long)c->shared_bytes, (long long)c->shared_w1_offset,
                   (long long)c->shared_w2_offset);
    if (c->shared_inter && moe_is_fp8(c))
        buf_printf(out, "      shared_s1: %lld\n      shared_s2: %lld\n",
                   (long long)c->shared_s1_offset, (long long)c->shared_s2_offset);
}

/* The kernels' template arguments are these ids. */
static void yaml_variants(const struct plan *p, int class_index, struct buf *out) {
    bool *gemm = arena_array(p->arena, bool, num_gemm_variants);
    bool *router = arena_array(p->arena, bool, num_router_variants);
    plan_variants(p, class_index, gemm, router);
    buf_printf(out, "    gemm_variants:\n");
    for (int i = 0; i < num_gemm_variants; i++) {
        const struct gemm_variant *v = &gemm_variants[i];
        if (gemm[i])
            buf_printf(out,
                       "      %d: {bm: %d, bn: %d, bk: %d, warps_m: %d, warps_n: %d, "
                       "stages: %d}\n",
                       v->id, v->bm, v->bn,
                       v->bk * (moe_is_fp8(&p->classes[class_index]) ? 2 : 1), v->warps_m,
                       v->warps_n, v->stages);
    }
    buf_printf(out, "    router_variants:\n");
    for (int i = 0; i < num_router_variants; i++) {
        const struct router_variant *v = &router_variants[i];
        if (router[i])
            buf_printf(out, "      %d: {tokens: %d, experts: %d, split: %d}\n", v->id,
                       v->tokens, v->experts, v->split);
    }
}

static void yaml_class(const struct plan *p, int class_index, struct buf *out) {
    const struct moe_plan_class *c = &p->classes[class_index];
    buf_printf(out, "  %s:\n    source: %s\n", plan_string(p, c->name),
               plan_string(p, c->source));
    buf_printf(out, "    hidden: %d\n    inter: %d\n    experts: %d\n    topk: %d\n", c->hidden,
               c->inter, c->experts, c->topk);
    buf_printf(out, "    ranks: %d\n    slots_per_rank: %d\n    max_replicas: %d\n", c->ranks,
               c->slots_per_rank, c->max_replicas);
    buf_printf(out, "    max_tokens: %d # of one rank in one pass\n", c->max_tokens);
    yaml_routing(p, c, out);
    buf_printf(out, "    activation: %s\n    act_alpha: %.9g\n    act_limit: %.9g\n",
               activation_names[c->activation], c->act_alpha, c->act_limit);
    buf_printf(out, "    bias: %s\n    shared_inter: %d\n    shared_gate: %s\n",
               yes_no(c->has_bias), c->shared_inter, yes_no(c->shared_gate));
    buf_printf(out, "    weights: {checkpoint: %s, packed: %s}\n",
               format_names[c->weights_format], format_names[c->record_format]);
    yaml_record(c, out);
    buf_printf(out, "    workspace: # bytes\n");
    for (int i = 0; i < c->num_buffers; i++) {
        const struct moe_plan_buffer *b = &p->buffers[c->first_buffer + i];
        buf_printf(out, "      %s: %lld\n", ws_names[b->ws], (long long)b->bytes);
    }
    yaml_variants(p, class_index, out);
}

static void yaml_bucket(const struct plan *p, const struct moe_plan_bucket *b,
                        struct buf *out) {
    buf_printf(out, "    - max_tokens: %d\n      exchange: %s\n      launches:\n",
               b->max_tokens, b->exchange < 0 ? "null" : exchange_names[b->exchange]);
    for (int i = 0; i < b->num_launches; i++) {
        const struct moe_plan_launch *l = &p->launches[b->first_launch + i];
        buf_printf(out, "      - {stage: %s, kernel: \"%s\", grid: %s, p: [%d, %d, %d]",
                   stage_names[l->stage], plan_string(p, p->kernels[l->kernel].expression),
                   grid_names[l->grid], l->p[0], l->p[1], l->p[2]);
        if (l->condition)
            buf_printf(out, ", when: %s", condition_names[l->condition]);
        if (l->flags & MOE_LAUNCH_EARLY)
            buf_printf(out, ", early: true");
        if (l->flags & MOE_LAUNCH_COLLECTIVE)
            buf_printf(out, ", then: %s",
                       l->flags & MOE_LAUNCH_GATHER ? "gather"
                       : l->flags & MOE_LAUNCH_SWAP ? "swap"
                                                    : "back");
        buf_printf(out, "}\n");
    }
}

static void yaml_kernel(const struct plan *p, const struct moe_plan_kernel *k,
                        struct buf *out) {
    static const char *const bases[] = {
#define X(name) #name,
        MOE_MAP_BASES(X)
#undef X
    };
    buf_printf(out, "    \"%s\": {block: %u, smem: %u", plan_string(p, k->expression), k->block,
               k->smem);
    if (k->cluster > 1)
        buf_printf(out, ", cluster: %d", k->cluster);
    for (int i = 0; i < k->num_maps; i++) {
        const struct moe_plan_map *m = &p->maps[k->first_map + i];
        buf_printf(out, "%s{base: %s, offset: %lld, tensor: [%d, %d, %d], box_rows: %d}%s",
                   i ? ", " : ",\n      maps: [", bases[m->base], (long long)m->offset,
                   m->slots, m->rows, m->columns, m->box_rows, i == k->num_maps - 1 ? "]" : "");
    }
    buf_printf(out, "}\n");
}

static void yaml_target(const struct plan *p, const struct moe_plan_target *t,
                        struct buf *out) {
    buf_printf(out, "- target: %s\n  class: %s\n  kernels:\n", target_names[t->target],
               plan_string(p, p->classes[t->class_index].name));
    for (uint32_t i = 0; i < p->count[MOE_SECTION_KERNEL]; i++) {
        const struct moe_plan_kernel *k = &p->kernels[i];
        if (k->target == t->target)
            yaml_kernel(p, k, out);
    }
    buf_printf(out, "  buckets:\n");
    for (int i = 0; i < t->num_buckets; i++)
        yaml_bucket(p, &p->buckets[t->first_bucket + i], out);
}

/* One line per rank; an expert that is in one slot has the share 1. */
static void yaml_table(const struct moe_plan_class *c, const char *key, const int32_t *table,
                       double one, struct buf *out) {
    buf_printf(out, "    %s: [\n", key);
    for (int r = 0; r < c->ranks; r++) {
        buf_printf(out, "     ");
        for (int s = 0; s < c->slots_per_rank; s++)
            buf_printf(out, " %.6g,", table[r * c->slots_per_rank + s] / one);
        buf_printf(out, " # rank %d\n", r);
    }
    buf_printf(out, "    ]\n");
}

static void yaml_layer(const struct plan *p, const struct moe_plan_layer *l, struct buf *out) {
    const struct moe_plan_class *c = &p->classes[l->class_index];
    buf_printf(out,
               "  %d:\n    class: %s\n    imbalance: %.6f\n    imbalance_even: %.6f\n    "
               "bound: %.6f\n",
               l->layer, plan_string(p, c->name), l->imbalance, l->imbalance_even, l->bound);
    yaml_table(c, "expert_of_slot", p->tables + l->expert_of_slot, 1, out);
    if (c->max_replicas > 1)
        yaml_table(c, "share_of_slot", p->tables + l->share_of_slot, MOE_SHARE_ONE, out);
}

void plan_yaml(const struct plan *p, struct buf *out) {
    yaml_deployment(p, out);
    buf_printf(out, "classes:\n");
    for (uint32_t i = 0; i < p->count[MOE_SECTION_CLASS]; i++)
        yaml_class(p, (int)i, out);
    buf_printf(out, "targets:\n");
    for (uint32_t i = 0; i < p->count[MOE_SECTION_TARGET]; i++)
        yaml_target(p, &p->targets[i], out);
    buf_printf(out, "layers:\n");
    for (uint32_t i = 0; i < p->count[MOE_SECTION_LAYER]; i++)
        yaml_layer(p, &p->layers[i], out);
}
