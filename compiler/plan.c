/* Placement, layer classes, buffers, buckets and launch lists: from a deployment to the records of
 * plan.bin, and their two spellings, plan.bin and plan.yaml. */
#include <ctype.h>
#include <string.h>

#include "moec.h"

enum {
    MAX_BUCKETS = 32,
    PART_ALIGN = 256,     /* parts of a slot record */
    BUFFER_MIN = 256,     /* bytes; no buffer is empty */
    SYNC_MIN = 4096,      /* bytes */
    SYNC_TOKENS = 8,      /* tokens per counter */
    CONVERT_ELEMENTS = 8, /* elements that a thread of moe_convert takes at a time */
    COMBINE_ELEMENTS = 8, /* of moe_combine */
    FILL_ELEMENTS = 8,    /* of moe_random */
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

static int slots_per_rank(const struct deployment *dep) {
    int ranks = dep->cluster->ranks;
    int slots = dep->num_slots ? dep->num_slots : dep->model->num_experts;
    return (slots + ranks - 1) / ranks;
}

static const struct assignment *assignment_of(const struct deployment *dep, int layer) {
    for (int i = 0; i < dep->num_assignments; i++)
        if (dep->assignments[i].layer == layer)
            return &dep->assignments[i];
    return NULL;
}

/* All experts weigh the same. Without num_slots: experts in order, empty slots last. With it: in
 * order and again from expert 0; policy trtllm starts rank r at expert r*E/ranks, as upstream's
 * default assignment does. Either way every expert has a slot and a rank holds none twice. */
static void place_default(const struct deployment *dep, int slots, int32_t *out) {
    int experts = dep->model->num_experts, ranks = dep->cluster->ranks;
    bool upstream = dep->num_slots && !strcmp(dep->policy, "trtllm");
    for (int r = 0; r < ranks; r++)
        for (int s = 0; s < slots; s++) {
            int first = upstream ? (int)((long long)r * experts / ranks) : r * slots;
            bool empty = !dep->num_slots && first + s >= experts;
            out[r * slots + s] = empty ? -1 : (first + s) % experts;
        }
}

static void add_layers(struct plan *p) {
    const struct deployment *dep = p->dep;
    const struct model *m = dep->model;
    int slots = slots_per_rank(dep), total = slots * dep->cluster->ranks;
    for (int i = 0; i < m->num_moe_layers; i++) {
        const struct assignment *given = assignment_of(dep, m->moe_layers[i]);
        int table = PUSH(p, TABLE, tables, total);
        if (given)
            for (int s = 0; s < total; s++)
                p->tables[table + s] = given->expert_of_slot[s];
        else
            place_default(dep, slots, p->tables + table);
        int layer = PUSH(p, LAYER, layers, 1);
        p->layers[layer].layer = m->moe_layers[i];
        p->layers[layer].expert_of_slot = table;
    }
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

/* Pack version 1 (runtime/bundle.h). */
static void lay_out_record(struct moe_plan_class *c) {
    int64_t w1 = 2ll * w1_rows(c, c->inter) * c->hidden, w2 = 2ll * c->hidden * c->inter;
    c->pack_version = MOE_PACK_VERSION;
    c->w2_offset = align_up(w1, PART_ALIGN);
    c->slot_bytes = align_up(c->w2_offset + w2, PART_ALIGN);
    if (c->has_bias) {
        c->b1_offset = c->slot_bytes;
        c->b2_offset = align_up(c->b1_offset + 4ll * w1_rows(c, c->inter), PART_ALIGN);
        c->slot_bytes = align_up(c->b2_offset + 4ll * c->hidden, PART_ALIGN);
    }
    if (c->shared_inter) {
        w1 = 2ll * w1_rows(c, c->shared_inter) * c->hidden;
        w2 = 2ll * c->hidden * c->shared_inter;
        c->shared_w2_offset = align_up(w1, PART_ALIGN);
        c->shared_bytes = align_up(c->shared_w2_offset + w2, PART_ALIGN);
    }
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
    c->slots_per_rank = slots_per_rank(dep);
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
    lay_out_record(c);
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
        else if (*s == '<')
            stem[n++] = '_';
    stem[n] = 0;
    return stem;
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
static void add_gemm(struct bucket *b, const char *name, int variant, int64_t tiles, int rows) {
    const struct gemm_variant *v = &gemm_variants[variant];
    const char *expression = arena_printf(b->plan->arena, "%s<%d>", name, v->id);
    int kernel = kernel_get(b, gemm_threads(v), gemm_smem(v), expression);
    int64_t items = tiles * div_up(rows, v->bm);
    add_launch(b, MOE_STAGE_EXPERTS, kernel, MOE_GRID_PERSISTENT, 0,
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

static void add_experts(struct bucket *b) {
    const struct moe_plan_class *c = b->c;
    int64_t elements = (int64_t)b->tokens * c->hidden;
    int64_t tiles = tile_bound((int64_t)b->tokens * c->topk, gemm_variants[b->v.gemm1].bn,
                               c->slots_per_rank);
    struct moe_plan_launch *convert = add_launch(
        b, MOE_STAGE_EXPERTS, kernel_get(b, ROW_THREADS, 0, "moe_convert<0>"),
        MOE_GRID_PERSISTENT, 0, (int)div_up(elements, ROW_THREADS * CONVERT_ELEMENTS), 0);
    convert->condition = MOE_COND_IF_X_FP32;
    add_gemm(b, "moe_gemm1", b->v.gemm1, tiles, w1_rows(c, c->inter));
    add_gemm(b, "moe_gemm2", b->v.gemm2, tiles, c->hidden);
    if (!c->shared_inter)
        return;
    add_gemm(b, "moe_shared1", b->v.shared1, div_up(b->tokens, gemm_variants[b->v.shared1].bn),
             w1_rows(c, c->shared_inter));
    add_gemm(b, "moe_shared2", b->v.shared2, div_up(b->tokens, gemm_variants[b->v.shared2].bn),
             c->hidden);
}

static void add_launches(struct bucket *b) {
    int bn = gemm_variants[b->v.gemm1].bn;
    add_route(b);
    add_launch(b, MOE_STAGE_PREPARE,
               kernel_get(b, SLOTS_THREADS, slots_smem(b->c->slots_per_rank),
                          arena_printf(b->plan->arena, "moe_slots<%d>", bn)),
               MOE_GRID_ENTRIES, SLOTS_THREADS, 1, 1);
    add_experts(b);
    add_launch(b, MOE_STAGE_COMBINE, kernel_get(b, ROW_THREADS, 0, "moe_combine<0>"),
               MOE_GRID_TOKENS, 1, (int)div_up(b->c->hidden, ROW_THREADS * COMBINE_ELEMENTS),
               1);
    add_launch(b, MOE_STAGE_FILL, kernel_get(b, ROW_THREADS, 0, "moe_random<0>"), MOE_GRID_FILL,
               ROW_THREADS * FILL_ELEMENTS, 1, 1);
}

/* What a bucket needs of the buffers whose size depends on its variants. */
struct needs {
    int64_t logits, tiles;
};

static void add_needs(const struct bucket *b, struct needs *n) {
    const struct moe_plan_class *c = b->c;
    int64_t split = has_router_gemm(c) ? router_variants[b->v.router].split : 0;
    int64_t logits = split * b->tokens * c->experts * 4;
    int64_t tiles = tile_bound((int64_t)b->tokens * c->topk, gemm_variants[b->v.gemm1].bn,
                               c->slots_per_rank);
    n->logits = logits > n->logits ? logits : n->logits;
    n->tiles = tiles > n->tiles ? tiles : n->tiles;
}

static void add_target(struct plan *p, int class_index, enum moe_target target,
                       struct needs *needs) {
    const struct moe_plan_class *c = &p->classes[class_index];
    int tokens[MAX_BUCKETS], n = variant_buckets(target, c, tokens, MAX_BUCKETS);
    int index = PUSH(p, TARGET, targets, 1), first = PUSH(p, BUCKET, buckets, n);
    p->targets[index] = (struct moe_plan_target){target, class_index, first, n};
    struct bucket b = {p, c, target, (int)p->count[MOE_SECTION_KERNEL], 0, {0}};
    for (int i = 0; i < n; i++) {
        int launch = (int)p->count[MOE_SECTION_LAUNCH];
        b.tokens = tokens[i];
        variant_choose(target, c, tokens[i], &b.v);
        add_launches(&b);
        add_needs(&b, needs);
        p->buckets[first + i] = (struct moe_plan_bucket){
            tokens[i], launch, (int)p->count[MOE_SECTION_LAUNCH] - launch, 0};
    }
}

void plan_variants(const struct plan *p, int class_index, bool *gemm, bool *router) {
    const struct moe_plan_class *c = &p->classes[class_index];
    memset(gemm, 0, sizeof *gemm * (size_t)num_gemm_variants);
    memset(router, 0, sizeof *router * (size_t)num_router_variants);
    for (uint32_t t = 0; t < p->count[MOE_SECTION_TARGET]; t++)
        for (int b = 0; b < p->targets[t].num_buckets; b++) {
            struct variant_choice v;
            variant_choose(p->targets[t].target, c,
                           p->buckets[p->targets[t].first_bucket + b].max_tokens, &v);
            gemm[v.gemm1] = gemm[v.gemm2] = true;
            if (c->shared_inter)
                gemm[v.shared1] = gemm[v.shared2] = true;
            if (has_router_gemm(c))
                router[v.router] = true;
        }
}

/* ---- buffers ---- */

static int64_t buffer_bytes(const struct moe_plan_class *c, const struct needs *n,
                            enum moe_ws_id ws) {
    int64_t t = c->max_tokens, entries = t * c->topk, sync = 4 * div_up(t, SYNC_TOKENS);
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
        return 4 * entries;
    case MOE_WS_X16:
        return 2 * t * c->hidden;
    case MOE_WS_HID:
        return 2 * entries * c->inter;
    case MOE_WS_Y:
        return 2 * entries * c->hidden;
    case MOE_WS_SHID:
        return 2 * t * c->shared_inter;
    case MOE_WS_SY:
        return c->shared_inter ? 2 * t * c->hidden : 0;
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
        p->buffers[first + ws] = (struct moe_plan_buffer){
            ws, ws == MOE_WS_SYNC, align_up(bytes > BUFFER_MIN ? bytes : BUFFER_MIN, 256)};
    }
}

/* ---- all of it ---- */

struct plan *plan_make(struct arena *a, const struct deployment *dep) {
    struct plan *p = arena_alloc(a, sizeof *p);
    struct needs needs = {0};
    p->arena = a;
    p->dep = dep;
    plan_intern(p, "");
    add_layers(p);
    make_class(p);
    for (int t = 0; t < MOE_TARGET_COUNT; t++)
        if (dep->targets[t])
            add_target(p, 0, t, &needs);
    make_buffers(p, 0, &needs);
    return p;
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
    const void *data[] = {p->classes, p->layers,  p->tables,   p->targets, p->kernels,
                          p->buffers, p->buckets, p->launches, p->strings};
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
    buf_printf(out, "max_num_tokens: %d # over all ranks\n", dep->max_num_tokens);
    buf_printf(out, "policy: %s\ndispatch: %s\nlayer_updates_per_iter: %d\n", dep->policy,
               dispatch_names[dep->dispatch], dep->layer_updates_per_iter);
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
    if (c->has_bias)
        buf_printf(out, "      b1: %lld\n      b2: %lld\n", (long long)c->b1_offset,
                   (long long)c->b2_offset);
    if (c->shared_inter)
        buf_printf(out, "      shared: %lld\n      shared_w1: %lld\n      shared_w2: %lld\n",
                   (long long)c->shared_bytes, (long long)c->shared_w1_offset,
                   (long long)c->shared_w2_offset);
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
                       v->id, v->bm, v->bn, v->bk, v->warps_m, v->warps_n, v->stages);
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
    buf_printf(out, "    weights: {checkpoint: %s, packed: bf16}\n",
               format_names[c->weights_format]);
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
    buf_printf(out, "    - max_tokens: %d\n      launches:\n", b->max_tokens);
    for (int i = 0; i < b->num_launches; i++) {
        const struct moe_plan_launch *l = &p->launches[b->first_launch + i];
        buf_printf(out, "      - {stage: %s, kernel: \"%s\", grid: %s, p: [%d, %d, %d]",
                   stage_names[l->stage], plan_string(p, p->kernels[l->kernel].expression),
                   grid_names[l->grid], l->p[0], l->p[1], l->p[2]);
        if (l->condition)
            buf_printf(out, ", when: %s", condition_names[l->condition]);
        buf_printf(out, "}\n");
    }
}

static void yaml_target(const struct plan *p, const struct moe_plan_target *t,
                        struct buf *out) {
    buf_printf(out, "- target: %s\n  class: %s\n  kernels:\n", target_names[t->target],
               plan_string(p, p->classes[t->class_index].name));
    for (uint32_t i = 0; i < p->count[MOE_SECTION_KERNEL]; i++) {
        const struct moe_plan_kernel *k = &p->kernels[i];
        if (k->target == t->target)
            buf_printf(out, "    \"%s\": {block: %u, smem: %u}\n",
                       plan_string(p, k->expression), k->block, k->smem);
    }
    buf_printf(out, "  buckets:\n");
    for (int i = 0; i < t->num_buckets; i++)
        yaml_bucket(p, &p->buckets[t->first_bucket + i], out);
}

/* One line per rank. */
static void yaml_layer(const struct plan *p, const struct moe_plan_layer *l, struct buf *out) {
    const struct moe_plan_class *c = &p->classes[l->class_index];
    buf_printf(out, "  %d:\n    class: %s\n    expert_of_slot: [\n", l->layer,
               plan_string(p, c->name));
    for (int r = 0; r < c->ranks; r++) {
        const int32_t *slot = p->tables + l->expert_of_slot + r * c->slots_per_rank;
        buf_printf(out, "     ");
        for (int s = 0; s < c->slots_per_rank; s++)
            buf_printf(out, " %d,", slot[s]);
        buf_printf(out, " # rank %d\n", r);
    }
    buf_printf(out, "    ]\n");
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
