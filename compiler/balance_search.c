/* Local search on the engine's state. */
#include "balance_state.h"

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
                         const double *to, struct exchange *x, long *trials) {
    int S = s->slots_per_rank;
    double th = s->time[hot], tc = s->time[cold], ch = s->cost[hot], cc = s->cost[cold];
    for (int i = 0; i < S; i++) {
        double least = (th - x->value) / ch, most = (x->value - tc) / cc;
        for (int j = 0; j < S; j++) {
            double move = from[i] - to[j];
            if (move <= least || move >= most)
                continue;
            int a = hot * S + i, b = cold * S + j;
            --*trials;
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
                         const double *to, struct exchange *x, long *trials) {
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
                    --*trials;
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
        (two ? exchange_two : exchange_one)(s, hot, cold, from, to, &x, trials);
        *trials -= two ? S * S : S * S / 4 + 1;
    }
    for (int i = 0; i < x.count; i++)
        even_make_swap(s, x.a[i], x.b[i]);
    return x.count > 0;
}

static void settle_down(struct balance_state *s, double goal, long *trials) {
    bool two = s->slots_per_rank <= 6 && s->move_limit == s->slots && s->away_limit == 0;
    while (s->time[s->order[0]] > goal && *trials > 0)
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
static bool kick_count(struct balance_state *s, int candidates, long *trials) {
    int best_slot = -1, best_expert = -1;
    double best = 1e300;
    for (int i = 0; i < candidates; i++) {
        int hot = s->order[state_pick(s, s->ranks < 4 ? s->ranks : 4)];
        bool here = state_pick(s, 2);
        int slot = second_replica(s, here ? hot : -1);
        int e = here ? state_pick(s, s->experts) : expert_on(s, hot);
        if (slot < 0 || e < 0 || !state_may_rewrite(s, slot, e))
            continue;
        double value = even_rewrite(s, slot, e, best);
        *trials -= 8;
        if (value < best) {
            best = value;
            best_slot = slot;
            best_expert = e;
        }
    }
    if (best_slot >= 0)
        even_make_rewrite(s, best_slot, best_expert);
    return best_slot >= 0;
}

/* Two random slots. */
static bool kick_place(struct balance_state *s) {
    int a = state_pick(s, s->slots), b = state_pick(s, s->slots);
    bool may = state_may_swap(s, a, b);
    if (may)
        even_make_swap(s, a, b);
    return may;
}

static bool kick(struct balance_state *s, long *trials) {
    int candidates = 1 + state_pick(s, 8);
    *trials -= candidates;
    bool kicked = state_pick(s, 4) && kick_count(s, candidates, trials);
    for (int i = 0; i < 16 && !kicked; i++)
        kicked = kick_place(s);
    return kicked;
}

/* A copy of the slots, into old or new memory. */
static int *keep(const struct balance_state *s, int *into) {
    size_t bytes = sizeof *s->expert_of_slot * (size_t)s->slots;
    into = into ? into : balance_alloc(1, bytes);
    return memcpy(into, s->expert_of_slot, bytes);
}

enum { KICKS = 3, BACK = 2 };

void search_descend(struct balance_state *s, double goal, long trials) {
    settle_down(s, goal, &trials);
    double best = s->value;
    int *kept = keep(s, NULL);
    while (s->time[s->order[0]] > goal && trials > 0) {
        for (int kicks = 1 + state_pick(s, KICKS); kicks; kicks--)
            kick(s, &trials);
        settle_down(s, goal, &trials);
        if (s->value <= best) {
            best = s->value;
            keep(s, kept);
        } else if (state_pick(s, BACK)) {
            even_reset(s, kept);
        }
    }
    if (s->time[s->order[0]] > goal)
        even_reset(s, kept);
    balance_free(kept);
}

enum { REWRITES = 2 }; /* of 16 trials */
static const double HEAT = 0.001;

/* ---- any number of workloads: random moves that touch a hot rank ---- */

/* A workload drawn by weight. */
static int draw_workload(struct balance_state *s) {
    double x = (double)(state_random(s) >> 11) * 0x1p-53;
    int w = 0;
    while (w < s->workloads - 1 && (x -= s->weight[w]) >= 0)
        w++;
    return w;
}

/* Its hottest rank, at times one of the next. */
static int hot_rank(struct balance_state *s, int w) {
    int depth = state_pick(s, 4) ? 0 : state_pick(s, s->ranks < 8 ? s->ranks : 8);
    return s->order[(size_t)w * s->ranks + depth];
}

/* What a slot takes of workload w. */
static double part(const struct balance_state *s, int slot, int w) {
    int e = s->expert_of_slot[slot];
    return e < 0 ? 0 : s->load[(size_t)e * s->workloads + w] * s->inverse[s->count[e]];
}

struct move {
    int slot, with, expert; /* a swap of slot and with, or (with -1) a rewrite to expert */
    double value;
};

/* A random move that touches a hot rank; `rewrites` of 16 are rewrites: one more replica for what
 * the rank holds, or another expert in its place of a second replica. False: none is legal. */
static bool propose(struct balance_state *s, int rewrites, struct move *m) {
    int w = draw_workload(s), hot = hot_rank(s, w), kind = state_pick(s, 16);
    if (kind >= rewrites) {
        *m = (struct move){hot * s->slots_per_rank + state_pick(s, s->slots_per_rank),
                           state_pick(s, s->slots), -1, 0};
        return part(s, m->slot, w) > part(s, m->with, w) && state_may_swap(s, m->slot, m->with);
    }
    bool here = kind & 1;
    *m = (struct move){second_replica(s, here ? hot : -1), -1,
                       here ? state_pick(s, s->experts) : expert_on(s, hot), 0};
    return m->slot >= 0 && m->expert >= 0 && state_may_rewrite(s, m->slot, m->expert);
}

static double value_of(struct balance_state *s, const struct move *m, double limit) {
    return m->with < 0 ? even_rewrite(s, m->slot, m->expert, limit)
                       : even_swap(s, m->slot, m->with, limit);
}

static void make(struct balance_state *s, const struct move *m) {
    if (m->with < 0)
        even_make_rewrite(s, m->slot, m->expert);
    else
        even_make_swap(s, m->slot, m->with);
}

/* Some moves that make it a little worse are made at first, fewer and fewer, none at the end. */
void search_climb(struct balance_state *s, double goal, long trials) {
    double start = s->value;
    int *kept = keep(s, NULL);
    for (long t = 0; t < trials && s->value > goal; t++) {
        double cool = 1 - (double)t / (0.8 * (double)trials), limit = s->value;
        if (cool > 0)
            limit += HEAT * cool * cool * (double)(state_random(s) >> 11) * 0x1p-53;
        struct move m;
        if (propose(s, REWRITES, &m) && value_of(s, &m, limit) < limit)
            make(s, &m);
    }
    if (s->value > start)
        even_reset(s, kept);
    balance_free(kept);
}

/* ---- few moves: the best of many, one by one ---- */

/* Makes the best of so many random moves, by gain per moved slot, until none gains. */
static void pick_best(struct balance_state *s, double goal, int samples, long *trials) {
    for (bool gained = true; gained && s->value > goal && s->moved < s->move_limit;) {
        struct move best = {-1};
        double most = 0;
        for (int i = 0; i < samples; i++) {
            struct move m;
            if (!propose(s, 10, &m))
                continue;
            int cost = m.with < 0 ? 1 : 2;
            m.value = value_of(s, &m, s->value - most * cost);
            if ((s->value - m.value) / cost > most) {
                most = (s->value - m.value) / cost;
                best = m;
            }
        }
        *trials -= samples;
        gained = best.slot >= 0;
        if (gained)
            make(s, &best);
    }
}

/* Takes slot back to what base has there, in slots[], and whatever else that needs: an expert that
 * would have no replica left, or two on a rank. */
static void take_back(const struct balance_state *s, const int *base, int *slots, int slot) {
    int S = s->slots_per_rank, first = s->rank_of_slot[slot] * S, left = slots[slot];
    int count = 0, other = -1;
    slots[slot] = base[slot];
    for (int i = first; i < first + S; i++)
        if (i != slot && base[slot] >= 0 && slots[i] == base[slot] && base[i] != slots[i])
            take_back(s, base, slots, i);
    for (int i = 0; i < s->slots; i++) {
        count += slots[i] == left;
        if (base[i] == left && slots[i] != left)
            other = i;
    }
    if (left >= 0 && !count && other >= 0)
        take_back(s, base, slots, other);
}

/* Takes back up to three of the slots that differ from base. */
static void take_some_back(struct balance_state *s, const int *base, int *slots) {
    keep(s, slots);
    for (int n = 1 + state_pick(s, 3); n; n--) {
        int slot = state_pick(s, s->slots);
        for (int i = 0; i < s->slots && slots[slot] == base[slot]; i++)
            slot = slot + 1 < s->slots ? slot + 1 : 0;
        if (slots[slot] != base[slot])
            take_back(s, base, slots, slot);
    }
    even_reset(s, slots);
}

/* Taking back can leave an expert with too many replicas. */
static bool within_limits(const struct balance_state *s) {
    for (int e = 0; e < s->experts; e++)
        if (s->count[e] > s->most[e])
            return false;
    for (int i = 0; s->p->max_per_node && i < s->experts * s->nodes; i++)
        if (s->on_node[i] > s->node_limit)
            return false;
    return s->away <= s->away_limit;
}

void search_moves(struct balance_state *s, double goal, long trials) {
    int samples = (int)(trials / (4 + 2 * (long)s->move_limit)) + 64;
    int *base = keep(s, NULL), *slots = keep(s, NULL);
    pick_best(s, goal, samples, &trials);
    double best = s->value;
    int *kept = keep(s, NULL);
    while (best > goal && trials-- > 0) {
        take_some_back(s, base, slots);
        if (within_limits(s))
            pick_best(s, goal, samples / 4 + 1, &trials);
        if (s->value <= best && within_limits(s)) {
            best = s->value;
            keep(s, kept);
        } else {
            even_reset(s, kept);
        }
    }
    even_reset(s, kept);
    balance_free(base);
    balance_free(slots);
    balance_free(kept);
}
