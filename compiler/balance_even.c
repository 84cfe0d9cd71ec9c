/* Values a placement whose dispatcher splits evenly, and its moves without making them: a swap
 * touches two ranks, a rewrite those of two experts; of the others only the slowest counts, so the
 * ranks are kept in order of their times. */
#include "balance_state.h"

#include <string.h>

/* ---- the order of ranks ---- */

/* Rank takes its place anew after its time changed. */
static void retime(struct balance_state *s, int w, int rank, double time) {
    int *order = s->order + (size_t)w * s->ranks, *place = s->place + (size_t)w * s->ranks;
    int W = s->workloads, i = place[rank];
    s->time[(size_t)rank * W + w] = time;
    for (; i > 0 && s->time[(size_t)order[i - 1] * W + w] < time; i--)
        place[order[i] = order[i - 1]] = i;
    for (; i < s->ranks - 1 && s->time[(size_t)order[i + 1] * W + w] > time; i++)
        place[order[i] = order[i + 1]] = i;
    place[order[i] = rank] = i;
}

static void sort_ranks(struct balance_state *s, int w) {
    int *order = s->order + (size_t)w * s->ranks, *place = s->place + (size_t)w * s->ranks;
    const double *time = s->time + w;
    int W = s->workloads;
    for (int r = 0; r < s->ranks; r++) {
        int i = r;
        for (; i > 0 && time[(size_t)order[i - 1] * W] < time[(size_t)r * W]; i--)
            order[i] = order[i - 1];
        order[i] = r;
    }
    for (int i = 0; i < s->ranks; i++)
        place[order[i]] = i;
}

/* ---- what a move adds ---- */

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
    const struct even *o = s->even;
    double total = 0;
    for (int w = 0; w < s->workloads; w++)
        total +=
            s->weight[w] * (s->time[(size_t)s->order[(size_t)w * s->ranks] * s->workloads + w] +
                            s->spread * o->square[w]);
    return total;
}

void even_value(struct balance_state *s) {
    struct even *o = s->even;
    int W = s->workloads;
    if (!o) {
        o = s->even = state_alloc(s, 1, sizeof *o);
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
        sort_ranks(s, w);
    }
    s->value = even_total(s);
}

/* Swaps touch two ranks only, so they need no list. */
double even_swap(struct balance_state *s, int a, int b, double limit) {
    const struct even *o = s->even;
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
    struct even *o = s->even;
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
    struct even *o = s->even;
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
    struct even *o = s->even;
    for (int i = 0; i < o->count; i++) {
        o->mark[o->touched[i]] = 0;
        memset(o->change + (size_t)o->touched[i] * s->workloads, 0,
               sizeof *o->change * s->workloads);
    }
    o->count = 0;
}

double even_rewrite(struct balance_state *s, int slot, int expert, double limit) {
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
    struct even *o = s->even;
    for (int i = 0; i < o->count; i++)
        for (int w = 0; w < s->workloads; w++) {
            size_t at = (size_t)o->touched[i] * s->workloads + w;
            double t = s->time[at] + o->change[at];
            o->square[w] += (square(t) - square(s->time[at])) / s->ranks;
            retime(s, w, o->touched[i], t);
        }
    even_untouch(s);
    s->value = even_total(s);
}

void even_make_swap(struct balance_state *s, int a, int b) {
    int ea = s->expert_of_slot[a], eb = s->expert_of_slot[b];
    state_put(s, a, -1);
    state_put(s, b, ea);
    state_put(s, a, eb);
    int now[2] = {eb, ea}, slot[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        if (now[i] < 0)
            continue;
        double part = s->inverse[s->count[now[i]]];
        even_touch(s, s->rank_of_slot[slot[i]], now[i], part);
        even_touch(s, s->rank_of_slot[slot[!i]], now[i], -part);
    }
    even_commit(s);
}

void even_make_rewrite(struct balance_state *s, int slot, int now) {
    int old = s->expert_of_slot[slot], rank = s->rank_of_slot[slot];
    state_put(s, slot, now);
    if (old >= 0) {
        double after = s->inverse[s->count[old]], before = s->inverse[s->count[old] + 1];
        for (int i = s->first[old]; i >= 0; i = s->next[i])
            even_touch(s, s->rank_of_slot[i], old, after - before);
        even_touch(s, rank, old, -before);
    }
    double after = s->inverse[s->count[now]], before = s->inverse[s->count[now] - 1];
    for (int i = s->first[now]; i >= 0; i = s->next[i])
        even_touch(s, s->rank_of_slot[i], now, i == slot ? after : after - before);
    even_commit(s);
}

void even_reset(struct balance_state *s, const int *expert_of_slot) {
    for (int i = 0; i < s->slots; i++)
        if (s->expert_of_slot[i] != expert_of_slot[i])
            state_put(s, i, expert_of_slot[i]);
    even_value(s);
}
