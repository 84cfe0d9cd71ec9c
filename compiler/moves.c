/* From one placement of a layer to another: which slots receive weights, from where, and in what
 * order, so that a stream of them helps early and no expert is ever without a copy. Loads are split
 * evenly over replicas here. */
#include <string.h>

#include "moec.h"

/* The layer while it is being changed. */
struct state {
    struct arena *arena;
    int experts, ranks, slots, ranks_per_node; /* slots: of a rank */
    int *cur;                                  /* [ranks * slots] */
    const int *to;
    const double *load;
    int *count;   /* [experts] live copies, the one in a spare slot included */
    int **holder; /* [experts] ranks of the copies */
    int *spare;   /* [experts] rank whose spare slot holds it, -1: none */
    double *rank_load;
    double *delta; /* [ranks] zeros between uses */
    int *touched;
    int num_touched;
};

/* ---- copies ---- */

static void add_copy(struct state *s, int e, int rank) {
    s->holder[e][s->count[e]++] = rank;
}

static void remove_copy(struct state *s, int e, int rank) {
    for (int i = 0; i < s->count[e]; i++)
        if (s->holder[e][i] == rank) {
            s->holder[e][i] = s->holder[e][--s->count[e]];
            return;
        }
}

static void make_copies(struct state *s) {
    int total = s->ranks * s->slots;
    int *most = arena_array(s->arena, int, s->experts);
    s->count = arena_array(s->arena, int, s->experts);
    s->spare = arena_array(s->arena, int, s->experts);
    s->holder = arena_array(s->arena, int *, s->experts);
    for (int i = 0; i < total; i++) {
        most[s->cur[i] < 0 ? 0 : s->cur[i]]++;
        most[s->to[i] < 0 ? 0 : s->to[i]]++;
    }
    for (int e = 0; e < s->experts; e++) {
        s->holder[e] = arena_array(s->arena, int, most[e] + 1);
        s->spare[e] = -1;
    }
    for (int i = 0; i < total; i++)
        if (s->cur[i] >= 0)
            add_copy(s, s->cur[i], i / s->slots);
}

/* ---- loads ---- */

static void sum_loads(struct state *s) {
    memset(s->rank_load, 0, sizeof *s->rank_load * (size_t)s->ranks);
    for (int e = 0; e < s->experts; e++)
        for (int i = 0; i < s->count[e]; i++)
            s->rank_load[s->holder[e][i]] += s->load[e] / s->count[e];
}

static double imbalance(const struct state *s) {
    double most = 0, sum = 0;
    for (int r = 0; r < s->ranks; r++) {
        sum += s->rank_load[r];
        most = s->rank_load[r] > most ? s->rank_load[r] : most;
    }
    return sum > 0 ? most * s->ranks / sum : 1;
}

static void touch(struct state *s, int rank, double by) {
    if (s->delta[rank] == 0)
        s->touched[s->num_touched++] = rank;
    s->delta[rank] += by;
}

/* Every copy's part changes when there is one more on `rank`, or one fewer (by -1). */
static void change(struct state *s, int e, int rank, int by) {
    int c = s->count[e];
    double old = s->load[e] / c, part = c + by > 0 ? s->load[e] / (c + by) : 0;
    for (int i = 0; i < c; i++)
        touch(s, s->holder[e][i], part - old);
    touch(s, rank, by * part);
}

/* What a move takes off the sum of the ranks' squared loads: large when a full rank gives to an
 * empty one. */
static double gain(struct state *s, int slot) {
    int e = s->to[slot], old = s->cur[slot], rank = slot / s->slots;
    double sum = 0;
    s->num_touched = 0;
    change(s, e, rank, 1);
    if (old >= 0 && s->count[old] > 1)
        change(s, old, rank, -1);
    for (int i = 0; i < s->num_touched; i++) {
        int r = s->touched[i];
        double d = s->delta[r];
        s->delta[r] = 0; /* a rank listed twice counts once */
        sum -= d * (2 * s->rank_load[r] + d);
    }
    return sum;
}

/* ---- the next move ---- */

/* Whether the expert that a move overwrites has another copy. */
static bool is_safe(const struct state *s, int slot) {
    int old = s->cur[slot];
    return old < 0 || s->count[old] > 1;
}

/* The safe move of the largest gain, ties to the lowest slot; when none is safe, of all. */
static int choose(struct state *s) {
    int best = -1;
    double most = 0;
    for (int any = 0; any < 2 && best < 0; any++)
        for (int i = 0; i < s->ranks * s->slots; i++) {
            if (s->to[i] < 0 || s->cur[i] == s->to[i] || (!any && !is_safe(s, i)))
                continue;
            double g = gain(s, i);
            if (best < 0 || g > most) {
                best = i;
                most = g;
            }
        }
    return best;
}

/* A rank that has the expert: this one, else in this node, else any; of equals the one that has
 * sent least, then the lowest. */
static int source(const struct state *s, int e, int rank, const int *sent) {
    int best = -1, best_far = 0, node = s->ranks_per_node > 0 ? s->ranks_per_node : s->ranks;
    for (int i = 0; i < s->count[e]; i++) {
        int r = s->holder[e][i], far = r == rank ? 0 : r / node == rank / node ? 1 : 2;
        bool better = far < best_far ||
                      (far == best_far && sent[r] < sent[best < 0 ? r : best]) ||
                      (far == best_far && best >= 0 && sent[r] == sent[best] && r < best);
        if (best < 0 || better) {
            best = r;
            best_far = far;
        }
    }
    return best;
}

static void apply(struct state *s, struct layer_moves *out, int slot) {
    struct move *m = &out->moves[out->n++];
    int rank = slot / s->slots, old = s->cur[slot];
    *m = (struct move){.slot = slot, .expert = s->to[slot], .replaces = old};
    m->from_rank = source(s, m->expert, rank, out->sent);
    m->spare = !is_safe(s, slot);
    if (m->from_rank != rank) {
        out->sent[m->from_rank]++;
        out->received[rank]++;
    }
    if (m->spare)
        s->spare[old] = rank;
    else if (old >= 0)
        remove_copy(s, old, rank);
    add_copy(s, m->expert, rank);
    if (s->spare[m->expert] >= 0) { /* it has a slot again */
        remove_copy(s, m->expert, s->spare[m->expert]);
        s->spare[m->expert] = -1;
    }
    s->cur[slot] = m->expert;
    sum_loads(s);
    m->imbalance = imbalance(s);
}

/* ---- before and after ---- */

/* A rank's slots are interchangeable: those that keep an expert are renumbered, not moved. */
static int renumber(struct state *s) {
    int n = 0;
    for (int i = 0; i < s->ranks * s->slots; i++) {
        int first = i / s->slots * s->slots;
        if (s->to[i] < 0 || s->cur[i] == s->to[i])
            continue;
        for (int j = first; j < first + s->slots; j++)
            if (s->cur[j] == s->to[i] && s->to[j] != s->to[i]) {
                s->cur[j] = s->cur[i];
                s->cur[i] = s->to[i];
                n++;
                break;
            }
    }
    return n;
}

/* Copies that the new placement has no slot for. */
static int drop(struct state *s) {
    int n = 0;
    for (int i = 0; i < s->ranks * s->slots; i++)
        if (s->to[i] < 0 && s->cur[i] >= 0) {
            remove_copy(s, s->cur[i], i / s->slots);
            s->cur[i] = -1;
            n++;
        }
    return n;
}

void moves_order(struct arena *a, const struct moves_problem *p, struct layer_moves *out) {
    int total = p->ranks * p->slots_per_rank;
    double *alike = arena_array(a, double, p->experts);
    struct state s = {.arena = a,
                      .experts = p->experts,
                      .ranks = p->ranks,
                      .slots = p->slots_per_rank,
                      .ranks_per_node = p->ranks_per_node,
                      .cur = arena_array(a, int, total),
                      .to = p->to,
                      .load = p->load ? p->load : alike,
                      .rank_load = arena_array(a, double, p->ranks),
                      .delta = arena_array(a, double, p->ranks),
                      .touched = arena_array(a, int, 2 * total + 2)};
    for (int e = 0; e < p->experts; e++)
        alike[e] = 1;
    memcpy(s.cur, p->from, sizeof *s.cur * (size_t)total);
    *out = (struct layer_moves){.moves = arena_array(a, struct move, total),
                                .received = arena_array(a, int, p->ranks),
                                .sent = arena_array(a, int, p->ranks)};
    out->renumbered = renumber(&s);
    make_copies(&s);
    sum_loads(&s);
    out->before = imbalance(&s);
    for (int slot; (slot = choose(&s)) >= 0;)
        apply(&s, out, slot);
    out->dropped = drop(&s);
    sum_loads(&s);
    out->after = imbalance(&s);
}
