/* One layer on a device: one allocation, filled from a checkpoint, from pointers or at random. */
#include "internal.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_THREADS = 8 };
static const int64_t small = (int64_t)64 << 20; /* bytes that one thread packs soon enough */

static moert_result upload(moert_layer *l, int64_t offset, const void *src, int64_t bytes) {
    const moert_context *c = l->context;
    return c->ops->upload(c->device, l->memory + offset, src, (size_t)bytes);
}

/* ---- create, destroy ---- */

static void set_exchange(moert_layer *l) {
    const moert_context *c = l->context;
    struct moe_peers *x = &l->args.exchange;
    int *replicas = (int *)(l->memory + l->parts.replicas);
    moe_arena_layout(l->c, x);
    x->peer = (char *const *)c->peers;
    x->status = c->status;
    x->first_slot = replicas;
    x->slot_list = replicas + l->c->experts + 1;
    if (c->bundle->balance->dispatch == MOE_DISPATCH_SHARE)
        x->share_end = x->slot_list + l->c->ranks * l->c->slots_per_rank;
    x->turn = c->bundle->balance->dispatch == MOE_DISPATCH_ROUNDROBIN ? MOE_TURN : 0;
    x->timeout = c->world->timeout_ns;
    x->rank = c->rank;
    x->ranks = c->world->ranks;
}

static void set_args(moert_layer *l) {
    const struct moe_plan_class *c = l->c;
    const struct rt_layer_parts *p = &l->parts;
    struct moe_args *a = &l->args;
    a->router_weight = l->memory + p->router;
    a->router_bias = c->has_router_bias ? (float *)(l->memory + p->router_bias) : NULL;
    a->correction_bias = c->has_correction_bias ? (float *)(l->memory + p->correction) : NULL;
    a->static_experts = c->static_table >= 0 ? (int *)(l->memory + p->static_experts) : NULL;
    a->params = moe_params_of(c);
    a->pool = (char *)l->memory + p->pool;
    a->phys_of_slot = (int *)(l->memory + p->phys_of_slot);
    a->slot_of_expert = (int *)(l->memory + p->slot_of_expert);
    a->shared = c->shared_inter ? (char *)l->memory + p->shared : NULL;
    a->shared_gate = c->shared_gate ? (float *)(l->memory + p->shared_gate) : NULL;
    memcpy(a->ws, l->context->ws, sizeof a->ws);
    if (l->context->world)
        set_exchange(l);
}

/* Whether a slot serves its expert: it has one, and its rank is not left out. */
static bool serves(const moert_layer *l, const int32_t *expert_of_slot, int slot) {
    return expert_of_slot[slot] >= 0 &&
           rt_world_lives(l->context->world, slot / l->c->slots_per_rank);
}

/* Shares added up in proportion, so that the last of the expert's slots ends at MOE_SHARE_ONE; when
 * they are all 0, as those of slots that had no load, alike. */
static void add_shares(int32_t *ends, int count) {
    int64_t sum = 0, all = 0;
    for (int i = 0; i < count; i++)
        all += ends[i];
    for (int i = 0; i < count; i++) {
        sum += all ? ends[i] : 1;
        ends[i] = (int32_t)(sum * MOE_SHARE_ONE / (all ? all : count));
    }
}

/* first_slot[E+1], slot_list[R*S], share_end[R*S] of the whole layer (args.h), then one counter per
 * expert. */
static void fill_replicas(const moert_layer *l, const struct moe_plan_layer *at,
                          int32_t *first) {
    const int32_t *expert = l->context->bundle->tables + at->expert_of_slot;
    const int32_t *share = l->context->bundle->tables + at->share_of_slot;
    int experts = l->c->experts, total = l->c->ranks * l->c->slots_per_rank;
    int32_t *slots = first + experts + 1, *ends = slots + total, *used = ends + total;
    for (int s = 0; s < total; s++)
        if (serves(l, expert, s))
            first[expert[s] + 1]++;
    for (int e = 0; e < experts; e++)
        first[e + 1] += first[e];
    for (int s = 0; s < total; s++) {
        if (!serves(l, expert, s))
            continue;
        int n = first[expert[s]] + used[expert[s]]++;
        slots[n] = s;
        ends[n] = share[s];
    }
    for (int e = 0; e < experts; e++)
        add_shares(ends + first[e], first[e + 1] - first[e]);
}

moert_result rt_layer_replicas(moert_layer *l) {
    const moert_bundle *b = l->context->bundle;
    size_t n =
        (size_t)l->c->experts + 1 + 2 * (size_t)l->c->ranks * (size_t)l->c->slots_per_rank;
    int32_t *table = calloc(n + (size_t)l->c->experts, sizeof *table);
    if (!table)
        return rt_no_memory(n * sizeof *table);
    fill_replicas(l, &b->layers[rt_bundle_find(b, l->layer)], table);
    moert_result r = upload(l, l->parts.replicas, table, (int64_t)n * 4);
    free(table);
    return r;
}

/* Records lie in the order of the slots; an expert is served by its first slot. What other ranks
 * send says the slot itself, so that there the table maps a slot to itself. */
static moert_result upload_tables(moert_layer *l) {
    int slots = l->c->slots_per_rank, experts = l->c->experts;
    int32_t *table = malloc(((size_t)slots + (size_t)experts) * sizeof *table);
    if (!table)
        return rt_no_memory(((size_t)slots + (size_t)experts) * sizeof *table);
    int32_t *slot_of_expert = table + slots;
    memset(slot_of_expert, -1, (size_t)experts * sizeof *table);
    for (int s = slots; s-- > 0;) {
        table[s] = s;
        if (l->expert_of_slot[s] >= 0)
            slot_of_expert[l->expert_of_slot[s]] = s;
    }
    for (int s = 0; l->c->ranks > 1 && s < experts; s++)
        slot_of_expert[s] = s < slots && l->expert_of_slot[s] >= 0 ? s : -1;
    moert_result r = upload(l, l->parts.phys_of_slot, table, (int64_t)slots * 4);
    if (r == MOERT_OK)
        r = upload(l, l->parts.slot_of_expert, slot_of_expert, (int64_t)experts * 4);
    free(table);
    if (r == MOERT_OK && l->c->static_table >= 0)
        r = upload(l, l->parts.static_experts, l->context->bundle->tables + l->c->static_table,
                   l->c->topk * 4);
    return r;
}

/* Those of the target's kernels; the others stay zeros, which nothing reads. */
static moert_result encode_maps(moert_layer *l) {
    const moert_context *c = l->context;
    const moert_bundle *b = c->bundle;
    size_t bytes = (size_t)b->count[MOE_SECTION_MAP] * RT_MAP_BYTES;
    if (!bytes || !c->ops->encode_map)
        return MOERT_OK;
    l->maps = aligned_alloc(RT_MAP_ALIGN, bytes);
    if (!l->maps)
        return rt_no_memory(bytes);
    memset(l->maps, 0, bytes);
    for (int i = 0; i < l->target->num_buckets; i++) {
        const struct moe_plan_bucket *u = &b->buckets[l->target->first_bucket + i];
        for (int j = 0; j < u->num_launches; j++) {
            const struct moe_plan_kernel *k =
                &b->kernels[b->launches[u->first_launch + j].kernel];
            for (int m = k->first_map; m < k->first_map + k->num_maps; m++) {
                bool pool = b->maps[m].base == MOE_MAP_POOL;
                RT_TRY(c->ops->encode_map(c->device, &b->maps[m],
                                          l->memory + (pool ? l->parts.pool : l->parts.shared),
                                          pool ? rt_rank_slots(b, l->c, c->rank) : 1,
                                          (char *)l->maps + m * RT_MAP_BYTES));
            }
        }
    }
    return MOERT_OK;
}

static moert_result fill_layer(moert_layer *l) {
    const moert_context *c = l->context;
    void *memory = NULL;
    RT_TRY(c->ops->alloc(c->device, (size_t)l->parts.bytes, &memory));
    l->memory = memory;
    RT_TRY(c->ops->set(c->device, memory, 0, (size_t)l->parts.bytes));
    set_args(l);
    RT_TRY(encode_maps(l));
    RT_TRY(upload_tables(l));
    return l->c->ranks > 1 ? rt_layer_replicas(l) : MOERT_OK;
}

moert_result moert_layer_create(moert_context *c, int layer, moert_layer **out) {
    if (!c || !out)
        return rt_fail(MOERT_INVALID, "moert_layer_create: context and out must be given");
    *out = NULL;
    const moert_bundle *b = c->bundle;
    int at = rt_bundle_find(b, layer);
    if (at < 0)
        return rt_fail(MOERT_NOT_FOUND, "the bundle has no layer %d", layer);
    moert_layer *l = calloc(1, sizeof *l);
    if (!l)
        return rt_no_memory(sizeof *l);
    l->context = c;
    l->next = c->layers;
    c->layers = l;
    l->layer = layer;
    l->c = &b->classes[b->layers[at].class_index];
    l->expert_of_slot =
        b->tables + b->layers[at].expert_of_slot + c->rank * l->c->slots_per_rank;
    l->parts = rt_layer_parts(l->c, rt_rank_slots(b, l->c, c->rank));
    for (uint32_t i = 0; i < b->count[MOE_SECTION_TARGET]; i++)
        if (b->targets[i].target == (int)c->info.target &&
            b->targets[i].class_index == b->layers[at].class_index)
            l->target = &b->targets[i];
    moert_result r = c->ops->enter(c->device);
    if (r == MOERT_OK) {
        r = fill_layer(l);
        c->ops->leave(c->device);
    }
    if (r != MOERT_OK) {
        moert_layer_destroy(l);
        return r;
    }
    *out = l;
    return MOERT_OK;
}

void moert_layer_destroy(moert_layer *l) {
    if (!l)
        return;
    moert_context *c = l->context;
    moert_layer **at = &c->layers;
    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
    if (l->memory && c->ops->enter(c->device) == MOERT_OK) {
        c->ops->free(c->device, l->memory);
        c->ops->leave(c->device);
    }
    free(l->maps);
    free(l);
}

/* ---- packing, on several threads ---- */

struct packer {
    moert_layer *l;
    const struct rt_source *source;
    pthread_mutex_t mutex;
    int next; /* slot; the shared expert comes after the last */
    moert_result result;
    char text[1024]; /* the first error: each thread has its own text */
};

static int next_slot(struct packer *p) {
    pthread_mutex_lock(&p->mutex);
    int slots = p->l->c->slots_per_rank + (p->l->c->shared_inter > 0);
    int slot = p->result == MOERT_OK && p->next < slots ? p->next++ : -1;
    pthread_mutex_unlock(&p->mutex);
    return slot;
}

static moert_result pack_slot(struct packer *p, int slot, void *record, float *scratch) {
    const struct moe_plan_class *c = p->l->c;
    if (slot == c->slots_per_rank) {
        rt_pack_shared(c, &p->source->shared, record, scratch);
        return upload(p->l, p->l->parts.shared, record, c->shared_bytes);
    }
    int e = p->l->expert_of_slot[slot];
    if (e < 0)
        return MOERT_OK;
    rt_pack_expert(c, &p->source->experts[e], record, scratch);
    return upload(p->l, p->l->parts.pool + slot * c->slot_bytes, record, c->slot_bytes);
}

static int64_t max3(int64_t a, int64_t b, int64_t c) {
    int64_t ab = a > b ? a : b;
    return ab > c ? ab : c;
}

static moert_result pack_slots(struct packer *p) {
    const struct moe_plan_class *c = p->l->c;
    const moert_context *x = p->l->context;
    int64_t bytes = max3(c->slot_bytes, c->shared_bytes, 1);
    int64_t width = max3(c->hidden, c->inter, c->shared_inter);
    void *record = malloc((size_t)bytes);
    float *scratch = malloc((size_t)width * sizeof *scratch);
    moert_result r = record && scratch ? x->ops->enter(x->device) : rt_no_memory((size_t)bytes);
    if (r == MOERT_OK) {
        for (int s; r == MOERT_OK && (s = next_slot(p)) >= 0;)
            r = pack_slot(p, s, record, scratch);
        x->ops->leave(x->device);
    }
    free(record);
    free(scratch);
    return r;
}

static void *pack_thread(void *arg) {
    struct packer *p = arg;
    moert_result r = pack_slots(p);
    pthread_mutex_lock(&p->mutex);
    if (r != MOERT_OK && p->result == MOERT_OK) {
        p->result = r;
        snprintf(p->text, sizeof p->text, "%s", moert_last_error());
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

static moert_result pack_experts(moert_layer *l, const struct rt_source *source) {
    struct packer p = {.l = l, .source = source, .mutex = PTHREAD_MUTEX_INITIALIZER};
    pthread_t threads[MAX_THREADS];
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int extra = 0;
    if (l->parts.bytes > small)
        while (extra < MAX_THREADS && extra + 1 < cores &&
               !pthread_create(&threads[extra], NULL, pack_thread, &p))
            extra++;
    pack_thread(&p);
    for (int i = 0; i < extra; i++)
        pthread_join(threads[i], NULL);
    return p.result == MOERT_OK ? MOERT_OK : rt_fail(p.result, "%s", p.text);
}

/* ---- router ---- */

static moert_result upload_fp32(moert_layer *l, int64_t offset, const struct rt_matrix *m) {
    if (!m->data)
        return MOERT_OK;
    float *rows = malloc((size_t)(m->rows * m->cols) * sizeof *rows);
    if (!rows)
        return rt_no_memory((size_t)(m->rows * m->cols) * sizeof *rows);
    for (int64_t r = 0; r < m->rows; r++)
        rt_row_fp32(m, r, rows + r * m->cols);
    moert_result r = upload(l, offset, rows, m->rows * m->cols * 4);
    free(rows);
    return r;
}

/* bf16 stays bf16, rows without gaps; everything else becomes fp32. */
static moert_result upload_router(moert_layer *l, const struct rt_matrix *m) {
    l->router_fp32 = m->dtype != RT_BF16;
    if (l->router_fp32 || !m->data)
        return upload_fp32(l, l->parts.router, m);
    return upload(l, l->parts.router, m->data, m->rows * m->cols * 2);
}

static moert_result load_source(moert_layer *l, const struct rt_source *s) {
    const moert_context *c = l->context;
    l->loaded = false;
    RT_TRY(pack_experts(l, s));
    RT_TRY(c->ops->enter(c->device));
    moert_result r = upload_router(l, &s->router);
    if (r == MOERT_OK)
        r = upload_fp32(l, l->parts.router_bias, &s->router_bias);
    if (r == MOERT_OK)
        r = upload_fp32(l, l->parts.correction, &s->correction);
    if (r == MOERT_OK)
        r = upload_fp32(l, l->parts.shared_gate, &s->shared_gate);
    c->ops->leave(c->device);
    l->loaded = r == MOERT_OK;
    return r;
}

/* ---- the three ways ---- */

moert_result moert_layer_load(moert_layer *l, const char *path) {
    struct rt_checkpoint *ck = NULL;
    struct rt_source source = {.experts = NULL};
    if (!l || !path)
        return rt_fail(MOERT_INVALID, "moert_layer_load: layer and path must be given");
    RT_TRY(rt_checkpoint_open(path, &ck));
    moert_result r = rt_source_from_checkpoint(l->c, l->layer, ck, &source);
    if (r == MOERT_OK)
        r = load_source(l, &source);
    free(source.experts);
    rt_checkpoint_close(ck);
    return r;
}

moert_result moert_layer_set_weights(moert_layer *l, const moert_weights *given) {
    moert_weights w = MOERT_WEIGHTS_INIT;
    struct rt_source source = {.experts = NULL};
    if (!l)
        return rt_fail(MOERT_INVALID, "moert_layer_set_weights: layer must be given");
    RT_TRY(rt_config(&w, sizeof w, given, "moert_weights"));
    moert_result r = rt_source_from_weights(l->c, &w, &source);
    if (r == MOERT_OK)
        r = load_source(l, &source);
    free(source.experts);
    return r;
}

struct random {
    moert_layer *l;
    uint64_t seed;
};

static moert_result random_part(const struct random *x, int64_t offset, int tensor,
                                int64_t count, enum moe_fill kind, float scale) {
    if (!count)
        return MOERT_OK;
    uint64_t seed = moe_tensor_seed(x->seed, x->l->layer, tensor);
    if (kind == MOE_FILL_SCALE)
        seed = moe_scale_seed(seed);
    return rt_fill(x->l, x->l->memory + offset, count, kind, scale, seed);
}

/* A weight of so many bytes, and its scales where a record has them. */
static moert_result random_weight(const struct random *x, int64_t offset, int64_t bytes,
                                  int64_t scales_offset, int64_t scales_bytes, int tensor,
                                  float scale) {
    if (!scales_bytes)
        return random_part(x, offset, tensor, bytes / 2, MOE_FILL_BF16, scale);
    RT_TRY(random_part(x, offset, tensor, bytes, MOE_FILL_E4M3, 1));
    return random_part(x, scales_offset, tensor, scales_bytes / 4, MOE_FILL_SCALE, scale);
}

static float inverse_root(int n) {
    return (float)(1 / sqrt((double)n));
}

static moert_result random_router(const struct random *x) {
    const struct moe_plan_class *c = x->l->c;
    const struct rt_layer_parts *p = &x->l->parts;
    int64_t h = c->hidden, e = c->experts;
    RT_TRY(random_part(x, p->router, MOE_TENSOR_ROUTER, e * h, MOE_FILL_FP32,
                       inverse_root(c->hidden)));
    if (c->has_router_bias)
        RT_TRY(random_part(x, p->router_bias, MOE_TENSOR_ROUTER_BIAS, e, MOE_FILL_FP32, 0.05f));
    if (c->has_correction_bias)
        RT_TRY(random_part(x, p->correction, MOE_TENSOR_CORRECTION, e, MOE_FILL_FP32, 0.05f));
    return MOERT_OK;
}

static moert_result random_shared(const struct random *x) {
    const struct moe_plan_class *c = x->l->c;
    const struct rt_layer_parts *p = &x->l->parts;
    if (!c->shared_inter)
        return MOERT_OK;
    struct rt_record r = rt_record_parts(c, c->shared_inter, false);
    RT_TRY(random_weight(x, p->shared + c->shared_w1_offset, r.w1,
                         p->shared + c->shared_s1_offset, r.s1, MOE_TENSOR_SHARED_W1,
                         inverse_root(c->hidden)));
    RT_TRY(random_weight(x, p->shared + c->shared_w2_offset, r.w2,
                         p->shared + c->shared_s2_offset, r.s2, MOE_TENSOR_SHARED_W2,
                         inverse_root(c->shared_inter)));
    return random_part(x, p->shared_gate, MOE_TENSOR_SHARED_GATE,
                       c->shared_gate ? c->hidden : 0, MOE_FILL_FP32, inverse_root(c->hidden));
}

static moert_result random_slot(const struct random *x, int slot) {
    const struct moe_plan_class *c = x->l->c;
    struct rt_record r = rt_record_parts(c, c->inter, c->has_bias);
    int e = x->l->expert_of_slot[slot], tensor = MOE_TENSOR_EXPERT + 4 * e;
    int64_t at = x->l->parts.pool + slot * c->slot_bytes;
    if (e < 0)
        return MOERT_OK;
    RT_TRY(random_weight(x, at + c->w1_offset, r.w1, at + c->s1_offset, r.s1, tensor,
                         inverse_root(c->hidden)));
    RT_TRY(random_weight(x, at + c->w2_offset, r.w2, at + c->s2_offset, r.s2, tensor + 1,
                         inverse_root(c->inter)));
    RT_TRY(random_part(x, at + c->b1_offset, tensor + 2, r.b1 / 4, MOE_FILL_FP32, 0.05f));
    return random_part(x, at + c->b2_offset, tensor + 3, r.b2 / 4, MOE_FILL_FP32, 0.05f);
}

static moert_result random_layer(const struct random *x) {
    RT_TRY(random_router(x));
    RT_TRY(random_shared(x));
    for (int s = 0; s < x->l->c->slots_per_rank; s++)
        RT_TRY(random_slot(x, s));
    return x->l->context->ops->sync(x->l->context->device, NULL);
}

moert_result moert_layer_random(moert_layer *l, uint64_t seed) {
    if (!l)
        return rt_fail(MOERT_INVALID, "moert_layer_random: layer must be given");
    const moert_context *c = l->context;
    struct random x = {l, seed};
    l->loaded = false;
    l->router_fp32 = true;
    RT_TRY(c->ops->enter(c->device));
    moert_result r = random_layer(&x);
    c->ops->leave(c->device);
    l->loaded = r == MOERT_OK;
    return r;
}
