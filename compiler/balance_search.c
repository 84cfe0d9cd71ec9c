/* Local search on the engine's state. */
#include "balance_state.h"

#include <stdlib.h>
#include <string.h>

/* ---- one workload, split evenly: exchanges that relieve the hottest rank ---- */

struct exchange {
    int count, a[2], b[2]; /* slots of the hottest rank, and of another */
    double value;          /* the larger of the two ranks' times afterwards */
};

/* The parts of a rank's slots; empty slots weigh nothing. */
static void sizes_of(const struct balance_state *s, int rank, double *size) {
    for (int j = 0; j < s->slots_per_rank; j++) {
        int e = s->expert_of_slot[rank * s->slots_per_rank + j];
        size[j] = e < 0 ? 0 : s->load[e] * s->inverse[s->count[e]];
    }
}

static void exchange_one(const struct balance_state *s, int hot, int cold, const double *from,
                         const double *to, struct exchange *x) {
    int S = s->slots_per_rank;
    double th = s->time[hot], tc = s->time[cold], ch = s->cost[hot], cc = s->cost[cold];
    for (int i = 0; i < S; i++) {
        double least = (th - x->value) / ch, most = (x->value - tc) / cc;
        for (int j = 0; j < S; j++) {
            double move = from[i] - to[j];
            if (move <= least || move >= most)
                continue;
            int a = hot * S + i, b = cold * S + j;
            if (!state_may_swap(s, a, b))
                continue;
            double t = th - move * ch, u = tc + move * cc;
            *x = (struct exchange){1, {a}, {b}, t > u ? t : u};
            least = (th - x->value) / ch;
            most = (x->value - tc) / cc;
        }
    }
}

static void exchange_two(const struct balance_state *s, int hot, int cold, const double *from,
                         const double *to, struct exchange *x) {
    int S = s->slots_per_rank;
    double th = s->time[hot], tc = s->time[cold], ch = s->cost[hot], cc = s->cost[cold];
    for (int i = 0; i < S; i++)
        for (int k = 0; k < i; k++) {
            double out = from[i] + from[k];
            for (int j = 0; j < S; j++)
                for (int l = 0; l < j; l++) {
                    double move = out - to[j] - to[l];
                    double t = th - move * ch, u = tc + move * cc;
                    if (t >= x->value || u >= x->value)
                        continue;
                    int a = hot * S + i, b = cold * S + j, c = hot * S + k, d = cold * S + l;
                    if (state_may_swap(s, a, b) && state_may_swap(s, c, d))
                        *x = (struct exchange){2, {a, c}, {b, d}, t > u ? t : u};
                }
        }
}

/* The best exchange of the hottest rank with a colder one, the coldest first; the first that
 * brings both below goal will do. False when none relieves it. */
static bool relieve(struct balance_state *s, double goal, bool two, long *trials) {
    int S = s->slots_per_rank, hot = s->order[0];
    double from[S], to[S];
    struct exchange x = {.value = s->time[hot] * (1 - 1e-9)};
    sizes_of(s, hot, from);
    for (int k = s->ranks - 1; k > 0 && x.value > goal; k--) {
        int cold = s->order[k];
        if (s->cost[hot] == s->cost[cold] && (s->time[hot] + s->time[cold]) / 2 >= x.value)
            break;
        sizes_of(s, cold, to);
        (two ? exchange_two : exchange_one)(s, hot, cold, from, to, &x);
        *trials -= S;
    }
    for (int i = 0; i < x.count; i++)
        state_swap(s, x.a[i], x.b[i]);
    return x.count > 0;
}

static void settle_down(struct balance_state *s, double goal, long *trials) {
    bool two = s->slots_per_rank <= 6 && s->move_limit == s->slots && s->away_limit == 0;
    while (s->value > goal && *trials > 0)
        if (!relieve(s, goal, false, trials) && !(two && relieve(s, goal, true, trials)))
            return;
}

/* ---- kicks: other counts, then exchanges again ---- */

/* A slot of rank (-1: any) whose expert has another replica, or -1. */
static int second_replica(struct balance_state *s, int rank) {
    for (int tries = 0; tries < 16; tries++) {
        int slot = rank < 0 ? state_pick(s, s->slots)
                            : rank * s->slots_per_rank + state_pick(s, s->slots_per_rank);
        int e = s->expert_of_slot[slot];
        if (!s->fixed[slot] && (e < 0 || s->count[e] > 1))
            return slot;
    }
    return -1;
}

static int expert_on(struct balance_state *s, int rank) {
    return s->expert_of_slot[rank * s->slots_per_rank + state_pick(s, s->slots_per_rank)];
}

/* The better of some rewrites: one more replica for what the hottest rank holds, in the place of
 * a second replica elsewhere, or another expert in the hottest rank's place of one. */
static bool kick(struct balance_state *s, int candidates, long *trials) {
    int best_slot = -1, best_expert = -1;
    double best = 1e300;
    for (int i = 0; i < candidates; i++) {
        int hot = s->order[state_pick(s, s->ranks < 4 ? s->ranks : 4)];
        bool here = state_pick(s, 2);
        int slot = second_replica(s, here ? hot : -1);
        int e = here ? state_pick(s, s->experts) : expert_on(s, hot);
        if (slot < 0 || e < 0 || !state_may_rewrite(s, slot, e))
            continue;
        double value = s->objective->rewrite(s, slot, e, best);
        *trials -= 8;
        if (value < best) {
            best = value;
            best_slot = slot;
            best_expert = e;
        }
    }
    *trials -= candidates;
    if (best_slot >= 0)
        state_rewrite(s, best_slot, best_expert);
    return best_slot >= 0;
}

static void restore(struct balance_state *s, const int *slots) {
    for (int i = 0; i < s->slots; i++)
        if (s->expert_of_slot[i] != slots[i])
            state_put(s, i, slots[i]);
    s->objective->begin(s);
}

void search_descend(struct balance_state *s, double goal, long trials) {
    size_t bytes = sizeof *s->expert_of_slot * s->slots;
    int *kept = malloc(bytes);
    if (!kept)
        abort();
    settle_down(s, goal, &trials);
    double best = s->value;
    memcpy(kept, s->expert_of_slot, bytes);
    while (best > goal && trials > 0) {
        if (!kick(s, 1 + state_pick(s, 8), &trials))
            continue;
        settle_down(s, goal, &trials);
        if (s->value <= best) {
            best = s->value;
            memcpy(kept, s->expert_of_slot, bytes);
        } else if (state_pick(s, 4)) {
            restore(s, kept);
        }
    }
    restore(s, kept);
    free(kept);
}

enum { REWRITES = 2 }; /* of 16 trials */
static const double HEAT = 0.001;

/* ---- any objective: random moves that touch a hot rank ---- */

/* The hottest rank of a workload drawn by weight, at times one of the next. */
static int hot_rank(struct balance_state *s) {
    double x = (double)(state_random(s) >> 11) * 0x1p-53;
    int w = 0;
    while (w < s->workloads - 1 && (x -= s->weight[w]) >= 0)
        w++;
    int depth = state_pick(s, 4) ? 0 : state_pick(s, s->ranks < 8 ? s->ranks : 8);
    return s->order[(size_t)w * s->ranks + depth];
}

/* One trial: a random swap with, or rewrite for, a hot rank; made when the value stays below
 * limit. */
static void attempt(struct balance_state *s, double limit) {
    int hot = hot_rank(s), kind = state_pick(s, 16);
    if (kind >= REWRITES) {
        int a = hot * s->slots_per_rank + state_pick(s, s->slots_per_rank);
        int b = state_pick(s, s->slots);
        if (state_may_swap(s, a, b) && s->objective->swap(s, a, b, limit) < limit)
            state_swap(s, a, b);
        return;
    }
    int slot = second_replica(s, kind & 1 ? hot : -1);
    int e = kind & 1 ? state_pick(s, s->experts) : expert_on(s, hot);
    if (slot >= 0 && e >= 0 && state_may_rewrite(s, slot, e) &&
        s->objective->rewrite(s, slot, e, limit) < limit)
        state_rewrite(s, slot, e);
}

/* Some moves that make it a little worse are made at first, fewer and fewer, none at the end. */
void search_climb(struct balance_state *s, double goal, long trials) {
    for (long t = 0; t < trials && s->value > goal; t++) {
        double cool = 1 - (double)t / (0.8 * (double)trials), limit = s->value;
        if (cool > 0)
            limit += HEAT * cool * cool * (double)(state_random(s) >> 11) * 0x1p-53;
        attempt(s, limit);
    }
}
