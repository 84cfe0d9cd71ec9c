/* Where experts live: what the policy says, then the built-in planner for what it leaves out, then
 * shares and judgement, layer by layer on threads. */
#include "balance.h"
#include "policy.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* ---- counts: made, and placed when they are given ---- */

void place_counts(int experts, int slots, int most, const double *load, int *count) {
    for (int e = 0; e < experts; e++)
        count[e] = 1;
    for (int used = experts; used < slots; used++) {
        int best = -1;
        for (int e = 0; e < experts; e++)
            if (count[e] < most && (best < 0 || load[e] / count[e] > load[best] / count[best]))
                best = e;
        if (best < 0)
            return;
        count[best]++;
    }
}

struct packing {
    const struct balance_problem *b;
    int experts, ranks, spr;
    const double *load;
    const int *count;
    int *slot;   /* expert_of_slot; a rank's pinned experts come first */
    int *used;   /* [R] slots of a rank that are filled */
    int *pinned; /* [R] and how many of them are pinned */
    int *left;   /* [E] replicas that have no slot yet */
    double *rank_load;
};

static double replica_load(const struct packing *p, int e) {
    return p->load[e] / p->count[e];
}

static bool holds(const struct packing *p, int rank, int expert) {
    for (int s = 0; s < p->used[rank]; s++)
        if (p->slot[rank * p->spr + s] == expert)
            return true;
    return false;
}

static bool banned(const struct packing *p, int rank, int expert) {
    return p->b->forbidden && p->b->forbidden[expert * p->ranks + rank];
}

static int room(const struct packing *p, int rank) {
    return (p->b->capacity ? p->b->capacity[rank] : p->spr) - p->used[rank];
}

/* A rank's time with a load. */
static double time_of(const struct packing *p, int rank, double load) {
    return p->b->speed ? load / p->b->speed[rank] : load;
}

static double rank_time(const struct packing *p, int rank) {
    return time_of(p, rank, p->rank_load[rank]);
}

/* When one more replica of the expert is there. */
static double rank_end(const struct packing *p, int rank, int expert) {
    double more = p->b->speed ? replica_load(p, expert) : 0; /* alike: the same on all */
    return time_of(p, rank, p->rank_load[rank] + more);
}

/* The rank with room that does not hold the expert where it ends earliest; when there is none, one that does; -1
 * when it may live on none that has room. */
static int choose_rank(const struct packing *p, int expert) {
    int best = -1, second = -1;
    for (int r = 0; r < p->ranks; r++) {
        int *to = holds(p, r, expert) ? &second : &best;
        if (room(p, r) > 0 && !banned(p, r, expert) &&
            (*to < 0 || rank_end(p, r, expert) < rank_end(p, *to, expert)))
            *to = r;
    }
    return best >= 0 ? best : second;
}

static void put(struct packing *p, int rank, int expert) {
    p->slot[rank * p->spr + p->used[rank]++] = expert;
    p->rank_load[rank] += replica_load(p, expert);
    p->left[expert]--;
}

struct heavy {
    bool limited; /* to some ranks */
    double load;
    int expert;
};

static int heavier(const void *x, const void *y) {
    const struct heavy *a = x, *b = y;
    if (a->limited != b->limited)
        return a->limited ? -1 : 1;
    if (a->load != b->load)
        return a->load > b->load ? -1 : 1;
    return a->expert - b->expert;
}

static bool fill(struct packing *p) {
    struct heavy *order = calloc((size_t)p->experts, sizeof *order);
    bool ok = true;
    if (!order)
        abort();
    for (int e = 0; e < p->experts; e++) {
        order[e] = (struct heavy){false, replica_load(p, e), e};
        for (int r = 0; r < p->ranks; r++)
            order[e].limited = order[e].limited || banned(p, r, e);
    }
    qsort(order, (size_t)p->experts, sizeof *order, heavier);
    for (int i = 0; i < p->experts && ok; i++)
        while (p->left[order[i].expert] > 0 && ok) {
            int r = choose_rank(p, order[i].expert);
            if ((ok = r >= 0))
                put(p, r, order[i].expert);
        }
    free(order);
    return ok;
}

/* Exchanges two full slots of different ranks. */
static void exchange(struct packing *p, int a, int b) {
    int ra = a / p->spr, rb = b / p->spr, ea = p->slot[a], eb = p->slot[b];
    double d = replica_load(p, ea) - replica_load(p, eb);
    p->slot[a] = eb;
    p->slot[b] = ea;
    p->rank_load[ra] -= d;
    p->rank_load[rb] += d;
}

/* The larger time of both ranks after an exchange of two full slots. */
static double after(const struct packing *p, int a, int b) {
    double d = replica_load(p, p->slot[a]) - replica_load(p, p->slot[b]);
    double x = time_of(p, a / p->spr, p->rank_load[a / p->spr] - d);
    double y = time_of(p, b / p->spr, p->rank_load[b / p->spr] + d);
    return x > y ? x : y;
}

/* The slot on another rank that a's expert goes to with the smallest larger time, below `best`;
 * neither rank gets an expert that it has or may not have. -1: none. */
static int best_partner(const struct packing *p, int a, double *best) {
    int rank = a / p->spr, found = -1;
    for (int r = 0; r < p->ranks; r++) {
        if (r == rank || holds(p, r, p->slot[a]) || banned(p, r, p->slot[a]))
            continue;
        for (int b = r * p->spr + p->pinned[r]; b < r * p->spr + p->used[r]; b++) {
            double time = after(p, a, b);
            if (time < *best && !holds(p, rank, p->slot[b]) && !banned(p, rank, p->slot[b])) {
                *best = time;
                found = b;
            }
        }
    }
    return found;
}

/* A slot, not pinned, whose expert has another slot on the same rank, from `from` on; -1: none. */
static int next_double(const struct packing *p, int from) {
    for (int a = from; a < p->ranks * p->spr; a++)
        for (int b = a / p->spr * p->spr; b < a; b++)
            if (p->slot[a] >= 0 && a % p->spr >= p->pinned[a / p->spr] &&
                p->slot[a] == p->slot[b])
                return a;
    return -1;
}

/* Every exchange ends one double and begins none. */
static void part_doubles(struct packing *p) {
    for (int a = -1; (a = next_double(p, a + 1)) >= 0;) {
        double best = HUGE_VAL;
        int b = best_partner(p, a, &best);
        if (b >= 0)
            exchange(p, a, b);
    }
}

/* The exchange of a slot of the hottest rank that lowers the larger of both ranks the most. False
 * when none does. */
static bool swap_best(struct packing *p) {
    int hot = 0, from = -1, to = -1;
    for (int r = 1; r < p->ranks; r++)
        if (rank_time(p, r) > rank_time(p, hot))
            hot = r;
    double best = rank_time(p, hot) * (1 - 1e-9);
    for (int a = hot * p->spr + p->pinned[hot]; a < hot * p->spr + p->used[hot]; a++) {
        int b = best_partner(p, a, &best);
        if (b >= 0) {
            from = a;
            to = b;
        }
    }
    if (from >= 0)
        exchange(p, from, to);
    return from >= 0;
}

/* Pinned experts are the first of their rank while the others are placed. */
static bool put_pins(struct packing *p, const int *pin) {
    for (int s = 0; pin && s < p->ranks * p->spr; s++) {
        if (pin[s] < 0)
            continue;
        if (!p->left[pin[s]] || banned(p, s / p->spr, pin[s]) || room(p, s / p->spr) < 1)
            return false;
        put(p, s / p->spr, pin[s]);
        p->pinned[s / p->spr]++;
    }
    return true;
}

/* Brings a rank's pinned experts to their slots. */
static void settle_pins(struct packing *p, const int *pin) {
    int *old = calloc((size_t)p->spr, sizeof *old);
    if (!old)
        abort();
    for (int r = 0; pin && r < p->ranks; r++) {
        int *slot = p->slot + r * p->spr, next = p->pinned[r];
        memcpy(old, slot, sizeof *old * (size_t)p->spr);
        for (int s = 0; s < p->spr; s++)
            slot[s] = pin[r * p->spr + s] >= 0 ? pin[r * p->spr + s] : old[next++];
    }
    free(old);
}

bool place_counted(const struct balance_problem *b, const double *load, const int *count,
                   int *expert_of_slot) {
    int R = b->ranks, slots = R * b->slots_per_rank;
    int *memory = calloc(2 * (size_t)R + (size_t)b->experts, sizeof *memory);
    struct packing p = {b,
                        b->experts,
                        R,
                        b->slots_per_rank,
                        load,
                        count,
                        expert_of_slot,
                        memory,
                        memory + R,
                        memory + 2 * R,
                        calloc((size_t)R, sizeof(double))};
    if (!memory || !p.rank_load)
        abort();
    memcpy(p.left, count, sizeof *count * (size_t)b->experts);
    for (int i = 0; i < slots; i++)
        expert_of_slot[i] = -1;
    bool ok = put_pins(&p, b->pin) && fill(&p);
    if (ok)
        part_doubles(&p);
    for (int i = 0; ok && i < slots && swap_best(&p); i++)
        ;
    settle_pins(&p, b->pin);
    free(memory);
    free(p.rank_load);
    return ok;
}

/* ---- limits ---- */

bool place_limited(const struct deployment *dep) {
    const struct placement_limits *l = &dep->limits;
    return dep->cluster->rank_slots || dep->cluster->rank_speed || l->keep_groups_in_nodes ||
           l->max_replicas || l->max_replicas_per_node;
}

void place_limits(const struct deployment *dep, struct balance_problem *b) {
    const struct cluster *c = dep->cluster;
    const struct placement_limits *l = &dep->limits;
    b->capacity = c->rank_slots;
    b->speed = c->rank_speed;
    b->groups = l->keep_groups_in_nodes ? dep->model->router.n_group : 0;
    b->cross_node_slots = l->cross_node_slots;
    b->max_replicas = l->max_replicas;
    b->max_per_node = l->max_replicas_per_node;
    if (b->groups || b->max_per_node)
        b->ranks_per_node = c->ranks < c->ranks_per_node ? c->ranks : c->ranks_per_node;
}

int place_usable(const struct deployment *dep) {
    const struct cluster *c = dep->cluster;
    int slots = dep->num_slots ? dep->num_slots : dep->model->num_experts, sum = 0;
    for (int r = 0; c->rank_slots && r < c->ranks; r++)
        sum += c->rank_slots[r];
    return c->rank_slots && sum < slots ? sum : slots;
}

/* ---- the layers ---- */

/* How a layer came to its placement. */
enum origin { BY_ENGINE, BY_POLICY, BY_COUNTS, BY_FILE, BY_ORDER };

struct layer {
    enum origin origin;
    struct balance_problem problem;
    bool loaded; /* some workload has recorded this layer */
    const int *count;
    int *expert_of_slot;
    double *share;
    const char *error; /* of balance_check, or NULL */
};

struct placer {
    struct arena *arena;
    struct diags *diags;
    const struct deployment *dep;
    struct policy *policy;
    struct policy_world world;
    struct placement *out;
    struct layer *layers;
    atomic_int next; /* layer that no thread has taken */
    int *count;      /* [layers][E], of the policy's replicate */
};

static int slots_of(const struct placer *p) {
    return p->out->ranks * p->out->slots_per_rank;
}

static const struct assignment *find(const struct assignment *list, int n, int layer) {
    for (int i = 0; i < n; i++)
        if (list[i].layer == layer)
            return &list[i];
    return NULL;
}

/* Loads [W][E] and weights of a layer; equal loads when nothing was recorded. */
static void set_loads(struct placer *p, struct layer *l, int layer) {
    const struct loads *loads = p->dep->loads;
    int E = p->out->experts, row = loads ? loads_layer(loads, layer) : -1;
    int W = row < 0 ? 1 : loads->num_workloads;
    double *load = arena_array(p->arena, double, (size_t)W *E);
    double *weight = arena_array(p->arena, double, W);
    const double *given = p->out->constraints ? p->out->constraints->workload_weights : NULL;
    l->loaded = row >= 0;
    for (int w = 0; w < W; w++) {
        weight[w] = row < 0 ? 1 : given ? given[w] : loads->workloads[w].weight;
        for (int e = 0; e < E; e++)
            load[w * E + e] = row < 0 ? 1 : loads->workloads[w].count[(size_t)row * E + e];
    }
    l->problem.workloads = W;
    l->problem.load = load;
    l->problem.weight = weight;
}

static void set_constraints(struct placer *p, struct layer *l, int layer) {
    const struct constraints *c = p->out->constraints;
    int R = p->out->ranks, n = slots_of(p);
    int *pin = NULL;
    uint8_t *forbidden = NULL;
    for (int i = 0; c && i < c->num_pins; i++)
        if (c->pins[i].layer == layer) {
            if (!pin)
                memset(pin = arena_array(p->arena, int, n), -1, sizeof *pin * (size_t)n);
            pin[c->pins[i].slot] = c->pins[i].expert;
        }
    for (int i = 0; c && i < c->num_forbidden; i++)
        if (c->forbidden[i].layer == layer) {
            if (!forbidden)
                forbidden = arena_array(p->arena, uint8_t, (size_t)p->out->experts * R);
            forbidden[c->forbidden[i].expert * R + c->forbidden[i].rank] = 1;
        }
    l->problem.pin = pin;
    l->problem.forbidden = forbidden;
}

/* What --moves says, else what the policy allows an update. */
static int moves_allowed(const struct placer *p) {
    const struct constraints *c = p->out->constraints;
    return c && c->move_budget >= 0 && p->dep->moves < 0 ? c->move_budget : p->dep->moves;
}

static void set_layer(struct placer *p, int i) {
    static const enum balance_split splits[] = {
        [DISPATCH_ROUNDROBIN] = BALANCE_EVEN,
        [DISPATCH_EVEN] = BALANCE_EVEN,
        [DISPATCH_SHARE] = BALANCE_SHARE,
        [DISPATCH_BALANCED] = BALANCE_BALANCED,
    };
    struct layer *l = &p->layers[i];
    int layer = p->out->layers[i];
    const struct assignment *start = find(p->dep->start, p->dep->num_start, layer);
    l->problem = (struct balance_problem){.experts = p->out->experts,
                                          .ranks = p->out->ranks,
                                          .slots_per_rank = p->out->slots_per_rank,
                                          .split = splits[p->dep->dispatch],
                                          .current = start ? start->expert_of_slot : NULL,
                                          .moves = start ? moves_allowed(p) : -1,
                                          .seed = (uint64_t)layer};
    l->expert_of_slot = p->out->expert_of_slot + (size_t)i * (size_t)slots_of(p);
    l->share = p->out->share_of_slot + (size_t)i * (size_t)slots_of(p);
    place_limits(p->dep, &l->problem);
    set_loads(p, l, layer);
    set_constraints(p, l, layer);
}

/* Without loads and without spare slots there is nothing to gain: experts in order. */
static bool in_order(const struct placer *p, const struct layer *l) {
    int slots = p->dep->num_slots;
    return !l->loaded && (!slots || slots == p->out->experts) && !l->problem.pin &&
           !l->problem.forbidden && !l->problem.current && !place_limited(p->dep);
}

/* Where a layer's placement was given. */
static struct loc given_at(const struct placer *p, int i) {
    return find(p->dep->assignments, p->dep->num_assignments, p->out->layers[i])->loc;
}

static void choose_origin(struct placer *p, int i) {
    struct layer *l = &p->layers[i];
    const struct assignment *given =
        find(p->dep->assignments, p->dep->num_assignments, p->out->layers[i]);
    l->count = p->count ? p->count + (size_t)i * p->out->experts : NULL;
    if (given) {
        l->origin = BY_FILE;
        memcpy(l->expert_of_slot, given->expert_of_slot, sizeof(int) * (size_t)slots_of(p));
    } else if (p->policy->defines[HOOK_place]) {
        l->origin = BY_POLICY;
    } else if (l->count) {
        l->origin = BY_COUNTS;
    } else {
        l->origin = in_order(p, l) ? BY_ORDER : BY_ENGINE;
    }
}

/* ---- one layer, on any thread ---- */

/* Sum over workloads, each normalised and weighted. */
static void total_load(const struct balance_problem *b, double *total) {
    for (int e = 0; e < b->experts; e++)
        total[e] = 0;
    for (int w = 0; w < b->workloads; w++) {
        double sum = 0;
        for (int e = 0; e < b->experts; e++)
            sum += b->load[w * b->experts + e];
        for (int e = 0; sum > 0 && e < b->experts; e++)
            total[e] += b->load[w * b->experts + e] / sum * b->weight[w];
    }
}

/* Equal parts or, when the dispatcher wants fixed fractions, those of the best split of the load. */
static void set_shares(struct layer *l) {
    const struct balance_problem *b = &l->problem;
    int n = b->ranks * b->slots_per_rank, count[BALANCE_MAX_EXPERTS] = {0};
    for (int s = 0; s < n; s++)
        if (l->expert_of_slot[s] >= 0)
            count[l->expert_of_slot[s]]++;
    for (int s = 0; s < n; s++)
        l->share[s] = l->expert_of_slot[s] < 0 ? 0 : 1.0 / count[l->expert_of_slot[s]];
    if (b->split != BALANCE_SHARE)
        return;
    static const double scale = 1 << 30;
    double total[BALANCE_MAX_EXPERTS], sum = 0;
    int64_t tokens[BALANCE_MAX_EXPERTS];
    int64_t *of_slot = malloc(sizeof *of_slot * (size_t)n);
    if (!of_slot)
        abort();
    total_load(b, total);
    for (int e = 0; e < b->experts; e++)
        sum += total[e];
    for (int e = 0; e < b->experts; e++)
        tokens[e] = sum > 0 ? (int64_t)(total[e] / sum * scale) : 0;
    balance_split_batch(b->experts, b->ranks, b->slots_per_rank, l->expert_of_slot, b->speed,
                        tokens, of_slot);
    for (int s = 0; s < n; s++)
        if (l->expert_of_slot[s] >= 0 && tokens[l->expert_of_slot[s]])
            l->share[s] = (double)of_slot[s] / (double)tokens[l->expert_of_slot[s]];
    free(of_slot);
}

/* The first E mod R ranks hold one expert more than the others, whose last slot is empty. */
static void place_in_order(const struct placement *out, int *expert_of_slot) {
    int next = 0, spare = out->experts % out->ranks;
    for (int r = 0; r < out->ranks; r++) {
        int held = out->experts / out->ranks + (r < spare);
        for (int s = 0; s < out->slots_per_rank; s++)
            *expert_of_slot++ = s < held ? next++ : -1;
    }
}

static void place_one(struct placer *p, int i) {
    struct layer *l = &p->layers[i];
    struct balance_result r = {0};
    double total[BALANCE_MAX_EXPERTS];
    if ((l->error = balance_check(&l->problem)))
        return;
    if (l->origin == BY_ENGINE && !balance_plan(&l->problem, l->expert_of_slot, l->share, &r))
        l->error = "its constraints leave no placement";
    if (l->error)
        return;
    if (l->origin == BY_COUNTS) {
        total_load(&l->problem, total);
        if (!place_counted(&l->problem, total, l->count, l->expert_of_slot))
            l->error = "the replicas that replicate asks for leave no room for the constraints";
    }
    if (l->origin == BY_ORDER)
        place_in_order(p->out, l->expert_of_slot);
    if (l->origin != BY_ENGINE)
        set_shares(l);
}

static void judge_one(struct placer *p, int i) {
    struct layer *l = &p->layers[i];
    struct balance_result r = {0};
    balance_judge(&l->problem, l->expert_of_slot, l->share, &r, NULL);
    p->out->imbalance[i] = r.imbalance;
    p->out->imbalance_even[i] = r.imbalance_even;
    p->out->bound[i] = balance_bound(&l->problem);
}

struct worker {
    struct placer *placer;
    void (*step)(struct placer *p, int layer);
};

static void *work(void *arg) {
    const struct worker *w = arg;
    struct placer *p = w->placer;
    for (int i; (i = atomic_fetch_add(&p->next, 1)) < p->out->num_layers;)
        w->step(p, i);
    return NULL;
}

/* One step for every layer. A layer depends on nothing but itself, so threads change nothing. */
static void for_each_layer(struct placer *p, int n_threads,
                           void (*step)(struct placer *, int)) {
    enum { MOST = 256 };
    pthread_t threads[MOST];
    struct worker w = {p, step};
    int n = 0;
    atomic_store(&p->next, 0);
    while (n < n_threads - 1 && n < MOST && n < p->out->num_layers - 1 &&
           !pthread_create(&threads[n], NULL, work, &w))
        n++;
    work(&w);
    while (n)
        pthread_join(threads[--n], NULL);
}

/* ---- the whole ---- */

static struct placement *new_placement(struct arena *a, const struct deployment *dep) {
    struct placement *out = arena_array(a, struct placement, 1);
    const struct model *m = dep->model;
    int ranks = dep->cluster->ranks, slots = dep->num_slots ? dep->num_slots : m->num_experts;
    out->num_layers = m->num_moe_layers;
    out->layers = m->moe_layers;
    out->experts = m->num_experts;
    out->ranks = ranks;
    out->slots_per_rank = (slots + ranks - 1) / ranks;
    size_t n = (size_t)out->num_layers, all = n * (size_t)ranks * (size_t)out->slots_per_rank;
    out->expert_of_slot = arena_array(a, int, all);
    out->share_of_slot = arena_array(a, double, all);
    out->imbalance = arena_array(a, double, n);
    out->imbalance_even = arena_array(a, double, n);
    out->bound = arena_array(a, double, n);
    return out;
}

/* What place is given when the policy has no replicate of its own. */
static int *built_in_counts(struct placer *p) {
    int E = p->out->experts;
    int *count = arena_array(p->arena, int, (size_t)p->out->num_layers *E);
    int most = p->dep->limits.max_replicas;
    double total[BALANCE_MAX_EXPERTS];
    most = most && most < p->out->ranks ? most : p->out->ranks;
    for (int i = 0; i < p->out->num_layers; i++) {
        total_load(&p->layers[i].problem, total);
        place_counts(E, p->world.num_slots, most, total, count + (size_t)i * E);
    }
    return count;
}

static bool ask_constraints(struct placer *p) {
    if (!p->policy->defines[HOOK_constraints])
        return true;
    p->out->constraints = arena_array(p->arena, struct constraints, 1);
    return policy_constraints(p->policy, p->arena, p->diags, &p->world, p->out->constraints);
}

/* What the policy decides itself. */
static bool ask_policy(struct placer *p) {
    struct policy *y = p->policy;
    struct placement *out = p->out;
    bool ok = true;
    if (y->defines[HOOK_replicate]) {
        p->count = arena_array(p->arena, int, (size_t)out->num_layers * out->experts);
        ok = policy_replicate(y, p->arena, p->diags, &p->world, p->count);
    }
    if (ok && y->defines[HOOK_place]) {
        int *count = p->count ? p->count : built_in_counts(p);
        ok = policy_place(y, p->arena, p->diags, &p->world, count, out->expert_of_slot);
    }
    return ok;
}

/* A policy that places has to keep its own constraints, and so has a given placement. */
static void check_constraints(struct placer *p, int i) {
    const struct layer *l = &p->layers[i];
    int spr = p->out->slots_per_rank, R = p->out->ranks, layer = p->out->layers[i];
    const char *whose = l->origin == BY_FILE ? "initial_global_assignments" : "place";
    if (l->origin != BY_POLICY && l->origin != BY_FILE)
        return;
    for (int s = 0; s < slots_of(p); s++) {
        int e = l->expert_of_slot[s];
        if (l->problem.pin && l->problem.pin[s] >= 0 && l->problem.pin[s] != e)
            diag_error(
                p->diags, p->dep->policy_loc,
                "policy %s: %s: layer %d, slot %d: expert %d, but constraints pin expert "
                "%d here",
                p->policy->name, whose, layer, s, e, l->problem.pin[s]);
        if (e >= 0 && l->problem.forbidden && l->problem.forbidden[e * R + s / spr])
            diag_error(p->diags, p->dep->policy_loc,
                       "policy %s: %s: layer %d, slot %d: constraints forbid expert %d on rank "
                       "%d",
                       p->policy->name, whose, layer, s, e, s / spr);
    }
}

/* The engine keeps the limits itself. */
static bool check_limits(struct placer *p) {
    static const char *const whose[] = {[BY_POLICY] = "place",
                                        [BY_COUNTS] = "the replicas that replicate asks for",
                                        [BY_FILE] = "initial_global_assignments"};
    const struct cluster *c = p->dep->cluster;
    struct loc at = p->dep->limits.loc.source ? p->dep->limits.loc : c->rank_slots_loc;
    bool ok = true;
    for (int i = 0; i < p->out->num_layers; i++) {
        const struct layer *l = &p->layers[i];
        const char *broken = l->origin == BY_ENGINE || l->origin == BY_ORDER
                                 ? NULL
                                 : balance_broken(&l->problem, l->expert_of_slot);
        if (!broken)
            continue;
        diag_error(p->diags, l->origin == BY_FILE ? given_at(p, i) : p->dep->policy_loc,
                   "%s%s%s: layer %d: %s", l->origin == BY_FILE ? "" : "policy ",
                   l->origin == BY_FILE ? "" : arena_printf(p->arena, "%s: ", p->policy->name),
                   whose[l->origin], p->out->layers[i], broken);
        if (ok)
            diag_add(p->diags, DIAG_NOTE, at, "the limit is set here");
        ok = false;
    }
    return ok;
}

static void warn_online(struct placer *p) {
    for (int h = 0; h < NUM_HOOKS; h++)
        if (p->dep->layer_updates_per_iter && !p->policy->shipped && h != HOOK_constraints &&
            p->policy->defines[h])
            diag_add(p->diags, DIAG_WARNING, p->dep->policy_loc,
                     "policy %s: %s shapes the first plan only; online balancing keeps its "
                     "constraints and plans on its own",
                     p->policy->name, hook_names[h]);
}

/* Only the planner starts from a placement and counts moves. */
static bool check_start(struct placer *p) {
    const struct policy *y = p->policy;
    if (!p->dep->num_start || !(y->defines[HOOK_place] || y->defines[HOOK_replicate]))
        return true;
    diag_error(p->diags, p->dep->policy_loc,
               "policy %s: %s starts from nothing, so --start and --moves cannot be kept; "
               "policy robust keeps them",
               y->name, hook_names[y->defines[HOOK_place] ? HOOK_place : HOOK_replicate]);
    return false;
}

/* The shipped policies that place compute what others do, or experts in order. EPLB knows groups. */
static bool check_exact(struct placer *p) {
    const struct policy *y = p->policy;
    const struct cluster *c = p->dep->cluster;
    const struct placement_limits *l = &p->dep->limits;
    bool groups = l->keep_groups_in_nodes && strcmp(p->dep->policy, "deepseek");
    const char *key = c->rank_slots              ? "rank_slots"
                      : c->rank_speed            ? "rank_speed"
                      : groups                   ? "keep_groups_in_nodes"
                      : l->max_replicas          ? "max_replicas"
                      : l->max_replicas_per_node ? "max_replicas_per_node"
                                                 : NULL;
    if (!y->shipped || !y->defines[HOOK_place] || !key)
        return true;
    diag_error(p->diags,
               c->rank_slots   ? c->rank_slots_loc
               : c->rank_speed ? c->rank_speed_loc
                               : l->loc,
               "%s: policy %s cannot keep it; policy robust can", key, y->name);
    if (p->dep->policy_loc.source)
        diag_add(p->diags, DIAG_NOTE, p->dep->policy_loc, "the policy is chosen here");
    return false;
}

/* An update's budget bounds a start too. */
static bool check_budget(struct placer *p) {
    const struct constraints *c = p->out->constraints;
    if (!c || c->move_budget < 0 || p->dep->moves <= c->move_budget)
        return true;
    struct loc at = {p->policy->source, p->policy->line[HOOK_constraints], 1};
    diag_error(p->diags, p->dep->policy_loc,
               "--moves %d is more than the move_budget of policy %s, which is %d",
               p->dep->moves, p->policy->name, c->move_budget);
    diag_add(p->diags, DIAG_NOTE, at, "constraints sets the budget");
    return false;
}

static bool place_all(struct placer *p, int n_threads) {
    int before = p->diags->errors, L = p->out->num_layers;
    if (!ask_constraints(p) || !check_budget(p))
        return false;
    p->layers = arena_array(p->arena, struct layer, L);
    for (int i = 0; i < L; i++)
        set_layer(p, i);
    if (!ask_policy(p))
        return false;
    for (int i = 0; i < L; i++) {
        choose_origin(p, i);
        check_constraints(p, i);
    }
    if (p->diags->errors != before)
        return false;
    for_each_layer(p, n_threads, place_one);
    for (int i = 0; i < L; i++)
        if (p->layers[i].error)
            diag_error(p->diags, p->dep->policy_loc, "layer %d cannot be placed: %s",
                       p->out->layers[i], p->layers[i].error);
    if (p->diags->errors != before || !check_limits(p))
        return false;
    if (p->policy->defines[HOOK_share] &&
        !policy_share(p->policy, p->arena, p->diags, &p->world, p->out->expert_of_slot,
                      p->out->share_of_slot))
        return false;
    for_each_layer(p, n_threads, judge_one);
    return true;
}

struct placement *place_with(struct arena *a, struct diags *d, const struct deployment *dep,
                             struct policy *policy, int n_threads) {
    struct placer p = {
        .arena = a, .diags = d, .dep = dep, .policy = policy, .out = new_placement(a, dep)};
    p.world = (struct policy_world){dep->model,        dep->cluster,
                                    dep->loads,        p.out->slots_per_rank,
                                    place_usable(dep), &dep->limits};
    if (!check_start(&p) || !check_exact(&p))
        return NULL;
    p.out->policy = policy;
    warn_online(&p);
    return place_all(&p, n_threads) ? p.out : NULL;
}

struct placement *place_layers(struct arena *a, struct diags *d, const struct deployment *dep,
                               int n_threads) {
    struct policy *policy = policy_open(a, d, dep->policy, dep->policy_path, dep->policy_loc);
    return policy ? place_with(a, d, dep, policy, n_threads) : NULL;
}
