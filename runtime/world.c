/* Several ranks: their arenas, the table of peers, and who did not answer. */
#include "internal.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DEFAULT_TIMEOUT_MS = 100000 };

/* ---- the local world: every rank is a context of this process, on one device ---- */

static moert_result local_gather(moert_world *w, struct rt_word *all) {
    for (int r = 0; r < w->ranks; r++) {
        if (!w->member[r].context)
            return rt_fail(MOERT_INVALID, "rank %d of %d has no context yet", r, w->ranks);
        all[r] = w->member[r].word;
    }
    return MOERT_OK;
}

static moert_result local_reach(moert_world *w, int rank, int peer, void **out) {
    (void)rank;
    *out = w->member[peer].context->arena;
    return MOERT_OK;
}

static const struct rt_world_ops local_ops = {.gather = local_gather, .reach = local_reach};

/* ---- worlds ---- */

static moert_result new_world(const struct rt_world_ops *ops, moert_world_config *cfg,
                              const moert_world_config *given, moert_world **out) {
    if (!out)
        return rt_fail(MOERT_INVALID, "a world: out must be given");
    *out = NULL;
    RT_TRY(rt_config(cfg, sizeof *cfg, given, "moert_world_config"));
    int ms = cfg->timeout_ms ? cfg->timeout_ms : DEFAULT_TIMEOUT_MS;
    if (cfg->timeout_ms < 0)
        return rt_fail(MOERT_INVALID, "moert_world_config: timeout_ms is %d", cfg->timeout_ms);
    if (cfg->ranks < 0 || cfg->ranks > MOE_MAX_RANKS || (!cfg->ranks && ops == &local_ops))
        return rt_fail(MOERT_INVALID, "moert_world_config: %d ranks, expected 1 to %d",
                       cfg->ranks, MOE_MAX_RANKS);
    moert_world *w = calloc(1, sizeof *w);
    if (!w)
        return rt_no_memory(sizeof *w);
    w->ops = ops;
    w->own = -1;
    w->ranks = cfg->ranks;
    w->timeout_ns = (uint64_t)ms * 1000000;
    *out = w;
    return MOERT_OK;
}

moert_result moert_world_local(const moert_world_config *given, moert_world **out) {
    moert_world_config cfg = MOERT_WORLD_CONFIG_INIT;
    RT_TRY(new_world(&local_ops, &cfg, given, out));
    if (!cfg.rank && !cfg.address && !cfg.nccl)
        return MOERT_OK;
    moert_world_destroy(*out);
    *out = NULL;
    return rt_fail(MOERT_INVALID,
                   "moert_world_config: rank, address and nccl are for worlds of "
                   "processes");
}

moert_result moert_world_processes(const moert_world_config *given, moert_world **out) {
    moert_world_config cfg = MOERT_WORLD_CONFIG_INIT;
    RT_TRY(new_world(&rt_process_ops, &cfg, given, out));
    moert_result r = rt_world_meet(*out, &cfg);
    if (r != MOERT_OK) {
        moert_world_destroy(*out);
        *out = NULL;
    }
    return r;
}

int moert_world_rank(const moert_world *w) {
    return w ? w->own : -1;
}

void moert_world_destroy(moert_world *w) {
    if (w && w->ops->close)
        w->ops->close(w);
    free(w);
}

static int64_t arena_bytes(const moert_bundle *b) {
    struct moe_peers ignored;
    int64_t most = 0;
    for (uint32_t i = 0; i < b->count[MOE_SECTION_CLASS]; i++) {
        int64_t bytes =
            b->classes[i].ranks > 1 ? moe_arena_layout(&b->classes[i], &ignored) : 0;
        most = bytes > most ? bytes : most;
    }
    return most;
}

size_t moert_arena_bytes(const moert_bundle *b) {
    return b ? (size_t)arena_bytes(b) : 0;
}

/* ---- joining ---- */

static moert_result check_plan(const moert_bundle *b) {
    for (uint32_t i = 0; i < b->count[MOE_SECTION_CLASS]; i++)
        if (b->classes[i].max_replicas > 1 && b->balance->dispatch == MOE_DISPATCH_BALANCED)
            return rt_fail(MOERT_UNSUPPORTED,
                           "the bundle's dispatch is balanced, which this version of libmoert "
                           "cannot do for experts with several replicas (build it with "
                           "dispatch: share)");
    return MOERT_OK;
}

moert_result rt_world_check(const moert_bundle *b, const moert_world *w, int rank) {
    int ranks = b->count[MOE_SECTION_CLASS] ? b->classes[0].ranks : 1;
    if (!w && ranks > 1)
        return rt_fail(MOERT_INVALID,
                       "the bundle is planned for %d ranks: moert_context_config needs a world",
                       ranks);
    if (!w)
        return MOERT_OK;
    if (w->ranks != ranks)
        return rt_fail(MOERT_INVALID, "the bundle is planned for %d ranks, the world has %d",
                       ranks, w->ranks);
    if (rank < 0 || rank >= ranks)
        return rt_fail(MOERT_INVALID, "rank %d of a world of %d", rank, ranks);
    if (w->own >= 0 && rank != w->own)
        return rt_fail(MOERT_INVALID, "this process is rank %d, not %d", w->own, rank);
    if (w->member[rank].context)
        return rt_fail(MOERT_INVALID, "rank %d has a context already", rank);
    return ranks > 1 ? check_plan(b) : MOERT_OK;
}

/* $MOERT_NODE, else the boot of this machine, which no other node has. */
static void name_node(char *out, size_t size) {
    const char *given = getenv("MOERT_NODE");
    FILE *f = given ? NULL : fopen("/proc/sys/kernel/random/boot_id", "r");
    if (given)
        snprintf(out, size, "%s", given);
    else if (!f || !fgets(out, (int)size, f))
        snprintf(out, size, "?");
    if (f)
        fclose(f);
}

moert_result rt_world_join(moert_context *c, moert_world *w, int rank) {
    size_t bytes = (size_t)arena_bytes(c->bundle);
    if (w->ranks == 1) /* nothing to exchange */
        return MOERT_OK;
    c->world = w;
    c->rank = rank;
    if (w->own >= 0)
        RT_TRY(c->ops->alloc_shared(c->device, bytes, (void **)&c->arena, &c->arena_fd));
    else
        RT_TRY(c->ops->alloc(c->device, bytes, (void **)&c->arena));
    RT_TRY(c->ops->set(c->device, c->arena, 0, bytes));
    RT_TRY(c->ops->alloc(c->device, (size_t)w->ranks * sizeof *c->peers, (void **)&c->peers));
    RT_TRY(c->ops->alloc_host(c->device, sizeof *c->status, (void **)&c->status));
    memset(c->status, 0, sizeof *c->status);
    struct rt_member *m = &w->member[rank];
    *m = (struct rt_member){.context = c, .word = {.arena_bytes = bytes}};
    snprintf(m->word.plan, sizeof m->word.plan, "%s",
             rt_bundle_file(c->bundle, "plan.bin")->hash);
    name_node(m->word.node, sizeof m->word.node);
    return MOERT_OK;
}

void rt_world_leave(moert_context *c) {
    if (!c->world)
        return;
    moert_world *w = c->world;
    if (w->member[c->rank].context == c) {
        if (w->ops->leave)
            w->ops->leave(w);
        w->member[c->rank] = (struct rt_member){0};
        w->connected = w->connected && w->excluded[c->rank]; /* the others go on without it */
    }
    if (c->arena && w->own < 0)
        c->ops->free(c->device, c->arena);
    if (c->arena && w->own >= 0) {
        c->ops->unmap_shared(c->device, c->arena, (size_t)arena_bytes(c->bundle));
        close(c->arena_fd);
    }
    if (c->peers)
        c->ops->free(c->device, c->peers);
    if (c->status)
        c->ops->free_host(c->device, c->status);
}

static moert_result check_alike(const struct rt_word *all, int ranks) {
    for (int r = 1; r < ranks; r++) {
        if (all[r].arena_bytes != all[0].arena_bytes)
            return rt_fail(MOERT_INVALID, "rank %d has an arena of %llu bytes, rank 0 of %llu",
                           r, (unsigned long long)all[r].arena_bytes,
                           (unsigned long long)all[0].arena_bytes);
        if (strcmp(all[r].plan, all[0].plan) != 0)
            return rt_fail(MOERT_INVALID, "rank %d runs another plan than rank 0", r);
    }
    return MOERT_OK;
}

/* Between enter and leave of the device. */
static moert_result upload_peers(moert_world *w, int rank) {
    const moert_context *c = w->member[rank].context;
    void *peers[MOE_MAX_RANKS];
    for (int p = 0; p < w->ranks; p++)
        if (!rt_world_lives(w, p))
            peers[p] = NULL;
        else
            RT_TRY(w->ops->reach(w, rank, p, &peers[p]));
    return c->ops->upload(c->device, c->peers, peers, (size_t)w->ranks * sizeof *peers);
}

/* Tells the context of a rank of this process where its peers' arenas are. */
static moert_result tell(moert_world *w, int rank) {
    const moert_context *c = w->member[rank].context;
    RT_TRY(c->ops->enter(c->device));
    moert_result r = upload_peers(w, rank);
    c->ops->leave(c->device);
    return r;
}

moert_result moert_world_connect(moert_world *w) {
    struct rt_word all[MOE_MAX_RANKS] = {{0}};
    if (!w)
        return rt_fail(MOERT_INVALID, "moert_world_connect: the world must be given");
    w->connected = false; /* until all of it has been done again */
    if (w->ranks > 1) {
        RT_TRY(w->ops->gather(w, all));
        RT_TRY(check_alike(all, w->ranks));
        if (w->ops->trade)
            RT_TRY(w->ops->trade(w));
    }
    for (int r = 0; r < w->ranks; r++)
        if (w->member[r].context)
            RT_TRY(tell(w, r));
    w->connected = true;
    return MOERT_OK;
}

/* ---- faults ---- */

static const char *phase_name(int phase) {
    return phase == MOE_PHASE_DISPATCH ? "dispatch" : "combine";
}

moert_result rt_world_fault(const moert_context *c) {
    char list[5 * MOE_MAX_RANKS] = "";
    int n = 0;
    if (!c->world || !__atomic_load_n(&c->status->failed, __ATOMIC_ACQUIRE))
        return MOERT_OK;
    const struct moe_status *s = c->status;
    for (int r = 0; r < c->world->ranks; r++)
        if (s->missing[r])
            n += snprintf(list + n, sizeof list - (size_t)n, "%s%d", n ? ", " : "", r);
    return rt_fail(MOERT_PEER, "rank %d gave up waiting for rank %d in %s %u%s; missing: %s",
                   c->rank, s->peer, phase_name(s->phase), s->epoch,
                   __atomic_load_n(&s->abort, __ATOMIC_RELAXED) ? ", aborted" : "", list);
}

moert_result moert_world_check(moert_world *w) {
    if (!w)
        return rt_fail(MOERT_INVALID, "moert_world_check: the world must be given");
    for (int r = 0; r < w->ranks; r++)
        if (w->member[r].context && rt_world_lives(w, r))
            RT_TRY(rt_world_fault(w->member[r].context));
    return MOERT_OK;
}

void moert_world_abort(moert_world *w) {
    for (int r = 0; w && r < w->ranks; r++)
        if (w->member[r].context)
            __atomic_store_n(&w->member[r].context->status->abort, 1, __ATOMIC_RELEASE);
}

/* ---- leaving a rank out ---- */

bool rt_world_lives(const moert_world *w, int rank) {
    return rank >= 0 && rank < w->ranks && !w->excluded[rank];
}

/* Every expert of every layer must have a slot on a rank that is left. */
static moert_result check_experts(const moert_world *w, const moert_bundle *b, int rank) {
    for (uint32_t i = 0; i < b->count[MOE_SECTION_LAYER]; i++) {
        const struct moe_plan_layer *l = &b->layers[i];
        const struct moe_plan_class *c = &b->classes[l->class_index];
        const int32_t *expert = b->tables + l->expert_of_slot;
        int total = c->ranks * c->slots_per_rank;
        for (int s = rank * c->slots_per_rank; s < (rank + 1) * c->slots_per_rank; s++) {
            bool other = expert[s] < 0;
            for (int o = 0; o < total && !other; o++)
                other = expert[o] == expert[s] && o / c->slots_per_rank != rank &&
                        rt_world_lives(w, o / c->slots_per_rank);
            if (!other)
                return rt_fail(MOERT_INVALID,
                               "rank %d cannot be left out: no other has expert %d of layer %d",
                               rank, expert[s], l->layer);
        }
    }
    return MOERT_OK;
}

/* A rank of this process begins anew, with those that are left. */
static moert_result begin_anew(moert_world *w, int rank) {
    moert_context *c = w->member[rank].context;
    struct moe_arena_head head = {.generation = (unsigned)w->generation};
    RT_TRY(tell(w, rank));
    RT_TRY(c->ops->enter(c->device));
    moert_result r = c->ops->sync(c->device, NULL);
    /* Flags stay: those of peers that are ahead are of this generation, others match none. */
    if (r == MOERT_OK)
        r = c->ops->upload(c->device, c->arena, &head,
                           offsetof(struct moe_arena_head, dispatched));
    for (moert_layer *l = c->layers; l && r == MOERT_OK; l = l->next)
        r = rt_layer_replicas(l);
    c->ops->leave(c->device);
    memset(c->status, 0, sizeof *c->status);
    return r;
}

moert_result moert_exclude_rank(moert_world *w, int rank) {
    if (!w || !w->connected)
        return rt_fail(MOERT_INVALID, "moert_exclude_rank: the world must be connected");
    if (!rt_world_lives(w, rank))
        return rt_fail(MOERT_INVALID, "moert_exclude_rank: no rank %d of %d is there", rank,
                       w->ranks);
    if (w->far)
        return rt_fail(MOERT_UNSUPPORTED,
                       "moert_exclude_rank: NCCL's communicator has all ranks");
    for (int r = 0; r < w->ranks; r++)
        if (w->member[r].context)
            RT_TRY(check_experts(w, w->member[r].context->bundle, rank));
    w->excluded[rank] = true;
    w->generation++;
    for (int r = 0; r < w->ranks; r++)
        if (w->member[r].context && rt_world_lives(w, r))
            RT_TRY(begin_anew(w, r));
    return MOERT_OK;
}

/* ---- collectives ---- */

struct blocks { /* one per rank, at these offsets into arenas */
    long long from, to;
    size_t bytes;
    bool gather; /* the one at `from` is for all */
};

/* Every rank fetches its blocks, which are in reach and said to be there; out of reach, NCCL. */
static moert_result fetch(const moert_layer *l, const struct blocks *b, moert_stream s) {
    const moert_context *c = l->context;
    moert_world *w = c->world;
    if (w->far)
        return b->bytes ? rt_nccl_move(w, c->arena + b->from, b->gather ? 0 : b->bytes,
                                       c->arena + b->to, b->bytes, s)
                        : MOERT_OK;
    for (int p = 0; p < w->ranks && b->bytes; p++) {
        void *arena;
        if (!rt_world_lives(w, p))
            continue;
        RT_TRY(w->ops->reach(w, c->rank, p, &arena));
        RT_TRY(
            c->ops->copy(c->device, c->arena + b->to + (size_t)p * b->bytes,
                         (char *)arena + b->from + (b->gather ? 0 : (size_t)c->rank * b->bytes),
                         b->bytes, s));
    }
    return MOERT_OK;
}

moert_result rt_world_collect(const moert_layer *l, const struct moe_peers *x, int flags,
                              moert_stream s) {
    size_t rows = (size_t)x->stride, choices = rows * (size_t)l->c->topk * 4;
    size_t hidden = rows * (size_t)l->c->hidden;
    size_t scales = rows * (size_t)((l->c->hidden + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK) * 4;
    bool gather = flags & MOE_LAUNCH_GATHER, fp8 = moe_is_fp8(l->c);
    const struct blocks there[] = {{x->sent_ids, x->ids, choices, gather},
                                   {x->sent_weights, x->weights, choices, gather},
                                   {x->sent_hidden, x->hidden, hidden * (fp8 ? 1 : 2), gather},
                                   {x->sent_scales, x->scales, fp8 ? scales : 0, gather}};
    const struct blocks back = {x->partials, x->sums, hidden * 2, false};
    bool far = l->context->world->far;
    if (far)
        RT_TRY(rt_nccl_begin());
    moert_result r = flags & MOE_LAUNCH_BACK ? fetch(l, &back, s) : MOERT_OK;
    for (int i = 0; i < 4 && r == MOERT_OK && !(flags & MOE_LAUNCH_BACK); i++)
        r = fetch(l, &there[i], s);
    if (far && r != MOERT_OK)
        rt_nccl_cancel();
    return r != MOERT_OK || !far ? r : rt_nccl_end();
}

/* ---- forward of all ranks ---- */

#define STAGE(name) (1u << MOE_STAGE_##name)
/* Each phase waits for what all ranks did in the phase before. */
static const unsigned phases[] = {
    STAGE(ROUTE) | STAGE(ROUTE_LOGITS) | STAGE(DISPATCH_SEND) | STAGE(SHARED),
    STAGE(DISPATCH_WAIT) | STAGE(PREPARE) | STAGE(EXPERTS) | STAGE(COMBINE_SEND),
    STAGE(COMBINE_WAIT) | STAGE(COMBINE),
};
enum { PHASES = sizeof phases / sizeof *phases };

struct turn { /* one rank's */
    moert_io io;
    unsigned stages;
};

static moert_result check_turn(const moert_world *w, int rank, moert_layer *l,
                               const moert_io *io, struct turn *out, int64_t *chunks) {
    out->stages = (1u << MOE_STAGE_COUNT) - 1 - STAGE(FILL) - STAGE(ROUTE_LOGITS);
    if (!l || l->context != w->member[rank].context)
        return rt_fail(MOERT_INVALID, "layers[%d] is no layer of rank %d", rank, rank);
    int64_t n;
    RT_TRY(rt_io(l, io, &out->stages, &out->io, &n));
    if (*chunks >= 0 && n != *chunks)
        return rt_fail(MOERT_INVALID,
                       "ios[%d]: its rank_tokens make %lld passes, those before it %lld", rank,
                       (long long)n, (long long)*chunks);
    *chunks = n;
    return MOERT_OK;
}

moert_result moert_world_forward(moert_world *w, moert_layer *const *layers,
                                 const moert_io *ios, moert_stream s) {
    struct turn turn[MOE_MAX_RANKS];
    int64_t chunks = -1;
    if (!w || !layers || !ios)
        return rt_fail(MOERT_INVALID, "moert_world_forward: world, layers and ios are needed");
    if (w->own >= 0)
        return rt_fail(MOERT_INVALID,
                       "moert_world_forward: rank %d is in a process of its own, "
                       "which calls moert_forward",
                       w->own);
    if (w->ranks == 1)
        return moert_forward(layers[0], ios, s);
    for (int r = 0; r < w->ranks; r++)
        if (rt_world_lives(w, r))
            RT_TRY(check_turn(w, r, layers[r], &ios[r], &turn[r], &chunks));
    for (int64_t i = 0; i < chunks; i++)
        for (int p = 0; p < PHASES; p++)
            for (int r = 0; r < w->ranks; r++)
                if (rt_world_lives(w, r))
                    RT_TRY(rt_forward_chunk(layers[r], &turn[r].io, i,
                                            turn[r].stages & phases[p], s));
    return MOERT_OK;
}
