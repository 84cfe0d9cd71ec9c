/* Which layers have their turn, what moves in them, and the bytes that tell the other ranks. */
#include "rebalance.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define MAGIC "MOEMOVES"
enum { VERSION = 1 };

/* The bytes of an update: this, then num_layers struct rt_update_layer, num_moves struct rt_move,
 * num_shares int32. */
struct head {
    char magic[8];
    uint32_t version, num_layers, num_moves, num_shares;
    int64_t iteration;
    char before[64],
        after[64]; /* BLAKE2b-256 in hex: iteration, slots and shares of its layers */
};

struct layer {
    int layer, slots;
    struct balance_problem limits;
    int32_t *expert_of_slot, *share; /* share NULL: not of this split */
    int32_t *next, *next_share;      /* being planned or checked */
    bool pending;                    /* an update of it is under way */
};

struct rt_rebalance {
    int num_layers, updates, moves;
    double worth;
    struct layer *layers;
    int *pins;          /* of open_bundle, for all layers */
    uint8_t *forbidden; /* the same */
    int *capacity;
    double *speed;
};

/* ---- the layers ---- */

/* What the engine says of a problem and, when there are slots, of them. */
struct judging {
    const struct balance_problem *p;
    const int32_t *slots;
    const char *wrong;
};
static void judge_within(void *user) {
    struct judging *k = user;
    k->wrong = k->slots ? balance_broken(k->p, k->slots) : balance_check(k->p);
}
static moert_result judge(const struct layer *l, const int32_t *slots, moert_result otherwise) {
    struct judging k = {&l->limits, slots, NULL};
    if (!balance_within(judge_within, &k))
        return rt_fail(MOERT_NO_MEMORY, "layer %d: out of memory", l->layer);
    return k.wrong ? rt_fail(otherwise, "layer %d: %s", l->layer, k.wrong) : MOERT_OK;
}

static moert_result copy_layer(const struct rt_rebalance_layer *from, struct layer *l) {
    l->layer = from->layer;
    l->limits = from->limits;
    l->limits.load = l->limits.weight = NULL;
    l->limits.workloads = 0;
    l->limits.current = NULL;
    RT_TRY(judge(l, NULL, MOERT_INVALID));
    l->slots = l->limits.ranks * l->limits.slots_per_rank;
    size_t bytes = sizeof(int32_t) * (size_t)l->slots;
    bool shares = l->limits.split == BALANCE_SHARE && from->share_of_slot;
    l->expert_of_slot = calloc(4, bytes);
    if (!l->expert_of_slot)
        return rt_no_memory(4 * bytes);
    l->next = l->expert_of_slot + l->slots;
    l->share = shares ? l->next + l->slots : NULL;
    l->next_share = shares ? l->share + l->slots : NULL;
    memcpy(l->expert_of_slot, from->expert_of_slot, bytes);
    if (shares)
        memcpy(l->share, from->share_of_slot, bytes);
    for (int s = 0; s < l->slots; s++)
        if (l->expert_of_slot[s] < -1 || l->expert_of_slot[s] >= l->limits.experts)
            return rt_fail(MOERT_INVALID, "layer %d, slot %d: expert %d of %d", l->layer, s,
                           l->expert_of_slot[s], l->limits.experts);
    return MOERT_OK;
}

static moert_result fill(struct rt_rebalance *r, const struct rt_rebalance_layer *layers,
                         int n) {
    r->layers = calloc((size_t)n, sizeof *r->layers);
    if (!r->layers)
        return rt_no_memory(sizeof *r->layers * (size_t)n);
    r->num_layers = n;
    for (int i = 0; i < n; i++)
        RT_TRY(copy_layer(&layers[i], &r->layers[i]));
    return MOERT_OK;
}

moert_result rt_rebalance_open(const struct rt_rebalance_layer *layers, int n,
                               const struct rt_rebalance_options *o,
                               struct rt_rebalance **out) {
    *out = NULL;
    if (n < 1 || o->updates_per_iter < 1 || o->moves < -1 ||
        !(o->worth >= 0 && o->worth <= 1e6))
        return rt_fail(MOERT_INVALID, "%d layers, %d updates an iteration, %d moves, worth %g",
                       n, o->updates_per_iter, o->moves, o->worth);
    struct rt_rebalance *r = calloc(1, sizeof *r);
    if (!r)
        return rt_no_memory(sizeof *r);
    r->updates = o->updates_per_iter < n ? o->updates_per_iter : n;
    r->moves = o->moves < 0 ? RT_MOVES : o->moves;
    r->worth = o->worth > 0 ? o->worth : RT_WORTH;
    moert_result result = fill(r, layers, n);
    if (result == MOERT_OK)
        *out = r;
    else
        rt_rebalance_close(r);
    return result;
}

void rt_rebalance_close(struct rt_rebalance *r) {
    for (int i = 0; r && r->layers && i < r->num_layers; i++)
        free(r->layers[i].expert_of_slot);
    if (r) {
        free(r->layers);
        free(r->pins);
        free(r->forbidden);
        free(r->capacity);
        free(r->speed);
    }
    free(r);
}

int rt_rebalance_layers(const struct rt_rebalance *r) {
    return r->num_layers;
}

int rt_rebalance_rotation(const struct rt_rebalance *r) {
    int groups = (r->num_layers + r->updates - 1) / r->updates;
    return groups + (r->num_layers % groups == 0);
}

bool rt_rebalance_due(const struct rt_rebalance *r, int64_t iteration, int i) {
    int groups = (r->num_layers + r->updates - 1) / r->updates;
    return iteration >= 0 && iteration % rt_rebalance_rotation(r) == i % groups;
}

const int32_t *rt_rebalance_slots(const struct rt_rebalance *r, int i) {
    return r->layers[i].expert_of_slot;
}

const int32_t *rt_rebalance_shares(const struct rt_rebalance *r, int i) {
    return r->layers[i].share;
}

/* ---- a bundle's layers ---- */

static const enum balance_split splits[MOE_DISPATCH_COUNT] = {
    [MOE_DISPATCH_ROUNDROBIN] = BALANCE_EVEN,
    [MOE_DISPATCH_EVEN] = BALANCE_EVEN,
    [MOE_DISPATCH_SHARE] = BALANCE_SHARE,
    [MOE_DISPATCH_BALANCED] = BALANCE_BALANCED,
};

/* What all layers of a bundle have in common, and where pins and forbidden ranks lie. */
struct bound {
    const moert_bundle *b;
    int *pins;
    uint8_t *forbidden;
    int *capacity;
    double *speed;
};

static void bind_layer(const struct bound *k, int i, struct rt_rebalance_layer *out,
                       size_t *slots, size_t *pairs) {
    const moert_bundle *b = k->b;
    const struct moe_plan_layer *l = &b->layers[i];
    const struct moe_plan_class *c = &b->classes[l->class_index];
    int total = c->ranks * c->slots_per_rank, *pin = k->pins + *slots, pinned = 0, banned = 0;
    uint8_t *forbidden = k->forbidden + *pairs;
    for (int s = 0; s < total; s++)
        pin[s] = -1;
    for (uint32_t n = 0; n < b->count[MOE_SECTION_PIN]; n++)
        if (b->pins[n].layer == l->layer)
            pin[b->pins[n].slot] = b->pins[n].expert, pinned++;
    for (uint32_t n = 0; n < b->count[MOE_SECTION_FORBIDDEN]; n++)
        if (b->forbidden[n].layer == l->layer)
            forbidden[b->forbidden[n].expert * c->ranks + b->forbidden[n].rank] = 1, banned++;
    *out =
        (struct rt_rebalance_layer){.layer = l->layer,
                                    .limits = {.experts = c->experts,
                                               .ranks = c->ranks,
                                               .slots_per_rank = c->slots_per_rank,
                                               .split = splits[b->balance->dispatch],
                                               .capacity = k->capacity,
                                               .speed = k->speed,
                                               .ranks_per_node = b->balance->ranks_per_node,
                                               .groups = b->balance->groups,
                                               .cross_node_slots = b->balance->cross_node_slots,
                                               .max_per_node = b->balance->max_per_node,
                                               .max_replicas = b->balance->max_replicas,
                                               .pin = pinned ? pin : NULL,
                                               .forbidden = banned ? forbidden : NULL},
                                    .expert_of_slot = b->tables + l->expert_of_slot,
                                    .share_of_slot = b->tables + l->share_of_slot};
    *slots += (size_t)total;
    *pairs += (size_t)c->experts * (size_t)c->ranks;
}

/* Memory for what binds the layers; what ranks have they have in all of them. */
static moert_result bind_ranks(const moert_bundle *b, struct bound *k) {
    size_t slots = 0, pairs = 0, ranks = b->count[MOE_SECTION_RANK];
    for (uint32_t i = 0; i < b->count[MOE_SECTION_LAYER]; i++) {
        const struct moe_plan_class *c = &b->classes[b->layers[i].class_index];
        slots += (size_t)c->ranks * (size_t)c->slots_per_rank;
        pairs += (size_t)c->experts * (size_t)c->ranks;
    }
    *k = (struct bound){
        .b = b, .pins = calloc(slots + 1, sizeof *k->pins), .forbidden = calloc(pairs + 1, 1)};
    if (ranks) {
        k->capacity = calloc(ranks, sizeof *k->capacity);
        k->speed = calloc(ranks, sizeof *k->speed);
    }
    if (!k->pins || !k->forbidden || (ranks && (!k->capacity || !k->speed)))
        return rt_no_memory(slots * sizeof *k->pins + pairs);
    for (size_t i = 0; i < ranks; i++) {
        k->capacity[i] = b->ranks[i].slots;
        k->speed[i] = b->ranks[i].speed;
    }
    return MOERT_OK;
}

static moert_result open_bound(const moert_bundle *b, const struct bound *k, double worth,
                               struct rt_rebalance **out) {
    int n = (int)b->count[MOE_SECTION_LAYER], updates = b->balance->layer_updates_per_iter;
    struct rt_rebalance_layer *layers = calloc((size_t)n + 1, sizeof *layers);
    size_t slots = 0, pairs = 0;
    if (!layers)
        return rt_no_memory(sizeof *layers * (size_t)n);
    for (int i = 0; i < n; i++)
        bind_layer(k, i, &layers[i], &slots, &pairs);
    struct rt_rebalance_options o = {updates > 0 ? updates : 1, b->balance->move_budget, worth};
    moert_result result = rt_rebalance_open(layers, n, &o, out);
    free(layers);
    return result;
}

moert_result rt_rebalance_open_bundle(const moert_bundle *b, double worth,
                                      struct rt_rebalance **out) {
    struct bound k;
    *out = NULL;
    moert_result result = bind_ranks(b, &k);
    if (result == MOERT_OK)
        result = open_bound(b, &k, worth, out);
    if (result == MOERT_OK) {
        (*out)->pins = k.pins;
        (*out)->forbidden = k.forbidden;
        (*out)->capacity = k.capacity;
        (*out)->speed = k.speed;
        return MOERT_OK;
    }
    free(k.pins);
    free(k.forbidden);
    free(k.capacity);
    free(k.speed);
    return result;
}

/* ---- the bytes of an update ---- */

/* Finds head and arrays in bytes of the right size. */
static void point(struct rt_update *u, unsigned char *bytes) {
    const struct head *h = (const struct head *)bytes;
    u->bytes = bytes;
    u->size = sizeof *h + h->num_layers * sizeof *u->layers + h->num_moves * sizeof *u->moves +
              h->num_shares * sizeof *u->shares;
    u->iteration = h->iteration;
    u->num_layers = (int)h->num_layers;
    u->layers = (const void *)(bytes + sizeof *h);
    u->moves = (const void *)(u->layers + h->num_layers);
    u->shares = (const void *)(u->moves + h->num_moves);
}

/* Of an update's layers as they are, or (next) as they will be and all that the update says; in hex
 * without a NUL. */
static moert_result hash_layers(const struct rt_rebalance *r, const struct rt_update *u,
                                bool next, char out[64]) {
    size_t bytes = sizeof u->iteration, body = next ? u->size - sizeof(struct head) : 0;
    char hex[65];
    for (int i = 0; i < u->num_layers; i++)
        bytes += sizeof(int32_t) * (1 + 2 * (size_t)r->layers[u->layers[i].index].slots);
    unsigned char *text = malloc(bytes += body), *at = text;
    if (!text)
        return rt_no_memory(bytes);
    memcpy(at, &u->iteration, sizeof u->iteration);
    memcpy(at + sizeof u->iteration, u->bytes + sizeof(struct head), body);
    at += sizeof u->iteration + body;
    for (int i = 0; i < u->num_layers; i++) {
        const struct layer *l = &r->layers[u->layers[i].index];
        int32_t number = l->layer;
        size_t size = sizeof(int32_t) * (size_t)l->slots;
        memcpy(at, &number, sizeof number);
        memcpy(at + sizeof number, next ? l->next : l->expert_of_slot, size);
        if (l->share)
            memcpy(at + sizeof number + size, next ? l->next_share : l->share, size);
        else
            memset(at + sizeof number + size, 0, size);
        at += sizeof number + 2 * size;
    }
    rt_hash_hex(text, bytes, hex);
    memcpy(out, hex, 64);
    free(text);
    return MOERT_OK;
}

void rt_update_free(struct rt_update *u) {
    free(u->bytes);
    *u = (struct rt_update){0};
}

/* ---- planning ---- */

static bool has_load(const double *load, int experts) {
    for (int e = 0; load && e < experts; e++)
        if (load[e] != 0)
            return true;
    return false;
}

/* One layer's planning, which ends where memory does. */
struct planning {
    struct layer *l;
    struct balance_problem p;
    double *share;
    const char *wrong;
};

static void plan_within(void *user) {
    struct planning *k = user;
    struct balance_result result;
    k->wrong = balance_check(&k->p);
    if (!k->wrong && !balance_plan(&k->p, k->l->next, k->share, &result))
        k->wrong = "no placement keeps the limits";
    if (!k->wrong && k->share)
        balance_whole_shares(k->p.experts, k->l->slots, k->l->next, k->share, MOE_SHARE_ONE,
                             k->l->next_share);
}

/* Sets next and next_share. */
static moert_result plan_layer(struct rt_rebalance *r, struct layer *l, int64_t iteration,
                               const double *load) {
    struct planning k = {l, l->limits};
    size_t bytes = sizeof *k.share * (size_t)l->slots;
    k.p.load = load;
    k.p.workloads = 1;
    k.p.current = l->expert_of_slot;
    k.p.moves = r->moves < l->slots ? r->moves : l->slots - 1;
    k.p.worth = r->worth;
    k.p.seed = (uint64_t)iteration << 16 ^ (uint64_t)l->layer;
    if (l->share && !(k.share = malloc(bytes)))
        return rt_no_memory(bytes);
    bool done = balance_within(plan_within, &k);
    free(k.share);
    if (!done)
        return rt_fail(MOERT_NO_MEMORY, "layer %d: out of memory while planning", l->layer);
    return k.wrong ? rt_fail(MOERT_INVALID, "layer %d: %s", l->layer, k.wrong) : MOERT_OK;
}

static bool same(const int32_t *a, const int32_t *b, int n) {
    return !memcmp(a, b, sizeof *a * (size_t)n);
}

static bool shares_change(const struct layer *l) {
    return l->share && !same(l->share, l->next_share, l->slots);
}

static int count_moves(const struct layer *l) {
    int n = 0;
    for (int s = 0; s < l->slots; s++)
        n += l->expert_of_slot[s] != l->next[s];
    return n;
}

static int node_of(const struct layer *l, int rank) {
    return l->limits.ranks_per_node ? rank / l->limits.ranks_per_node : 0;
}

/* Who sends expert e to a rank; sends[R] so far. */
static int find_source(const struct layer *l, int e, int rank, int *sends) {
    int best = -1;
    for (int s = 0; e >= 0 && s < l->slots; s++) {
        int from = s / l->limits.slots_per_rank;
        if (l->expert_of_slot[s] != e)
            continue;
        int near = best < 0 ? 1
                            : (node_of(l, from) == node_of(l, rank)) -
                                  (node_of(l, best) == node_of(l, rank));
        if (near > 0 || (near == 0 && sends[from] < sends[best]))
            best = from;
    }
    if (best >= 0 && best != rank)
        sends[best]++;
    return best;
}

static moert_result write_moves(const struct layer *l, struct rt_move *out) {
    int *sends = calloc((size_t)l->limits.ranks, sizeof *sends);
    if (!sends)
        return rt_no_memory(sizeof *sends * (size_t)l->limits.ranks);
    for (int s = 0; s < l->slots; s++) {
        int from = l->expert_of_slot[s], to = l->next[s];
        if (from != to)
            *out++ = (struct rt_move){s, from, to,
                                      find_source(l, to, s / l->limits.slots_per_rank, sends)};
    }
    free(sends);
    return MOERT_OK;
}

/* Layers that were planned, changed[], into bytes. */
static moert_result write_update(struct rt_rebalance *r, int64_t iteration, const int *changed,
                                 int n, struct rt_update *out) {
    struct head h = {MAGIC, VERSION, (uint32_t)n, 0, 0, iteration, {0}, {0}};
    for (int i = 0; i < n; i++) {
        const struct layer *l = &r->layers[changed[i]];
        h.num_moves += (uint32_t)count_moves(l);
        h.num_shares += shares_change(l) ? (uint32_t)l->slots : 0;
    }
    size_t size = sizeof h + (size_t)n * sizeof(struct rt_update_layer) +
                  h.num_moves * sizeof(struct rt_move) + h.num_shares * sizeof(int32_t);
    unsigned char *bytes = malloc(size);
    if (!bytes)
        return rt_no_memory(size);
    memcpy(bytes, &h, sizeof h);
    point(out, bytes);
    struct rt_update_layer *layer = (struct rt_update_layer *)out->layers;
    int moves = 0, shares = 0;
    for (int i = 0; i < n; i++) {
        const struct layer *l = &r->layers[changed[i]];
        layer[i] = (struct rt_update_layer){changed[i], moves, count_moves(l), shares,
                                            shares_change(l) ? l->slots : 0};
        RT_TRY(write_moves(l, (struct rt_move *)out->moves + moves));
        if (layer[i].num_shares)
            memcpy((int32_t *)out->shares + shares, l->next_share,
                   sizeof(int32_t) * (size_t)l->slots);
        moves += layer[i].num_moves;
        shares += layer[i].num_shares;
    }
    struct head *head = (struct head *)bytes;
    RT_TRY(hash_layers(r, out, false, head->before));
    return hash_layers(r, out, true, head->after);
}

static moert_result plan_due(struct rt_rebalance *r, int64_t iteration,
                             const double *const *load, int *changed, int *n) {
    for (int i = 0; i < r->num_layers; i++) {
        struct layer *l = &r->layers[i];
        if (!rt_rebalance_due(r, iteration, i) || l->pending ||
            !has_load(load[i], l->limits.experts))
            continue;
        RT_TRY(plan_layer(r, l, iteration, load[i]));
        if (count_moves(l) || shares_change(l))
            changed[(*n)++] = i;
    }
    return MOERT_OK;
}

/* Marks an update's layers, or frees it after a failure. */
static moert_result settle(struct rt_rebalance *r, moert_result result, struct rt_update *u) {
    for (int i = 0; result == MOERT_OK && i < u->num_layers; i++)
        r->layers[u->layers[i].index].pending = true;
    if (result != MOERT_OK)
        rt_update_free(u);
    return result;
}

moert_result rt_rebalance_plan(struct rt_rebalance *r, int64_t iteration,
                               const double *const *load, struct rt_update *out) {
    int *changed = malloc(sizeof *changed * (size_t)r->num_layers), n = 0;
    *out = (struct rt_update){0};
    if (!changed)
        return rt_no_memory(sizeof *changed * (size_t)r->num_layers);
    moert_result result = plan_due(r, iteration, load, changed, &n);
    if (result == MOERT_OK)
        result = write_update(r, iteration, changed, n, out);
    free(changed);
    return settle(r, result, out);
}

/* ---- what another rank has planned ---- */

#define DAMAGED(...) rt_fail(MOERT_CORRUPT, "update: " __VA_ARGS__)

/* Copies bytes whose size fits their head. */
static moert_result take_bytes(const void *from, size_t size, struct rt_update *u) {
    struct head h;
    if (size < sizeof h)
        return DAMAGED("%zu bytes are too few", size);
    memcpy(&h, from, sizeof h);
    if (memcmp(h.magic, MAGIC, sizeof h.magic))
        return DAMAGED("these are not its bytes");
    if (h.version != VERSION)
        return rt_fail(MOERT_VERSION, "update: version %u, this build has %d", h.version,
                       VERSION);
    uint64_t need = sizeof h + (uint64_t)h.num_layers * sizeof *u->layers +
                    (uint64_t)h.num_moves * sizeof *u->moves +
                    (uint64_t)h.num_shares * sizeof *u->shares;
    if (need != size || h.iteration < 0)
        return DAMAGED("%zu bytes, not %llu", size, (unsigned long long)need);
    unsigned char *bytes = malloc(size);
    if (!bytes)
        return rt_no_memory(size);
    memcpy(bytes, from, size);
    point(u, bytes);
    return MOERT_OK;
}

/* Layers ascend and have their turn; moves and shares follow each other. */
static moert_result check_layers(const struct rt_rebalance *r, const struct rt_update *u) {
    const struct head *h = (const struct head *)u->bytes;
    int64_t moves = 0, shares = 0;
    for (int i = 0; i < u->num_layers; i++) {
        const struct rt_update_layer *l = &u->layers[i];
        if (l->index < (i ? l[-1].index + 1 : 0) || l->index >= r->num_layers)
            return DAMAGED("layer index %d", l->index);
        const struct layer *k = &r->layers[l->index];
        if (!rt_rebalance_due(r, u->iteration, l->index))
            return DAMAGED("layer %d has no turn in iteration %lld", k->layer,
                           (long long)u->iteration);
        if (k->pending)
            return rt_fail(MOERT_INVALID, "update: an earlier one of layer %d is under way",
                           k->layer);
        if (l->first_move != moves || l->num_moves < 0 || l->num_moves > k->slots ||
            l->first_share != shares ||
            (l->num_shares && (!k->share || l->num_shares != k->slots)))
            return DAMAGED("layer %d: %d moves, %d shares", k->layer, l->num_moves,
                           l->num_shares);
        moves += l->num_moves;
        shares += l->num_shares;
    }
    if (moves != h->num_moves || shares != h->num_shares)
        return DAMAGED("%u moves and %u shares", h->num_moves, h->num_shares);
    return MOERT_OK;
}

/* Sets next and next_share from the update. */
static moert_result follow(const struct layer *l, const struct rt_update *u,
                           const struct rt_update_layer *at) {
    int last = -1, ranks = l->limits.ranks;
    memcpy(l->next, l->expert_of_slot, sizeof *l->next * (size_t)l->slots);
    for (int i = 0; i < at->num_moves; i++) {
        const struct rt_move *m = &u->moves[at->first_move + i];
        if (m->slot <= last || m->slot >= l->slots || m->to < -1 ||
            m->to >= l->limits.experts || m->source < -1 || m->source >= ranks)
            return DAMAGED("layer %d, move %d: slot %d, expert %d from rank %d", l->layer, i,
                           m->slot, m->to, m->source);
        if (m->from != l->expert_of_slot[m->slot])
            return rt_fail(MOERT_INVALID,
                           "update: layer %d, slot %d holds expert %d here, %d where it was "
                           "planned",
                           l->layer, m->slot, l->expert_of_slot[m->slot], m->from);
        last = m->slot;
        l->next[m->slot] = m->to;
    }
    if (l->share)
        memcpy(l->next_share, at->num_shares ? u->shares + at->first_share : l->share,
               sizeof *l->share * (size_t)l->slots);
    return MOERT_OK;
}

/* What a slot and a rank may hold, and that no expert is lost. count: [E]; on_rank: [E], the last
 * rank that has it, from 1, and whether it came there. */
static moert_result keep_limits(const struct layer *l, int *count, int *on_rank) {
    const struct balance_problem *p = &l->limits;
    for (int s = 0; s < l->slots; s++) {
        int e = l->next[s], rank = s / p->slots_per_rank;
        bool moved = e != l->expert_of_slot[s];
        if (p->pin && p->pin[s] >= 0 && e != p->pin[s])
            return DAMAGED("layer %d, slot %d: expert %d is pinned there", l->layer, s,
                           p->pin[s]);
        if (e < 0)
            continue;
        if (moved && p->forbidden && p->forbidden[e * p->ranks + rank])
            return DAMAGED("layer %d: expert %d is forbidden on rank %d", l->layer, e, rank);
        if (on_rank[e] / 2 == rank + 1 && (moved || on_rank[e] % 2))
            return DAMAGED("layer %d: expert %d twice on rank %d", l->layer, e, rank);
        on_rank[e] = 2 * (rank + 1) + moved;
        count[e]++;
    }
    for (int e = 0; e < p->experts; e++)
        if (!count[e])
            return DAMAGED("layer %d: expert %d has no slot left", l->layer, e);
    return judge(l, l->next, MOERT_CORRUPT);
}

static moert_result check_limits(const struct layer *l) {
    size_t n = (size_t)l->limits.experts;
    int *memory = calloc(2 * n, sizeof *memory);
    if (!memory)
        return rt_no_memory(2 * n * sizeof *memory);
    moert_result r = keep_limits(l, memory, memory + n);
    free(memory);
    return r;
}

static moert_result check_hash(const struct rt_rebalance *r, const struct rt_update *u,
                               bool next, const char *expected) {
    char hash[64];
    RT_TRY(hash_layers(r, u, next, hash));
    if (!memcmp(hash, expected, sizeof hash))
        return MOERT_OK;
    return next
               ? DAMAGED("its layers do not become what its hash says")
               : rt_fail(MOERT_INVALID,
                         "update: the layers are not here what they were where it was planned");
}

static moert_result check_update(const struct rt_rebalance *r, const struct rt_update *u) {
    const struct head *h = (const struct head *)u->bytes;
    RT_TRY(check_layers(r, u));
    for (int i = 0; i < u->num_layers; i++)
        RT_TRY(follow(&r->layers[u->layers[i].index], u, &u->layers[i]));
    RT_TRY(check_hash(r, u, false, h->before));
    RT_TRY(check_hash(r, u, true, h->after));
    for (int i = 0; i < u->num_layers; i++)
        RT_TRY(check_limits(&r->layers[u->layers[i].index]));
    return MOERT_OK;
}

moert_result rt_rebalance_check(struct rt_rebalance *r, const void *bytes, size_t size,
                                struct rt_update *out) {
    *out = (struct rt_update){0};
    moert_result result = take_bytes(bytes, size, out);
    if (result == MOERT_OK)
        result = check_update(r, out);
    return settle(r, result, out);
}

/* ---- done, or not ---- */

void rt_rebalance_apply(struct rt_rebalance *r, const struct rt_update *u) {
    for (int i = 0; i < u->num_layers; i++) {
        struct layer *l = &r->layers[u->layers[i].index];
        follow(l, u, &u->layers[i]);
        memcpy(l->expert_of_slot, l->next, sizeof *l->next * (size_t)l->slots);
        if (l->share)
            memcpy(l->share, l->next_share, sizeof *l->share * (size_t)l->slots);
    }
    rt_rebalance_drop(r, u);
}

void rt_rebalance_drop(struct rt_rebalance *r, const struct rt_update *u) {
    for (int i = 0; i < u->num_layers; i++)
        r->layers[u->layers[i].index].pending = false;
}
