/* The placement engine's state, its two moves and the objective of an even split. */
#include "balance_state.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory, random numbers ---- */

struct block {
    struct block *next;
    double data[]; /* aligned for anything here */
};

void *state_alloc(struct balance_state *s, size_t count, size_t bytes) {
    struct block *b = calloc(1, sizeof *b + (count ? count : 1) * bytes);
    if (!b)
        abort();
    b->next = s->memory;
    s->memory = b;
    return b->data;
}

void state_free(struct balance_state *s) {
    for (struct block *b = s->memory, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    s->memory = NULL;
}

/* splitmix64 */
uint64_t state_random(struct balance_state *s) {
    uint64_t z = s->random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
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

void state_swap(struct balance_state *s, int a, int b) {
    int ea = s->expert_of_slot[a], eb = s->expert_of_slot[b];
    state_put(s, a, -1);
    state_put(s, b, ea);
    state_put(s, a, eb);
    s->objective->swapped(s, a, b);
}

void state_rewrite(struct balance_state *s, int slot, int expert) {
    int old = s->expert_of_slot[slot];
    state_put(s, slot, expert);
    s->objective->rewrote(s, slot, old);
}

void state_value(struct balance_state *s, const struct balance_objective *objective) {
    s->objective = objective;
    objective->begin(s);
}

/* ---- the order of ranks ---- */

void state_retime(struct balance_state *s, int w, int rank, double time) {
    int *order = s->order + (size_t)w * s->ranks, *place = s->place + (size_t)w * s->ranks;
    int W = s->workloads, i = place[rank];
    s->time[(size_t)rank * W + w] = time;
    for (; i > 0 && s->time[(size_t)order[i - 1] * W + w] < time; i--)
        place[order[i] = order[i - 1]] = i;
    for (; i < s->ranks - 1 && s->time[(size_t)order[i + 1] * W + w] > time; i++)
        place[order[i] = order[i + 1]] = i;
    place[order[i] = rank] = i;
}

void state_order(struct balance_state *s) {
    for (int w = 0; w < s->workloads; w++) {
        for (int r = 0; r < s->ranks; r++)
            s->order[(size_t)w * s->ranks + r] = s->place[(size_t)w * s->ranks + r] = r;
        for (int r = 0; r < s->ranks; r++)
            state_retime(s, w, r, s->time[(size_t)r * s->workloads + w]);
    }
}

/* ---- the even split ---- */

struct even {
    double *change; /* [R][W] what the move that is being valued adds to a rank's times */
    int *touched;   /* ranks with a change */
    int count;
    uint8_t *mark;  /* [R] */
    double *square; /* [W] mean of (time - 1)^2 */
};

static double square(double time) {
    return (time - 1) * (time - 1);
}

/* Sum over workloads of weight * (maximum + spread * mean square). */
static double even_total(const struct balance_state *s) {
    const struct even *o = s->own;
    double total = 0;
    for (int w = 0; w < s->workloads; w++)
        total +=
            s->weight[w] * (s->time[(size_t)s->order[(size_t)w * s->ranks] * s->workloads + w] +
                            s->spread * o->square[w]);
    return total;
}

static void even_begin(struct balance_state *s) {
    struct even *o = s->own;
    int W = s->workloads;
    if (!o) {
        o = s->own = state_alloc(s, 1, sizeof *o);
        o->change = state_alloc(s, (size_t)s->ranks * W, sizeof *o->change);
        o->touched = state_alloc(s, s->ranks, sizeof *o->touched);
        o->mark = state_alloc(s, s->ranks, 1);
        o->square = state_alloc(s, W, sizeof *o->square);
    }
    memset(s->time, 0, sizeof *s->time * s->ranks * W);
    for (int i = 0; i < s->slots; i++) {
        int e = s->expert_of_slot[i], r = s->rank_of_slot[i];
        for (int w = 0; e >= 0 && w < W; w++)
            s->time[(size_t)r * W + w] += s->load[(size_t)e * W + w] / s->count[e] * s->cost[r];
    }
    for (int w = 0; w < W; w++) {
        o->square[w] = 0;
        for (int r = 0; r < s->ranks; r++)
            o->square[w] += square(s->time[(size_t)r * W + w]) / s->ranks;
    }
    state_order(s);
    s->value = even_total(s);
}

/* Swaps touch two ranks only, so they need no list. */
static double even_swap(struct balance_state *s, int a, int b, double limit) {
    const struct even *o = s->own;
    int W = s->workloads, R = s->ranks, ra = s->rank_of_slot[a], rb = s->rank_of_slot[b];
    int ea = s->expert_of_slot[a], eb = s->expert_of_slot[b];
    const double *la = s->load + (size_t)(ea < 0 ? 0 : ea) * W;
    const double *lb = s->load + (size_t)(eb < 0 ? 0 : eb) * W;
    double fa = ea < 0 ? 0 : s->inverse[s->count[ea]],
           fb = eb < 0 ? 0 : s->inverse[s->count[eb]];
    double total = 0;
    for (int w = 0; w < W && total <= limit; w++) {
        double move = la[w] * fa - lb[w] * fb;
        double old_a = s->time[(size_t)ra * W + w], old_b = s->time[(size_t)rb * W + w];
        double ta = old_a - move * s->cost[ra], tb = old_b + move * s->cost[rb];
        const int *order = s->order + (size_t)w * R;
        int i = 0;
        while (i < R && (order[i] == ra || order[i] == rb))
            i++;
        double most = i < R ? s->time[(size_t)order[i] * W + w] : 0;
        most = ta > most ? ta : most;
        most = tb > most ? tb : most;
        if (s->spread > 0)
            most += s->spread * (o->square[w] +
                                 (square(ta) - square(old_a) + square(tb) - square(old_b)) / R);
        total += s->weight[w] * most;
    }
    return total;
}

static void even_touch(struct balance_state *s, int rank, int expert, double part) {
    struct even *o = s->own;
    if (!o->mark[rank]) {
        o->mark[rank] = 1;
        o->touched[o->count++] = rank;
    }
    for (int w = 0; w < s->workloads; w++)
        o->change[(size_t)rank * s->workloads + w] +=
            s->load[(size_t)expert * s->workloads + w] * part * s->cost[rank];
}

/* The changes of one more (by = 1) or one less (-1) replica of an expert, on rank, where it has
 * count replicas so far. */
static void even_replica(struct balance_state *s, int expert, int rank, int count, int by) {
    double now = s->inverse[count], then = s->inverse[count + by]; /* inverse[0] is 0 */
    for (int i = s->first[expert]; i >= 0; i = s->next[i])
        even_touch(s, s->rank_of_slot[i], expert, then - now);
    even_touch(s, rank, expert, by > 0 ? then : -then);
}

static double even_sum(struct balance_state *s, double limit) {
    struct even *o = s->own;
    int W = s->workloads;
    double total = 0;
    for (int w = 0; w < W && total <= limit; w++) {
        const int *order = s->order + (size_t)w * s->ranks;
        int i = 0;
        while (i < s->ranks && o->mark[order[i]])
            i++;
        double most = i < s->ranks ? s->time[(size_t)order[i] * W + w] : 0, squares = 0;
        for (i = 0; i < o->count; i++) {
            size_t at = (size_t)o->touched[i] * W + w;
            double t = s->time[at] + o->change[at];
            most = t > most ? t : most;
            squares += square(t) - square(s->time[at]);
        }
        total += s->weight[w] * (most + s->spread * (o->square[w] + squares / s->ranks));
    }
    return total;
}

static void even_untouch(struct balance_state *s) {
    struct even *o = s->own;
    for (int i = 0; i < o->count; i++) {
        o->mark[o->touched[i]] = 0;
        memset(o->change + (size_t)o->touched[i] * s->workloads, 0,
               sizeof *o->change * s->workloads);
    }
    o->count = 0;
}

static double even_rewrite(struct balance_state *s, int slot, int expert, double limit) {
    int old = s->expert_of_slot[slot], rank = s->rank_of_slot[slot];
    if (old >= 0)
        even_replica(s, old, rank, s->count[old], -1);
    even_replica(s, expert, rank, s->count[expert], 1);
    double value = even_sum(s, limit);
    even_untouch(s);
    return value;
}

/* Makes the touched changes. */
static void even_commit(struct balance_state *s) {
    struct even *o = s->own;
    for (int i = 0; i < o->count; i++)
        for (int w = 0; w < s->workloads; w++) {
            size_t at = (size_t)o->touched[i] * s->workloads + w;
            double t = s->time[at] + o->change[at];
            o->square[w] += (square(t) - square(s->time[at])) / s->ranks;
            state_retime(s, w, o->touched[i], t);
        }
    even_untouch(s);
    s->value = even_total(s);
}

static void even_swapped(struct balance_state *s, int a, int b) {
    int now[2] = {s->expert_of_slot[a], s->expert_of_slot[b]}, slot[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        if (now[i] < 0)
            continue;
        double part = s->inverse[s->count[now[i]]];
        even_touch(s, s->rank_of_slot[slot[i]], now[i], part);
        even_touch(s, s->rank_of_slot[slot[!i]], now[i], -part);
    }
    even_commit(s);
}

/* The lists are as after the move: what left (old) and what came (now). */
static void even_rewrote(struct balance_state *s, int slot, int old) {
    int now = s->expert_of_slot[slot], rank = s->rank_of_slot[slot];
    if (old >= 0) {
        double after = s->inverse[s->count[old]], before = s->inverse[s->count[old] + 1];
        for (int i = s->first[old]; i >= 0; i = s->next[i])
            even_touch(s, s->rank_of_slot[i], old, after - before);
        even_touch(s, rank, old, -before);
    }
    if (now >= 0) {
        double after = s->inverse[s->count[now]], before = s->inverse[s->count[now] - 1];
        for (int i = s->first[now]; i >= 0; i = s->next[i])
            even_touch(s, s->rank_of_slot[i], now, i == slot ? after : after - before);
    }
    even_commit(s);
}

const struct balance_objective balance_even = {even_begin, even_swap, even_rewrite,
                                               even_swapped, even_rewrote};
