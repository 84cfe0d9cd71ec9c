/* The placement engine's state: the scaled problem, the slots, and what may be moved. */
#include "balance_state.h"

#include <string.h>

/* ---- memory ---- */

struct block {
    struct block *next;
    _Alignas(16) char data[]; /* for anything here, four floats at a time included */
};

void *state_alloc(struct balance_state *s, size_t count, size_t bytes) {
    struct block *b = balance_alloc(1, sizeof *b + (count ? count : 1) * bytes);
    b->next = s->memory;
    s->memory = b;
    return b->data;
}

void state_free(struct balance_state *s) {
    for (struct block *b = s->memory, *next; b; b = next) {
        next = b->next;
        balance_free(b);
    }
    s->memory = NULL;
}

/* ---- the problem, scaled ---- */

#define ARRAY(s, field, n) ((s)->field = state_alloc((s), (n), sizeof *(s)->field))

/* A workload without load says nothing: it weighs nothing, unless all are so. */
static void scale_loads(struct balance_state *s, double speeds) {
    const struct balance_problem *p = s->p;
    double weights = 0;
    for (int w = 0; w < s->workloads; w++) {
        double sum = 0;
        for (int e = 0; p->load && e < s->experts; e++)
            sum += p->load[(size_t)w * s->experts + e];
        s->weight[w] = sum > 0 ? p->weight ? p->weight[w] : 1 : 0;
        weights += s->weight[w];
        for (int e = 0; e < s->experts; e++)
            s->load[(size_t)e * s->workloads + w] =
                sum > 0 ? p->load[(size_t)w * s->experts + e] / sum * speeds
                        : speeds / s->experts;
    }
    for (int w = 0; w < s->workloads; w++)
        s->weight[w] = weights > 0 ? s->weight[w] / weights : 1.0 / s->workloads;
}

static int capacity(const struct balance_problem *p, int rank) {
    return p->capacity ? p->capacity[rank] : p->slots_per_rank;
}

static double init_ranks(struct balance_state *s) {
    const struct balance_problem *p = s->p;
    double speeds = 0;
    for (int r = 0; r < s->ranks; r++) {
        double speed = p->speed ? p->speed[r] : 1;
        s->cost[r] = 1 / speed;
        speeds += capacity(p, r) ? speed : 0;
        s->node_of_rank[r] = p->ranks_per_node ? r / p->ranks_per_node : 0;
        for (int j = 0; j < s->slots_per_rank; j++) {
            int slot = r * s->slots_per_rank + j;
            s->rank_of_slot[slot] = r;
            s->fixed[slot] = j >= capacity(p, r);
            s->expert_of_slot[slot] = -1;
        }
    }
    return speeds;
}

static void init_limits(struct balance_state *s) {
    const struct balance_problem *p = s->p;
    int most = s->ranks;
    s->node_limit = p->max_per_node ? p->max_per_node : s->slots;
    if (p->max_per_node && p->max_per_node < most / s->nodes)
        most = p->max_per_node * s->nodes;
    if (p->max_replicas && p->max_replicas < most)
        most = p->max_replicas;
    for (int e = 0; e < s->experts; e++) {
        s->most[e] = most;
        s->first[e] = -1;
    }
    if (p->forbidden)
        memcpy(s->banned, p->forbidden, (size_t)s->experts * s->ranks);
    s->away_limit = p->groups ? p->cross_node_slots : 0;
    s->move_limit = p->current && p->moves >= 0 ? p->moves : s->slots;
}

void state_init(struct balance_state *s, const struct balance_problem *p) {
    int W = p->workloads > 0 && p->load ? p->workloads : 1;
    *s = (struct balance_state){.p = p,
                                .experts = p->experts,
                                .ranks = p->ranks,
                                .slots_per_rank = p->slots_per_rank,
                                .slots = p->ranks * p->slots_per_rank,
                                .workloads = W,
                                .random = p->seed};
    s->nodes = p->ranks_per_node ? (p->ranks + p->ranks_per_node - 1) / p->ranks_per_node : 1;
    size_t E = (size_t)s->experts, R = (size_t)s->ranks;
    ARRAY(s, load, E * W);
    ARRAY(s, weight, W);
    ARRAY(s, cost, R);
    ARRAY(s, expert_of_slot, s->slots);
    ARRAY(s, count, E);
    ARRAY(s, first, E);
    ARRAY(s, next, s->slots);
    ARRAY(s, prev, s->slots);
    ARRAY(s, on_rank, E * R);
    ARRAY(s, on_node, E * s->nodes);
    ARRAY(s, fixed, s->slots);
    ARRAY(s, banned, E * R);
    ARRAY(s, most, E);
    ARRAY(s, rank_of_slot, s->slots);
    ARRAY(s, node_of_rank, R);
    ARRAY(s, time, R * W);
    ARRAY(s, order, R * W);
    ARRAY(s, place, R * W);
    ARRAY(s, inverse, s->slots + 2);
    for (int i = 1; i < s->slots + 2; i++)
        s->inverse[i] = 1.0 / i;
    double speeds = init_ranks(s);
    scale_loads(s, speeds);
    init_limits(s);
}

/* ---- slots ---- */

static int is_away(const struct balance_state *s, int slot, int expert) {
    return s->home && expert >= 0 && s->node_of_rank[s->rank_of_slot[slot]] != s->home[expert];
}

static int is_moved(const struct balance_state *s, int slot, int expert) {
    return s->p->current && expert >= 0 && s->p->current[slot] != expert;
}

static void take_out(struct balance_state *s, int slot, int expert) {
    int r = s->rank_of_slot[slot], before = s->prev[slot], after = s->next[slot];
    if (before >= 0)
        s->next[before] = after;
    else
        s->first[expert] = after;
    if (after >= 0)
        s->prev[after] = before;
    s->count[expert]--;
    s->on_rank[(size_t)expert * s->ranks + r]--;
    s->on_node[(size_t)expert * s->nodes + s->node_of_rank[r]]--;
}

static void put_in(struct balance_state *s, int slot, int expert) {
    int r = s->rank_of_slot[slot];
    s->prev[slot] = -1;
    s->next[slot] = s->first[expert];
    if (s->first[expert] >= 0)
        s->prev[s->first[expert]] = slot;
    s->first[expert] = slot;
    s->count[expert]++;
    s->on_rank[(size_t)expert * s->ranks + r]++;
    s->on_node[(size_t)expert * s->nodes + s->node_of_rank[r]]++;
}

void state_put(struct balance_state *s, int slot, int expert) {
    int old = s->expert_of_slot[slot];
    if (old >= 0)
        take_out(s, slot, old);
    s->expert_of_slot[slot] = expert;
    if (expert >= 0)
        put_in(s, slot, expert);
    s->away += is_away(s, slot, expert) - is_away(s, slot, old);
    s->moved += is_moved(s, slot, expert) - is_moved(s, slot, old);
}

/* Does the rank take the expert: not there yet, not banned, room in its node? from: the rank it
 * leaves for that, or -1. */
static bool rank_takes(const struct balance_state *s, int rank, int expert, int from) {
    size_t at = (size_t)expert * s->ranks + rank;
    if (s->on_rank[at] || s->banned[at])
        return false;
    int node = s->node_of_rank[rank];
    return (from >= 0 && s->node_of_rank[from] == node) ||
           s->on_node[(size_t)expert * s->nodes + node] < s->node_limit;
}

/* What a change of slots adds to the two budgets is within what is left of them. */
static bool within(const struct balance_state *s, int away, int moved) {
    return (away <= 0 || s->away + away <= s->away_limit) &&
           (moved <= 0 || s->moved + moved <= s->move_limit);
}

bool state_may_put(const struct balance_state *s, int slot, int expert) {
    return !s->fixed[slot] && s->count[expert] < s->most[expert] &&
           rank_takes(s, s->rank_of_slot[slot], expert, -1) &&
           within(s, is_away(s, slot, expert), 0);
}

bool state_may_swap(const struct balance_state *s, int a, int b) {
    int ea = s->expert_of_slot[a], eb = s->expert_of_slot[b];
    int ra = s->rank_of_slot[a], rb = s->rank_of_slot[b];
    if (s->fixed[a] || s->fixed[b] || ea == eb || ra == rb)
        return false;
    if ((ea >= 0 && !rank_takes(s, rb, ea, ra)) || (eb >= 0 && !rank_takes(s, ra, eb, rb)))
        return false;
    return within(
        s, is_away(s, a, eb) + is_away(s, b, ea) - is_away(s, a, ea) - is_away(s, b, eb),
        is_moved(s, a, eb) + is_moved(s, b, ea) - is_moved(s, a, ea) - is_moved(s, b, eb));
}

bool state_may_rewrite(const struct balance_state *s, int slot, int expert) {
    int old = s->expert_of_slot[slot];
    if (s->fixed[slot] || old == expert || (old >= 0 && s->count[old] == 1))
        return false;
    return s->count[expert] < s->most[expert] &&
           rank_takes(s, s->rank_of_slot[slot], expert, -1) &&
           within(s, is_away(s, slot, expert) - is_away(s, slot, old),
                  is_moved(s, slot, expert) - is_moved(s, slot, old));
}
