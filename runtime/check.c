/* plan.bin's structure: every section, index, offset, count and enumeration is checked before
 * anything uses it, so that no later code has to. */
#include "../compiler/balance.h"
#include "internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Far above any model; they keep every product below 2^63. */
enum {
    MAX_DIM = 1 << 20,
    MAX_EXPERTS = 1 << 16,
    MAX_SLOTS = 1 << 20,
    MAX_TOKENS = 1 << 24,
    MAX_GRID_YZ = 65535,
    MAX_TOPK = 256, /* of several ranks: a block has a thread for each */
};
static const int64_t max_bytes = (int64_t)1 << 42;
static const double max_figure = 1e12; /* of imbalances and weights */

struct checker {
    moert_bundle *b;
    int *class_of_kernel; /* -1: not launched yet */
};

#define BAD(...) rt_fail(MOERT_CORRUPT, "plan.bin: " __VA_ARGS__)
#define REQUIRE(condition, ...) \
    do { \
        if (!(condition)) \
            return BAD(__VA_ARGS__); \
    } while (0)

static bool in_range(int64_t v, int64_t low, int64_t high) {
    return v >= low && v <= high;
}

/* first..first+count lies in a section. */
static bool is_slice(int64_t first, int64_t count, uint32_t section_count) {
    return first >= 0 && count >= 0 && first + count <= section_count;
}

bool rt_gated(const struct moe_plan_class *c) {
    return c->activation != MOE_ACT_RELU2;
}

static int64_t blocks_of(int n) {
    return ((int64_t)n + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK;
}

struct rt_record rt_record_parts(const struct moe_plan_class *c, int inter, bool bias) {
    struct rt_record r;
    int64_t width = moe_is_fp8(c) ? 1 : 2, matrices = rt_gated(c) ? 2 : 1;
    int64_t blocks = moe_is_fp8(c) ? blocks_of(inter) * blocks_of(c->hidden) : 0;
    r.w1_rows = inter * matrices;
    r.w1 = r.w1_rows * c->hidden * width;
    r.w2 = (int64_t)inter * c->hidden * width;
    r.s1 = blocks * matrices * 4;
    r.s2 = blocks * 4;
    r.b1 = bias ? r.w1_rows * 4 : 0;
    r.b2 = bias ? (int64_t)c->hidden * 4 : 0;
    return r;
}

int rt_rank_slots(const moert_bundle *b, const struct moe_plan_class *c, int rank) {
    return b->count[MOE_SECTION_RANK] ? b->ranks[rank].slots : c->slots_per_rank;
}

struct rt_layer_parts rt_layer_parts(const struct moe_plan_class *c, int slots) {
    struct rt_layer_parts p = {0};
    p.shared = RT_ALIGN(c->slot_bytes * slots);
    p.router = p.shared + RT_ALIGN(c->shared_bytes);
    p.router_bias = p.router + RT_ALIGN((int64_t)c->experts * c->hidden * 4);
    p.correction = p.router_bias + RT_ALIGN((int64_t)c->experts * 4);
    p.shared_gate = p.correction + RT_ALIGN((int64_t)c->experts * 4);
    p.phys_of_slot = p.shared_gate + RT_ALIGN((int64_t)c->hidden * 4);
    p.slot_of_expert = p.phys_of_slot + RT_ALIGN((int64_t)c->slots_per_rank * 4);
    p.static_experts = p.slot_of_expert + RT_ALIGN((int64_t)c->experts * 4);
    p.replicas = p.static_experts + RT_ALIGN(c->static_table >= 0 ? (int64_t)c->topk * 4 : 0);
    p.bytes = p.replicas;
    if (c->ranks > 1)
        p.bytes += RT_ALIGN(((int64_t)c->experts + 1 + 2ll * c->ranks * c->slots_per_rank) * 4);
    return p;
}

/* ---- header and sections ---- */

static const char *const section_names[] = {
#define X(name, ...) #name,
    MOE_SECTIONS(X)
#undef X
};
static const uint32_t section_strides[] = {
#define X(name, type) sizeof(type),
    MOE_SECTIONS(X)
#undef X
};

static moert_result check_header(const struct moe_plan_header *h, size_t bytes) {
    REQUIRE(bytes >= sizeof *h, "%zu bytes are too few for a header", bytes);
    REQUIRE(!memcmp(h->magic, MOE_PLAN_MAGIC, sizeof h->magic), "no plan's magic");
    if (h->version != MOE_PLAN_VERSION)
        return rt_fail(MOERT_VERSION, "plan.bin: version %u; this library reads %d", h->version,
                       MOE_PLAN_VERSION);
    if (h->args_id != MOE_ARGS_ID || h->args_version != MOE_ARGS_VERSION ||
        h->args_bytes != sizeof(struct moe_args))
        return rt_fail(MOERT_VERSION,
                       "plan.bin: its kernels take argument %u version %u of %u bytes, this "
                       "library gives %d version %d of %zu bytes; build the bundle again",
                       h->args_id, h->args_version, h->args_bytes, MOE_ARGS_ID,
                       MOE_ARGS_VERSION, sizeof(struct moe_args));
    REQUIRE(h->header_bytes == sizeof *h && h->num_sections == MOE_SECTION_COUNT,
            "header of %u bytes and %u sections", h->header_bytes, h->num_sections);
    REQUIRE(h->total_bytes == bytes, "says it has %llu bytes, has %zu",
            (unsigned long long)h->total_bytes, bytes);
    return MOERT_OK;
}

static moert_result check_sections(const struct moe_plan_header *h) {
    for (int i = 0; i < MOE_SECTION_COUNT; i++) {
        const struct moe_plan_section *s = &h->sections[i];
        REQUIRE(s->stride == section_strides[i], "section %s has records of %u bytes, not %u",
                section_names[i], s->stride, section_strides[i]);
        REQUIRE(s->offset % 8 == 0 && s->offset >= h->header_bytes &&
                    s->offset <= h->total_bytes &&
                    (uint64_t)s->count * s->stride <= h->total_bytes - s->offset,
                "section %s lies outside the file", section_names[i]);
        REQUIRE(s->count <= INT32_MAX, "section %s has %u records", section_names[i], s->count);
        for (int j = 0; j < i; j++) {
            const struct moe_plan_section *t = &h->sections[j];
            uint64_t s_end = s->offset + (uint64_t)s->count * s->stride;
            uint64_t t_end = t->offset + (uint64_t)t->count * t->stride;
            REQUIRE(!s->count || !t->count || s_end <= t->offset || t_end <= s->offset,
                    "sections %s and %s overlap", section_names[j], section_names[i]);
        }
    }
    return MOERT_OK;
}

static void set_sections(moert_bundle *b, const struct rt_file *plan) {
    const struct moe_plan_header *h = (const void *)plan->data;
    const void *at[MOE_SECTION_COUNT];
    for (int i = 0; i < MOE_SECTION_COUNT; i++) {
        at[i] = plan->data + h->sections[i].offset;
        b->count[i] = h->sections[i].count;
    }
    b->classes = at[MOE_SECTION_CLASS];
    b->layers = at[MOE_SECTION_LAYER];
    b->tables = at[MOE_SECTION_TABLE];
    b->targets = at[MOE_SECTION_TARGET];
    b->kernels = at[MOE_SECTION_KERNEL];
    b->buffers = at[MOE_SECTION_BUFFER];
    b->buckets = at[MOE_SECTION_BUCKET];
    b->launches = at[MOE_SECTION_LAUNCH];
    b->maps = at[MOE_SECTION_MAP];
    b->strings = at[MOE_SECTION_STRINGS];
    b->balance = at[MOE_SECTION_BALANCE];
    b->pins = at[MOE_SECTION_PIN];
    b->forbidden = at[MOE_SECTION_FORBIDDEN];
    b->weights = at[MOE_SECTION_WEIGHT];
    b->ranks = at[MOE_SECTION_RANK];
}

static moert_result check_strings(const moert_bundle *b) {
    uint32_t n = b->count[MOE_SECTION_STRINGS];
    REQUIRE(n && !b->strings[0] && !b->strings[n - 1], "STRINGS is not NUL-terminated");
    return MOERT_OK;
}

/* ---- classes ---- */

/* NULL when the offset is no string's. */
static const char *string_at(const moert_bundle *b, uint32_t offset) {
    return offset < b->count[MOE_SECTION_STRINGS] ? b->strings + offset : NULL;
}

static moert_result check_shape(const moert_bundle *b, const struct moe_plan_class *c, int i) {
    const char *name = string_at(b, c->name), *source = string_at(b, c->source);
    REQUIRE(name && *name, "class %d has no name", i);
    REQUIRE(source && rt_bundle_file(b, source), "class %d: its source is not in the bundle",
            i);
    REQUIRE(in_range(c->hidden, 16, MAX_DIM) && c->hidden % 16 == 0 &&
                in_range(c->inter, 16, MAX_DIM) && c->inter % 16 == 0,
            "class %d: hidden size %d, intermediate size %d", i, c->hidden, c->inter);
    REQUIRE(in_range(c->experts, 1, MAX_EXPERTS) && in_range(c->topk, 1, c->experts),
            "class %d: %d experts, top-k %d", i, c->experts, c->topk);
    REQUIRE(in_range(c->ranks, 1, MAX_SLOTS) && in_range(c->slots_per_rank, 1, MAX_SLOTS) &&
                in_range((int64_t)c->ranks * c->slots_per_rank, c->experts, MAX_SLOTS) &&
                in_range(c->max_replicas, 1, (int64_t)c->ranks * c->slots_per_rank),
            "class %d: %d ranks, %d slots per rank, at most %d replicas", i, c->ranks,
            c->slots_per_rank, c->max_replicas);
    REQUIRE(in_range(c->max_tokens, 1, MAX_TOKENS), "class %d: max_tokens %d", i,
            c->max_tokens);
    REQUIRE(in_range(c->activation, 0, MOE_ACT_COUNT - 1) && isfinite(c->act_alpha) &&
                isfinite(c->act_limit) && in_range(c->has_bias, 0, 1) &&
                in_range(c->input_weight, 0, 1),
            "class %d: activation", i);
    REQUIRE((c->shared_inter == 0 || in_range(c->shared_inter, 16, MAX_DIM)) &&
                c->shared_inter % 16 == 0 &&
                in_range(c->shared_gate, 0, c->shared_inter ? 1 : 0),
            "class %d: shared expert of size %d", i, c->shared_inter);
    REQUIRE(in_range(c->weights_format, 0, MOE_FORMAT_COUNT - 1) &&
                (c->record_format == MOE_FORMAT_BF16 || moe_is_fp8(c)),
            "class %d: weight format", i);
    return MOERT_OK;
}

static moert_result check_router(const moert_bundle *b, const struct moe_plan_class *c, int i) {
    REQUIRE(in_range(c->router, 0, MOE_ROUTER_COUNT - 1) &&
                in_range(c->n_group, 0, c->experts) && in_range(c->topk_group, 0, c->n_group) &&
                in_range(c->norm_topk_prob, 0, 1) && in_range(c->has_router_bias, 0, 1) &&
                in_range(c->has_correction_bias, 0, 1) && in_range(c->sigmoid, 0, 1) &&
                in_range(c->mask_zero, 0, 1) && in_range(c->group_best, 0, 1) &&
                in_range(c->logits_bf16, 0, 1) && isfinite(c->scale) && isfinite(c->jitter),
            "class %d: router", i);
    REQUIRE(c->n_group <= 1 || (c->experts % c->n_group == 0 && c->topk_group >= 1 &&
                                c->topk <= c->experts / c->n_group * c->topk_group),
            "class %d: %d of %d groups", i, c->topk_group, c->n_group);
    REQUIRE(c->static_table == -1 ||
                is_slice(c->static_table, c->topk, b->count[MOE_SECTION_TABLE]),
            "class %d: table of static experts", i);
    REQUIRE(c->router != MOE_ROUTER_STATIC || c->static_table >= 0,
            "class %d: router static without its experts", i);
    for (int k = 0; c->static_table >= 0 && k < c->topk; k++)
        REQUIRE(in_range(b->tables[c->static_table + k], 0, c->experts - 1),
                "class %d: static expert %d", i, b->tables[c->static_table + k]);
    return MOERT_OK;
}

/* Parts lie inside the record, on 256-byte borders, one after the other in the order of
 * bundle.h. */
static bool parts_fit(const int64_t *offset, const int64_t *bytes, int n, int64_t record) {
    int64_t end = 0;
    for (int i = 0; i < n; i++) {
        if (!bytes[i]) {
            if (offset[i])
                return false;
            continue;
        }
        if (!in_range(offset[i], end, max_bytes) || offset[i] % 256)
            return false;
        end = offset[i] + bytes[i];
    }
    if (offset[0]) /* the kernels find w1 without being told */
        return false;
    return in_range(record, end, max_bytes) && record % 256 == 0;
}

static moert_result check_record(const struct moe_plan_class *c, int i) {
    int version = moe_is_fp8(c) ? MOE_PACK_FP8_VERSION : MOE_PACK_VERSION;
    if (c->pack_version != version)
        return rt_fail(MOERT_VERSION,
                       "plan.bin: class %d: pack version %d; this library packs %d", i,
                       c->pack_version, version);
    struct rt_record r = rt_record_parts(c, c->inter, c->has_bias);
    int64_t offset[] = {c->w1_offset, c->w2_offset, c->s1_offset,
                        c->s2_offset, c->b1_offset, c->b2_offset};
    int64_t bytes[] = {r.w1, r.w2, r.s1, r.s2, r.b1, r.b2};
    REQUIRE(parts_fit(offset, bytes, 6, c->slot_bytes), "class %d: slot record", i);
    struct rt_record s = rt_record_parts(c, c->shared_inter, false);
    int64_t shared_offset[] = {c->shared_w1_offset, c->shared_w2_offset, c->shared_s1_offset,
                               c->shared_s2_offset};
    int64_t shared_bytes[] = {s.w1, s.w2, s.s1, s.s2};
    REQUIRE(parts_fit(shared_offset, shared_bytes, 4, c->shared_bytes),
            "class %d: shared expert's record", i);
    return MOERT_OK;
}

/* The least a buffer must hold for max_tokens tokens. */
static int64_t least_bytes(const struct moe_plan_class *c, int ws) {
    int64_t t = c->max_tokens, entries = t * c->topk, rows = entries * c->ranks;
    int64_t fp8 = moe_is_fp8(c), hidden = fp8 ? 4 : 2;
    switch ((enum moe_ws_id)ws) {
    case MOE_WS_LOGITS: /* static and balanced choose without logits */
        return c->router == MOE_ROUTER_STATIC || c->router == MOE_ROUTER_BALANCED
                   ? 0
                   : t * c->experts * 4;
    case MOE_WS_SYNC:
        return 4;
    case MOE_WS_OFFSETS:
        return ((int64_t)c->slots_per_rank + 1) * 4;
    case MOE_WS_TILES:
        return (int64_t)sizeof(struct moe_tile);
    case MOE_WS_ROW_ENTRY:
    case MOE_WS_ROW_OF:
        return rows * 4;
    case MOE_WS_X16:
        return fp8 ? 0 : t * c->hidden * 2;
    case MOE_WS_HID:
        return rows * c->inter * hidden;
    case MOE_WS_Y:
        return rows * c->hidden * 2;
    case MOE_WS_SHID:
        return t * c->shared_inter * hidden;
    case MOE_WS_SY:
        return c->shared_inter ? t * c->hidden * 2 : 0;
    case MOE_WS_X8:
        return fp8 * t * c->hidden;
    case MOE_WS_XS:
        return fp8 * t * blocks_of(c->hidden) * 4;
    case MOE_WS_HID8:
        return fp8 * rows * c->inter;
    case MOE_WS_HIDS:
        return fp8 * rows * blocks_of(c->inter) * 4;
    case MOE_WS_SHID8:
        return fp8 * t * c->shared_inter;
    case MOE_WS_SHIDS:
        return fp8 * t * blocks_of(c->shared_inter) * 4;
    case MOE_WS_QUEUE:
        return 12;
    case MOE_WS_COUNTS:
        return (rows + MOE_SLOTS_PART - 1) / MOE_SLOTS_PART * c->slots_per_rank * 4;
    case MOE_WS_TARGET:
    case MOE_WS_PLACE:
    case MOE_WS_SENT:
        return c->ranks > 1 ? entries * 4 : 0;
    case MOE_WS_TOKENS_TO:
        return c->ranks > 1 ? (int64_t)c->ranks * 4 : 0;
    case MOE_WS_COUNT:
        break;
    }
    return 0;
}

static moert_result check_buffers(const moert_bundle *b, const struct moe_plan_class *c,
                                  int i) {
    bool seen[MOE_WS_COUNT] = {false};
    REQUIRE(is_slice(c->first_buffer, c->num_buffers, b->count[MOE_SECTION_BUFFER]),
            "class %d: buffers", i);
    for (int j = 0; j < c->num_buffers; j++) {
        const struct moe_plan_buffer *w = &b->buffers[c->first_buffer + j];
        REQUIRE(in_range(w->ws, 0, MOE_WS_COUNT - 1) && !seen[w->ws] && in_range(w->zero, 0, 1),
                "class %d: buffer %d", i, j);
        REQUIRE(in_range(w->bytes, least_bytes(c, w->ws), max_bytes),
                "class %d: workspace buffer %d of %lld bytes", i, w->ws, (long long)w->bytes);
        seen[w->ws] = true;
    }
    return MOERT_OK;
}

/* ---- layers ---- */

static moert_result check_placement(const moert_bundle *b, const struct moe_plan_class *c,
                                    const struct moe_plan_layer *l, int *count) {
    int64_t slots = (int64_t)c->ranks * c->slots_per_rank;
    for (int64_t s = 0; s < slots; s++) {
        int e = b->tables[l->expert_of_slot + s];
        REQUIRE(in_range(e, -1, c->experts - 1), "layer %d, slot %lld: expert %d out of 0..%d",
                l->layer, (long long)s, e, c->experts - 1);
        if (e >= 0)
            count[e]++;
    }
    for (int e = 0; e < c->experts; e++)
        REQUIRE(in_range(count[e], 1, c->max_replicas), "layer %d: expert %d has %d replicas",
                l->layer, e, count[e]);
    return MOERT_OK;
}

/* Empty slots take nothing; the shares of an expert's slots add up to one. */
static moert_result check_shares(const moert_bundle *b, const struct moe_plan_class *c,
                                 const struct moe_plan_layer *l, int *sum) {
    int64_t slots = (int64_t)c->ranks * c->slots_per_rank;
    for (int64_t s = 0; s < slots; s++) {
        int e = b->tables[l->expert_of_slot + s], share = b->tables[l->share_of_slot + s];
        REQUIRE(in_range(share, 0, e < 0 ? 0 : MOE_SHARE_ONE - sum[e]),
                "layer %d, slot %lld: share %d", l->layer, (long long)s, share);
        if (e >= 0)
            sum[e] += share;
    }
    for (int e = 0; e < c->experts; e++)
        REQUIRE(sum[e] == MOE_SHARE_ONE, "layer %d: the shares of expert %d add up to %d",
                l->layer, e, sum[e]);
    return MOERT_OK;
}

/* Figures for people: any that are numbers. */
static bool is_figure(double v) {
    return v >= 0 && v <= max_figure;
}

static moert_result check_layer(const moert_bundle *b, int i) {
    const struct moe_plan_layer *l = &b->layers[i];
    REQUIRE(l->layer >= 0 && (!i || l[-1].layer < l->layer),
            "layers are not in ascending order");
    REQUIRE(in_range(l->class_index, 0, (int64_t)b->count[MOE_SECTION_CLASS] - 1),
            "layer %d: class %d", l->layer, l->class_index);
    const struct moe_plan_class *c = &b->classes[l->class_index];
    int64_t slots = (int64_t)c->ranks * c->slots_per_rank;
    REQUIRE(is_slice(l->expert_of_slot, slots, b->count[MOE_SECTION_TABLE]),
            "layer %d: table of experts", l->layer);
    REQUIRE(is_slice(l->share_of_slot, slots, b->count[MOE_SECTION_TABLE]),
            "layer %d: table of shares", l->layer);
    REQUIRE(is_figure(l->imbalance) && is_figure(l->imbalance_even) && is_figure(l->bound),
            "layer %d: imbalance", l->layer);
    int *count = calloc((size_t)c->experts * 2, sizeof *count);
    if (!count)
        return rt_no_memory((size_t)c->experts * 2 * sizeof *count);
    moert_result r = check_placement(b, c, l, count);
    if (r == MOERT_OK)
        r = check_shares(b, c, l, count + c->experts);
    free(count);
    return r;
}

/* ---- what binds whoever moves experts ---- */

/* NULL when the model has no such layer or it has no such expert. */
static const struct moe_plan_layer *bound_layer(const moert_bundle *b, int layer, int expert) {
    int at = rt_bundle_find(b, layer);
    if (at < 0 || !in_range(expert, 0, b->classes[b->layers[at].class_index].experts - 1))
        return NULL;
    return &b->layers[at];
}

static moert_result check_pin(const moert_bundle *b, int i) {
    const struct moe_plan_pin *pin = &b->pins[i];
    const struct moe_plan_layer *l = bound_layer(b, pin->layer, pin->expert);
    REQUIRE(l, "pin %d: layer %d, expert %d", i, pin->layer, pin->expert);
    const struct moe_plan_class *c = &b->classes[l->class_index];
    REQUIRE(in_range(pin->slot, 0, (int64_t)c->ranks * c->slots_per_rank - 1),
            "pin %d: slot %d", i, pin->slot);
    REQUIRE(b->tables[l->expert_of_slot + pin->slot] == pin->expert,
            "pin %d: slot %d of layer %d does not hold expert %d", i, pin->slot, pin->layer,
            pin->expert);
    return MOERT_OK;
}

static moert_result check_forbidden(const moert_bundle *b, int i) {
    const struct moe_plan_forbidden *f = &b->forbidden[i];
    const struct moe_plan_layer *l = bound_layer(b, f->layer, f->expert);
    REQUIRE(l, "forbidden %d: layer %d, expert %d", i, f->layer, f->expert);
    const struct moe_plan_class *c = &b->classes[l->class_index];
    REQUIRE(in_range(f->rank, 0, c->ranks - 1), "forbidden %d: rank %d", i, f->rank);
    const int32_t *slot = b->tables + l->expert_of_slot + f->rank * c->slots_per_rank;
    for (int s = 0; s < c->slots_per_rank; s++)
        REQUIRE(slot[s] != f->expert, "forbidden %d: rank %d of layer %d holds expert %d", i,
                f->rank, f->layer, f->expert);
    return MOERT_OK;
}

/* What the engine says of a placement's limits. */
struct judging {
    struct balance_problem p;
    const int32_t *slots;
    const char *broken;
};

static void judge(void *user) {
    struct judging *j = user;
    j->broken = balance_broken(&j->p, j->slots);
}

/* The limits of every layer's placement as the engine knows them; capacity: [RANK records]. */
static moert_result check_limits(const moert_bundle *b, const struct moe_plan_layer *l,
                                 int *capacity) {
    const struct moe_plan_class *c = &b->classes[l->class_index];
    const struct moe_plan_balance *k = b->balance;
    uint32_t ranks = b->count[MOE_SECTION_RANK];
    bool limited = k->ranks_per_node || k->groups || k->max_replicas || ranks;
    REQUIRE(!limited || (in_range(c->experts, 1, BALANCE_MAX_EXPERTS) &&
                         in_range(c->ranks, 1, BALANCE_MAX_RANKS)),
            "layer %d: %d experts on %d ranks have no limits", l->layer, c->experts, c->ranks);
    REQUIRE(!ranks || (int)ranks == c->ranks, "layer %d: %u ranks are described, of %d",
            l->layer, ranks, c->ranks);
    REQUIRE(!k->ranks_per_node || c->ranks % k->ranks_per_node == 0,
            "layer %d: nodes of %d ranks, of %d", l->layer, k->ranks_per_node, c->ranks);
    REQUIRE(!k->groups || (k->ranks_per_node && c->experts % k->groups == 0 &&
                           k->groups % (c->ranks / k->ranks_per_node) == 0),
            "layer %d: %d groups of %d experts", l->layer, k->groups, c->experts);
    for (uint32_t r = 0; r < ranks; r++) {
        capacity[r] = b->ranks[r].slots;
        REQUIRE(in_range(capacity[r], 0, c->slots_per_rank), "rank %u: %d slots of %d", r,
                capacity[r], c->slots_per_rank);
    }
    struct balance_problem p = {.experts = c->experts,
                                .ranks = c->ranks,
                                .slots_per_rank = c->slots_per_rank,
                                .capacity = ranks ? capacity : NULL,
                                .ranks_per_node = k->ranks_per_node,
                                .groups = k->groups,
                                .cross_node_slots = k->cross_node_slots,
                                .max_per_node = k->max_per_node,
                                .max_replicas = k->max_replicas};
    struct judging j = {p, b->tables + l->expert_of_slot, NULL};
    if (limited && !balance_within(judge, &j))
        return rt_fail(MOERT_NO_MEMORY, "layer %d: no memory to check its limits", l->layer);
    REQUIRE(!j.broken, "layer %d: %s", l->layer, j.broken);
    return MOERT_OK;
}

static moert_result check_ranks(const moert_bundle *b) {
    const struct moe_plan_balance *k = b->balance;
    uint32_t n = b->count[MOE_SECTION_RANK];
    REQUIRE(k->ranks_per_node >= 0 && k->groups >= 0 && k->cross_node_slots >= 0 &&
                k->max_replicas >= 0 && k->max_per_node >= 0 &&
                (k->groups || !k->cross_node_slots) && (k->ranks_per_node || !k->max_per_node),
            "limits of %d ranks per node, %d groups, %d cross-node slots, %d replicas, %d per "
            "node",
            k->ranks_per_node, k->groups, k->cross_node_slots, k->max_replicas,
            k->max_per_node);
    for (uint32_t r = 0; r < n; r++)
        REQUIRE(b->ranks[r].speed > 1e-6 && b->ranks[r].speed < 1e6, "rank %u: speed", r);
    int *capacity = malloc((n + (size_t)1) * sizeof *capacity);
    if (!capacity)
        return rt_no_memory(n * sizeof *capacity);
    moert_result r = MOERT_OK;
    for (uint32_t i = 0; r == MOERT_OK && i < b->count[MOE_SECTION_LAYER]; i++)
        r = check_limits(b, &b->layers[i], capacity);
    free(capacity);
    return r;
}

static moert_result check_balance(const moert_bundle *b) {
    REQUIRE(b->count[MOE_SECTION_BALANCE] == 1, "%u records of balance, not 1",
            b->count[MOE_SECTION_BALANCE]);
    REQUIRE(in_range(b->balance->dispatch, 0, MOE_DISPATCH_COUNT - 1) &&
                b->balance->layer_updates_per_iter >= 0 && b->balance->move_budget >= -1,
            "dispatch %d, %d updates, %d moves", b->balance->dispatch,
            b->balance->layer_updates_per_iter, b->balance->move_budget);
    for (uint32_t i = 0; i < b->count[MOE_SECTION_WEIGHT]; i++)
        REQUIRE(is_figure(b->weights[i]), "weight %u", i);
    for (uint32_t i = 0; i < b->count[MOE_SECTION_PIN]; i++)
        RT_TRY(check_pin(b, (int)i));
    for (uint32_t i = 0; i < b->count[MOE_SECTION_FORBIDDEN]; i++)
        RT_TRY(check_forbidden(b, (int)i));
    return check_ranks(b);
}

/* ---- launches ---- */

static const uint32_t target_smem[] = {
#define X(name, spelling, smem) smem,
    MOE_TARGETS(X)
#undef X
};

enum {
    MAX_CLUSTER = 8,
    MAX_MAPS = 16,
    MAX_BOX_ROWS = 256,
    LAUNCH_FLAGS = MOE_LAUNCH_EARLY | MOE_LAUNCH_COLLECTIVE
};

static moert_result check_kernel(const moert_bundle *b, int i) {
    const struct moe_plan_kernel *k = &b->kernels[i];
    const char *expression = string_at(b, k->expression), *symbol = string_at(b, k->symbol);
    const char *file = string_at(b, k->file);
    REQUIRE(expression && *expression && symbol && file, "kernel %d: names", i);
    REQUIRE(in_range(k->target, 0, MOE_TARGET_COUNT - 1), "kernel %s: target %d", expression,
            k->target);
    REQUIRE(!*symbol == !*file && (k->target != MOE_TARGET_HOST || !*file),
            "kernel %s: symbol and file", expression);
    REQUIRE(!*file || rt_bundle_file(b, file), "kernel %s: %s is not in the bundle", expression,
            file);
    REQUIRE(in_range(k->block, 1, 1024) && k->smem <= target_smem[k->target],
            "kernel %s: %u threads, %u bytes of shared memory", expression, k->block, k->smem);
    REQUIRE(in_range(k->num_maps, 0, k->target == MOE_TARGET_HOST ? 0 : MAX_MAPS) &&
                is_slice(k->first_map, k->num_maps, b->count[MOE_SECTION_MAP]),
            "kernel %s: tensor maps", expression);
    REQUIRE(in_range(k->cluster, 0, k->target == MOE_TARGET_HOST ? 0 : MAX_CLUSTER),
            "kernel %s: cluster of %d", expression, k->cluster);
    return MOERT_OK;
}

/* A tensor map stays inside a record of the class. */
static moert_result check_map(const struct moe_plan_map *m, const struct moe_plan_class *c,
                              int i) {
    bool pool = m->base == MOE_MAP_POOL;
    int64_t record = pool ? c->slot_bytes : c->shared_bytes;
    REQUIRE(in_range(m->base, 0, MOE_MAP_BASE_COUNT - 1) &&
                in_range(m->slots, 1, pool ? c->slots_per_rank : 1) && m->slot_stride == record,
            "tensor map %d: base %d, %d slots", i, m->base, m->slots);
    REQUIRE(
        in_range(m->element, 1, 2) && in_range(m->columns, 8, MAX_DIM) &&
            m->columns * m->element % 16 == 0 && in_range(m->rows, 1, 2 * (int64_t)MAX_DIM) &&
            in_range(m->box_rows, 1, MAX_BOX_ROWS) && in_range(m->offset, 0, record) &&
            m->offset % 16 == 0 &&
            m->offset + (int64_t)m->rows * m->columns * m->element <= record,
        "tensor map %d: %d rows of %d at %lld", i, m->rows, m->columns, (long long)m->offset);
    return MOERT_OK;
}

static bool grid_fits(const struct moe_plan_launch *l) {
    const int32_t *p = l->p;
    switch ((enum moe_grid)l->grid) {
    case MOE_GRID_FIXED:
    case MOE_GRID_TOKENS:
    case MOE_GRID_ENTRIES:
        return p[0] >= 1 && in_range(p[1], 1, MAX_GRID_YZ) && in_range(p[2], 1, MAX_GRID_YZ);
    case MOE_GRID_PERSISTENT:
        return p[0] >= 0 && p[1] >= 0;
    case MOE_GRID_FILL:
        return p[0] >= 1;
    case MOE_GRID_COUNT:
        break;
    }
    return false;
}

static moert_result check_launch(struct checker *k, int i, const struct moe_plan_target *t) {
    const moert_bundle *b = k->b;
    const struct moe_plan_launch *l = &b->launches[i];
    REQUIRE(in_range(l->kernel, 0, (int64_t)b->count[MOE_SECTION_KERNEL] - 1) &&
                b->kernels[l->kernel].target == t->target,
            "launch %d: kernel %d", i, l->kernel);
    REQUIRE(in_range(l->stage, 0, MOE_STAGE_COUNT - 1) &&
                in_range(l->condition, 0, MOE_COND_COUNT - 1) && grid_fits(l) &&
                !(l->flags & ~LAUNCH_FLAGS),
            "launch %d: stage %d, condition %d, grid %d", i, l->stage, l->condition, l->grid);
    REQUIRE(!(l->flags & MOE_LAUNCH_COLLECTIVE) || b->classes[t->class_index].collective,
            "launch %d: a collective that its class has no room for", i);
    int *owner = &k->class_of_kernel[l->kernel];
    REQUIRE(*owner < 0 || *owner == t->class_index, "kernel %d serves two classes", l->kernel);
    if (*owner < 0)
        for (int m = 0; m < b->kernels[l->kernel].num_maps; m++)
            RT_TRY(check_map(&b->maps[b->kernels[l->kernel].first_map + m],
                             &b->classes[t->class_index], b->kernels[l->kernel].first_map + m));
    *owner = t->class_index;
    return MOERT_OK;
}

static moert_result check_target(struct checker *k, int i) {
    const moert_bundle *b = k->b;
    const struct moe_plan_target *t = &b->targets[i];
    REQUIRE(in_range(t->target, 0, MOE_TARGET_COUNT - 1) &&
                in_range(t->class_index, 0, (int64_t)b->count[MOE_SECTION_CLASS] - 1),
            "target %d", i);
    for (int j = 0; j < i; j++)
        REQUIRE(b->targets[j].target != t->target ||
                    b->targets[j].class_index != t->class_index,
                "targets %d and %d are the same", j, i);
    REQUIRE(t->num_buckets >= 1 &&
                is_slice(t->first_bucket, t->num_buckets, b->count[MOE_SECTION_BUCKET]),
            "target %d: buckets", i);
    int last = 0;
    for (int j = 0; j < t->num_buckets; j++) {
        const struct moe_plan_bucket *u = &b->buckets[t->first_bucket + j];
        REQUIRE(u->max_tokens > last, "target %d: buckets are not in ascending order", i);
        REQUIRE(b->classes[t->class_index].ranks == 1
                    ? u->exchange == -1
                    : in_range(u->exchange, 0, MOE_EXCHANGE_COUNT - 1),
                "target %d, bucket %d: exchange %d", i, j, u->exchange);
        REQUIRE(u->exchange <= MOE_EXCHANGE_ONESIDED || b->classes[t->class_index].collective,
                "target %d, bucket %d: a collective that its class has no room for", i, j);
        REQUIRE(is_slice(u->first_launch, u->num_launches, b->count[MOE_SECTION_LAUNCH]),
                "target %d, bucket %d: launches", i, j);
        for (int n = 0; n < u->num_launches; n++)
            RT_TRY(check_launch(k, u->first_launch + n, t));
        last = u->max_tokens;
    }
    REQUIRE(last == b->classes[t->class_index].max_tokens,
            "target %d: buckets end at %d tokens, not at %d", i, last,
            b->classes[t->class_index].max_tokens);
    return MOERT_OK;
}

static moert_result check_targets(moert_bundle *b) {
    uint32_t kernels = b->count[MOE_SECTION_KERNEL];
    struct checker k = {b, malloc((kernels + (size_t)1) * sizeof(int))};
    if (!k.class_of_kernel)
        return rt_no_memory(kernels * sizeof(int));
    memset(k.class_of_kernel, -1, kernels * sizeof(int));
    moert_result r = MOERT_OK;
    for (uint32_t i = 0; r == MOERT_OK && i < b->count[MOE_SECTION_TARGET]; i++)
        r = check_target(&k, (int)i);
    free(k.class_of_kernel);
    return r;
}

/* What the exchange between ranks relies on. */
static moert_result check_exchange(const moert_bundle *b, const struct moe_plan_class *c,
                                   int i) {
    struct moe_peers ignored;
    REQUIRE(c->ranks == b->classes[0].ranks, "class %d: %d ranks, class 0 has %d", i, c->ranks,
            b->classes[0].ranks);
    REQUIRE(in_range(c->collective, 0, c->ranks > 1), "class %d: collective %d", i,
            c->collective);
    if (c->ranks == 1)
        return MOERT_OK;
    REQUIRE(c->max_tokens <= (int)MOE_FLAG_TOKENS, "class %d: max_tokens %d on several ranks",
            i, c->max_tokens);
    REQUIRE(c->slots_per_rank <= c->experts && c->topk <= MAX_TOPK,
            "class %d: %d slots on a rank for %d experts, top-k %d, on several ranks", i,
            c->slots_per_rank, c->experts, c->topk);
    REQUIRE((int64_t)c->ranks * c->max_tokens * c->topk <= INT32_MAX &&
                (int64_t)c->ranks * c->max_tokens * (c->hidden / 8) < UINT32_MAX &&
                moe_arena_layout(c, &ignored) <= max_bytes,
            "class %d: %d tokens on each of %d ranks", i, c->max_tokens, c->ranks);
    return MOERT_OK;
}

moert_result rt_plan_check(moert_bundle *b, const struct rt_file *plan) {
    const struct moe_plan_header *h = (const void *)plan->data;
    RT_TRY(check_header(h, plan->bytes));
    RT_TRY(check_sections(h));
    set_sections(b, plan);
    RT_TRY(check_strings(b));
    for (uint32_t i = 0; i < b->count[MOE_SECTION_CLASS]; i++) {
        const struct moe_plan_class *c = &b->classes[i];
        RT_TRY(check_shape(b, c, (int)i));
        RT_TRY(check_router(b, c, (int)i));
        RT_TRY(check_exchange(b, c, (int)i));
        RT_TRY(check_record(c, (int)i));
        RT_TRY(check_buffers(b, c, (int)i));
    }
    for (uint32_t i = 0; i < b->count[MOE_SECTION_LAYER]; i++)
        RT_TRY(check_layer(b, (int)i));
    RT_TRY(check_balance(b));
    for (uint32_t i = 0; i < b->count[MOE_SECTION_KERNEL]; i++)
        RT_TRY(check_kernel(b, (int)i));
    return check_targets(b);
}
