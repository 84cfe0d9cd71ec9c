/* Placements for a dispatcher that splits every batch as well as the placement allows.
 *
 * The best split of a load is the least-majorised vector of rank times (split.c), so it minimises
 * every symmetric convex cost at once. The search minimises one that is smooth: per load the
 * 32-norm of the rank times, close above their maximum. Smooth, it has prices: the norm's slope in
 * the load of each rank. An expert pays the least price among its ranks, and by convexity
 *
 *     norm after a move >= norm + sum over experts of load * (least price after - before)
 *
 * which costs nanoseconds a move and rejects most of them without any pouring; leaving all flows
 * where they are bounds the norm from above. Moves are drawn by the ranks' prices, ranked between
 * the two bounds, and only the best of a hand are poured, from the flows that are there.
 *
 * Plans meet loads that they were not made for. Beside the workloads themselves the search looks
 * at made ones: each workload stretched away from the others, flattened or sharpened; and when it
 * continues a placement, the trend of the last two windows carried on.
 *
 * Loads lie in lanes of four, floats: the search compares, the judge measures in doubles. */
#include "balance_state.h"

#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

typedef float lanes __attribute__((vector_size(16)));
typedef int lane_mask __attribute__((vector_size(16)));

enum {
    LANE = 4,
    HAND = 200,    /* moves drawn between two rounds of pouring */
    KEEP = 12,     /* of those at most so many are poured */
    LOSSES = 4,    /* and no more after so many that were no gain */
    PATIENCE = 25, /* hands without a gain before the search ends */
    WIDE_HAND = 2000,
    WIDE_KEEP = 48, /* where every change counts */
    POURING = 16,   /* drawings that cost as much as pouring one move */
    TRIALS = 28000,
    MADE_FOR = 16 /* workloads at most for which others are made */
};
static const float RELAX = 1.4f;  /* as in split.c */
static const double NEAR = 1e-3;  /* a move so little above gets more sweeps */
static const double STEP = 1e-7;  /* the least gain */
static const double WORTH = 3e-4; /* the least gain for a slot whose weights must move */

struct pour {
    struct balance_state *s;
    int groups;           /* of lanes */
    double speeds;        /* sum over ranks */
    lanes *load;          /* [E+1][G] the last is an empty slot's: zero */
    lanes *weight;        /* [G] */
    lanes *flow, *time;   /* [slots][G] load that a slot takes, [R][G] */
    lanes *flow0, *time0; /* the same before the move that is being tried */
    lanes *price, *power; /* [R][G] */
    lanes *least;         /* [E+1][G] least price among an expert's ranks */
    lanes *slope;         /* [G] of the norm in the mean of powers */
    float *heat;          /* [R] sum of prices */
    int squarings;        /* the norm is the 2^squarings-th */
    lanes fewest, most;   /* of the times that it tells apart */
    int *multi, *at;      /* experts with several replicas; an expert's index there */
    int *victim;          /* slots that may be rewritten */
    int multis, victims;
    double value;
};

struct move { /* swap slots from and to; or rewrite slot to with what from holds */
    bool swap;
    int from, to, from_expert, to_expert;
    double value; /* the change expected */
};

/* Lanes of both; what SSE does in one instruction, elsewhere with masks. */
#ifdef __SSE__
static lanes lower(lanes a, lanes b) {
    return (lanes)_mm_min_ps((__m128)a, (__m128)b);
}
static lanes upper(lanes a, lanes b) {
    return (lanes)_mm_max_ps((__m128)a, (__m128)b);
}
#else
static lanes pick(lane_mask m, lanes a, lanes b) {
    return (lanes)((m & (lane_mask)a) | (~m & (lane_mask)b));
}
static lanes lower(lanes a, lanes b) {
    return pick(a < b, a, b);
}
static lanes upper(lanes a, lanes b) {
    return pick(a > b, a, b);
}
#endif
static double total(lanes a) {
    return (double)a[0] + a[1] + a[2] + a[3];
}

/* A time, kept where neither its powers nor their sums leave a float. */
static lanes tame(const struct pour *p, lanes t) {
    return upper(lower(t, p->most), p->fewest);
}

/* t^(2^squarings) */
static lanes power(const struct pour *p, lanes t) {
    t = tame(p, t);
    for (int i = 0; i < p->squarings; i++)
        t *= t;
    return t;
}

/* t^(2^squarings - 1) */
static lanes slope_of(const struct pour *p, lanes t) {
    lanes r = {1, 1, 1, 1};
    t = tame(p, t);
    for (int i = 0; i < p->squarings; i++) {
        r *= t;
        t *= t;
    }
    return r;
}

static double root(const struct pour *p, double x) {
    for (int i = 0; i < p->squarings; i++)
        x = __builtin_sqrt(x);
    return x;
}

static void set_norm(struct pour *p, int squarings, float fewest, float most) {
    p->squarings = squarings;
    p->fewest = (lanes){fewest, fewest, fewest, fewest};
    p->most = (lanes){most, most, most, most};
}

static int row(const struct pour *p, int expert) {
    return (expert < 0 ? p->s->experts : expert) * p->groups;
}

/* ---- loads to plan for ---- */

/* Number of loads made beside the workloads. */
static int made_loads(const struct balance_state *s) {
    if (s->workloads < 2 || s->workloads > MADE_FOR)
        return 0;
    return s->move_limit < s->slots ? 2 : 2 * s->workloads;
}

/* A lane's load, scaled to the sum of all lanes. */
static void set_lane(struct pour *p, int lane, const double *load, double weight) {
    double sum = 0;
    for (int e = 0; e < p->s->experts; e++)
        sum += load[e];
    for (int e = 0; e < p->s->experts; e++)
        ((float *)p->load)[(size_t)e * p->groups * LANE + lane] =
            (float)(load[e] / sum * p->speeds);
    ((float *)p->weight)[lane] = (float)weight;
}

/* from + step * (from - base), but at least 0.3 from. */
static void make_further(struct pour *p, int lane, const double *from, const double *base,
                         double step, double weight, double *made) {
    for (int e = 0; e < p->s->experts; e++) {
        double far = from[e] + step * (from[e] - base[e]);
        made[e] = far < 0.3 * from[e] ? 0.3 * from[e] : far;
    }
    set_lane(p, lane, made, weight);
}

/* from^(3/4) or from^(5/4) */
static void make_flat(struct pour *p, int lane, const double *from, bool sharp, double weight,
                      double *made) {
    for (int e = 0; e < p->s->experts; e++)
        made[e] = sharp ? from[e] * __builtin_sqrt(__builtin_sqrt(from[e]))
                        : __builtin_sqrt(from[e] * __builtin_sqrt(from[e]));
    set_lane(p, lane, made, weight);
}

static void make_loads(struct pour *p, const double *load, const double *weight, double far) {
    int W = p->s->workloads, E = p->s->experts;
    double *made = state_alloc(p->s, E, sizeof *made),
           *rest = state_alloc(p->s, E, sizeof *rest);
    const double *last = load + (size_t)(W - 1) * E;
    if (p->s->move_limit < p->s->slots) {
        make_further(p, W, last, last - E, 1, weight[W - 1], made);
        make_further(p, W + 1, last, last - E, 2, weight[W - 1] / 2, made);
        return;
    }
    for (int w = 0; w < W; w++) {
        const double *from = load + (size_t)w * E;
        for (int e = 0; e < E; e++) {
            rest[e] = 0;
            for (int v = 0; v < W; v++)
                rest[e] += v == w ? 0 : load[(size_t)v * E + e] / (W - 1);
        }
        make_further(p, W + w, from, rest, 0.7 * far, weight[w] / 2, made);
        make_flat(p, 2 * W + w, from, w % 2, weight[w] / 2, made);
    }
}

static void weigh(struct pour *p) {
    double sum = 0;
    for (int g = 0; g < p->groups; g++)
        sum += total(p->weight[g]);
    for (int g = 0; g < p->groups; g++)
        p->weight[g] /= (float)sum;
}

static void fill_lanes(struct pour *p, double far) {
    struct balance_state *s = p->s;
    int W = s->workloads, E = s->experts;
    double *load = state_alloc(s, (size_t)W * E, sizeof *load);
    for (int w = 0; w < W; w++) {
        for (int e = 0; e < E; e++)
            load[(size_t)w * E + e] = s->load[(size_t)e * W + w];
        set_lane(p, w, load + (size_t)w * E, s->weight[w]);
    }
    if (made_loads(s))
        make_loads(p, load, s->weight, far);
    weigh(p);
}

/* ---- pouring ---- */

static void pour_expert(struct pour *p, int expert) {
    const struct balance_state *s = p->s;
    int G = p->groups;
    for (int a = s->first[expert]; a >= 0; a = s->next[a]) {
        int ra = s->rank_of_slot[a], near = 7; /* partners on: enough to mix, few for many */
        for (int b = s->next[a]; b >= 0 && near-- > 0; b = s->next[b]) {
            int rb = s->rank_of_slot[b];
            float ca = (float)s->cost[ra], cb = (float)s->cost[rb], part = RELAX / (ca + cb);
            lanes *fa = p->flow + (size_t)a * G, *fb = p->flow + (size_t)b * G;
            lanes *ta = p->time + (size_t)ra * G, *tb = p->time + (size_t)rb * G;
            for (int g = 0; ra != rb && g < G; g++) {
                lanes t = upper(lower((ta[g] - tb[g]) * part, fa[g]), -fb[g]);
                fa[g] -= t;
                fb[g] += t;
                ta[g] -= t * ca;
                tb[g] += t * cb;
            }
        }
    }
}

static void sweep(struct pour *p, int rounds) {
    for (int i = 0; i < rounds; i++)
        for (int k = 0; k < p->multis; k++)
            pour_expert(p, p->multi[k]);
}

/* Mean over ranks of power(time), by speed. */
static lanes mean_power(const struct pour *p, int g) {
    lanes sum = {0};
    for (int r = 0; r < p->s->ranks; r++)
        sum += power(p, p->time[(size_t)r * p->groups + g]) *
               (float)(1 / (p->s->cost[r] * p->speeds));
    return sum;
}

static double norm(const struct pour *p) {
    double sum = 0;
    for (int g = 0; g < p->groups; g++) {
        lanes mean = mean_power(p, g);
        for (int i = 0; i < LANE; i++)
            sum += p->weight[g][i] * root(p, mean[i]);
    }
    return sum;
}

static void keep(struct pour *p) {
    memcpy(p->flow0, p->flow, sizeof(lanes) * p->s->slots * p->groups);
    memcpy(p->time0, p->time, sizeof(lanes) * p->s->ranks * p->groups);
}

static void restore(struct pour *p) {
    memcpy(p->flow, p->flow0, sizeof(lanes) * p->s->slots * p->groups);
    memcpy(p->time, p->time0, sizeof(lanes) * p->s->ranks * p->groups);
}

static void join(struct pour *p, int expert) {
    p->at[expert] = p->multis;
    p->multi[p->multis++] = expert;
}

static void leave(struct pour *p, int expert) {
    int last = p->multi[--p->multis];
    p->multi[p->at[expert]] = last;
    p->at[last] = p->at[expert];
}

/* All flows anew from even parts. */
static void pour(struct pour *p) {
    const struct balance_state *s = p->s;
    int G = p->groups;
    memset(p->time, 0, sizeof(lanes) * s->ranks * G);
    memset(p->flow, 0, sizeof(lanes) * s->slots * G);
    p->multis = 0;
    for (int e = 0; e < s->experts; e++)
        if (s->count[e] > 1)
            join(p, e);
    for (int i = 0; i < s->slots; i++) {
        int e = s->expert_of_slot[i], r = s->rank_of_slot[i];
        for (int g = 0; e >= 0 && g < G; g++) {
            p->flow[i * G + g] = p->load[row(p, e) + g] / (float)s->count[e];
            p->time[r * G + g] += p->flow[i * G + g] * (float)s->cost[r];
        }
    }
    sweep(p, 60);
    keep(p);
    p->value = norm(p);
}

/* ---- moves; the flows go along ---- */

static void swap_slots(struct pour *p, int a, int b) {
    struct balance_state *s = p->s;
    int ea = s->expert_of_slot[a], eb = s->expert_of_slot[b], G = p->groups;
    int ra = s->rank_of_slot[a], rb = s->rank_of_slot[b];
    state_put(s, a, -1);
    state_put(s, b, ea);
    state_put(s, a, eb);
    for (int g = 0; g < G; g++) {
        lanes fa = p->flow[a * G + g], fb = p->flow[b * G + g];
        p->flow[a * G + g] = fb;
        p->flow[b * G + g] = fa;
        p->time[ra * G + g] += (fb - fa) * (float)s->cost[ra];
        p->time[rb * G + g] += (fa - fb) * (float)s->cost[rb];
    }
}

/* Gives a slot another expert; its flow goes to the old one's other replicas in equal parts. */
static void rewrite_slot(struct pour *p, int slot, int expert) {
    struct balance_state *s = p->s;
    int old = s->expert_of_slot[slot], G = p->groups, r = s->rank_of_slot[slot];
    state_put(s, slot, expert);
    if (s->count[expert] == 2)
        join(p, expert);
    if (old >= 0 && s->count[old] == 1)
        leave(p, old);
    for (int g = 0; g < G; g++) {
        lanes flow = p->flow[slot * G + g];
        p->flow[slot * G + g] = (lanes){0};
        p->time[r * G + g] -= flow * (float)s->cost[r];
        for (int i = old < 0 ? -1 : s->first[old]; i >= 0; i = s->next[i]) {
            lanes part = flow / (float)s->count[old];
            p->flow[i * G + g] += part;
            p->time[s->rank_of_slot[i] * G + g] += part * (float)s->cost[s->rank_of_slot[i]];
        }
    }
}

static void make(struct pour *p, const struct move *m) {
    if (m->swap)
        swap_slots(p, m->from, m->to);
    else
        rewrite_slot(p, m->to, m->from_expert);
}

/* Takes a move back; the flows of before it are restored. */
static void unmake(struct pour *p, const struct move *m) {
    struct balance_state *s = p->s;
    if (m->swap) {
        swap_slots(p, m->from, m->to);
    } else {
        state_put(s, m->to, m->to_expert);
        if (s->count[m->from_expert] == 1)
            leave(p, m->from_expert);
        if (m->to_expert >= 0 && s->count[m->to_expert] == 2)
            join(p, m->to_expert);
    }
    restore(p);
}

static bool may(const struct pour *p, const struct move *m) {
    const struct balance_state *s = p->s;
    if (s->expert_of_slot[m->from] != m->from_expert ||
        s->expert_of_slot[m->to] != m->to_expert)
        return false; /* another move came before */
    return m->swap ? state_may_swap(s, m->from, m->to)
                   : state_may_rewrite(s, m->to, m->from_expert);
}

/* The norm after a move that has been made; limit: above it need not be exact. */
static double pour_on(struct pour *p, double limit) {
    sweep(p, 2);
    double value = norm(p);
    if (value < limit || value > limit + NEAR)
        return value;
    sweep(p, 4);
    return norm(p);
}

/* ---- bounds of a move ---- */

static void set_least(struct pour *p, int expert) {
    const struct balance_state *s = p->s;
    for (int g = 0; g < p->groups; g++) {
        lanes least = {3e38f, 3e38f, 3e38f, 3e38f};
        for (int i = s->first[expert]; i >= 0; i = s->next[i])
            least = lower(least, p->price[s->rank_of_slot[i] * p->groups + g]);
        p->least[row(p, expert) + g] = least;
    }
}

static void set_prices(struct pour *p) {
    const struct balance_state *s = p->s;
    memset(p->heat, 0, sizeof *p->heat * s->ranks);
    for (int g = 0; g < p->groups; g++) {
        lanes mean = mean_power(p, g);
        for (int i = 0; i < LANE; i++)
            p->slope[g][i] = (float)(p->weight[g][i] * root(p, mean[i]) / mean[i]);
        for (int r = 0; r < s->ranks; r++) {
            lanes price = slope_of(p, p->time[r * p->groups + g]) * p->slope[g];
            p->price[r * p->groups + g] = price;
            p->power[r * p->groups + g] = power(p, p->time[r * p->groups + g]);
            p->heat[r] += (float)total(price);
        }
    }
    for (int e = 0; e < s->experts; e++)
        set_least(p, e);
    p->victims = 0;
    for (int i = 0; i < s->slots; i++)
        if (!s->fixed[i] && (s->expert_of_slot[i] < 0 || s->count[s->expert_of_slot[i]] > 1))
            p->victim[p->victims++] = i;
}

/* What an expert pays more when its replica on one rank goes to another (-1: nowhere). */
static lanes pays(const struct pour *p, int expert, int from, int to, int g) {
    const struct balance_state *s = p->s;
    if (expert < 0)
        return (lanes){0};
    lanes least = {3e38f, 3e38f, 3e38f, 3e38f};
    if (to >= 0)
        least = p->price[to * p->groups + g];
    for (int i = s->first[expert]; i >= 0; i = s->next[i])
        if (s->rank_of_slot[i] != from)
            least = lower(least, p->price[s->rank_of_slot[i] * p->groups + g]);
    return p->load[row(p, expert) + g] * (least - p->least[row(p, expert) + g]);
}

/* The change of a rank's power when its load grows. */
static lanes grows(const struct pour *p, int rank, int g, lanes load) {
    float cost = (float)p->s->cost[rank];
    size_t at = (size_t)rank * p->groups + g;
    return (power(p, p->time[at] + load * cost) - p->power[at]) * (1 / cost);
}

static double between(double below, double above) {
    return below + 0.3 * (above - below);
}

/* What sums of grows() must be multiplied by to be changes of the norm. */
static lanes scale(const struct pour *p, int g) {
    return p->slope[g] * (float)(1 / (p->speeds * (1 << p->squarings)));
}

static double expect_swap(const struct pour *p, const struct move *m, double limit) {
    int ra = p->s->rank_of_slot[m->from], rb = p->s->rank_of_slot[m->to], G = p->groups;
    lanes below = {0}, above = {0};
    for (int g = 0; g < G; g++)
        below += pays(p, m->from_expert, ra, rb, g) + pays(p, m->to_expert, rb, ra, g);
    double least = total(below) / p->speeds;
    if (least >= limit)
        return least;
    for (int g = 0; g < G; g++) {
        lanes move = p->flow[m->from * G + g] - p->flow[m->to * G + g];
        above += (grows(p, ra, g, -move) + grows(p, rb, g, move)) * scale(p, g);
    }
    return between(least, total(above));
}

/* The flows that stay in a rewrite, but for one exchange between from's rank and to's. */
static lanes rewritten(const struct pour *p, const struct move *m, int g) {
    const struct balance_state *s = p->s;
    int ra = s->rank_of_slot[m->from], rb = s->rank_of_slot[m->to], G = p->groups;
    lanes flow = p->flow[m->to * G + g], sum = {0}, hot = {0};
    int others = m->to_expert < 0 ? 0 : s->count[m->to_expert] - 1;
    for (int i = others ? s->first[m->to_expert] : -1; i >= 0; i = s->next[i]) {
        int r = s->rank_of_slot[i];
        if (r == ra)
            hot += flow / (float)others;
        else if (r != rb)
            sum += grows(p, r, g, flow / (float)others);
    }
    float ca = (float)s->cost[ra], cb = (float)s->cost[rb];
    lanes ta = p->time[ra * G + g] + hot * ca, tb = p->time[rb * G + g] - flow * cb;
    lanes t = lower(upper((ta - tb) * (1 / (ca + cb)), (lanes){0}), p->flow[m->from * G + g]);
    return sum + grows(p, ra, g, hot - t) + grows(p, rb, g, t - flow);
}

static double expect_rewrite(const struct pour *p, const struct move *m, double limit) {
    int rb = p->s->rank_of_slot[m->to], G = p->groups;
    lanes below = {0}, above = {0};
    for (int g = 0; g < G; g++)
        below += pays(p, m->to_expert, rb, -1, g) + pays(p, m->from_expert, -1, rb, g);
    double least = total(below) / p->speeds;
    if (least >= limit)
        return least;
    for (int g = 0; g < G; g++)
        above += rewritten(p, m, g) * scale(p, g);
    return between(least, total(above));
}

/* ---- search ---- */

static int hottest_of(struct pour *p, int n) {
    int best = state_pick(p->s, p->s->ranks);
    for (int i = 1; i < n; i++) {
        int r = state_pick(p->s, p->s->ranks);
        best = p->heat[r] > p->heat[best] ? r : best;
    }
    return best;
}

static int cooler_of_two(struct pour *p) {
    int a = state_pick(p->s, p->s->ranks), b = state_pick(p->s, p->s->ranks);
    return p->heat[a] < p->heat[b] ? a : b;
}

/* Draws a move that takes load from a hot rank; false when it may not be made. */
static bool draw(struct pour *p, int hot, struct move *m) {
    struct balance_state *s = p->s;
    int S = s->slots_per_rank;
    m->from = hot * S + state_pick(s, S);
    m->swap = state_pick(s, 2) || !p->victims;
    m->to = m->swap ? cooler_of_two(p) * S + state_pick(s, S)
                    : p->victim[state_pick(s, p->victims)];
    m->from_expert = s->expert_of_slot[m->from];
    m->to_expert = s->expert_of_slot[m->to];
    return m->from_expert >= 0 && may(p, m);
}

/* Puts a move into a hand, the most promising first, unless it is there. Returns how many are. */
static int hold(struct move *hand, int count, int size, const struct move *m) {
    int k = count;
    while (k > 0 && hand[k - 1].value > m->value)
        k--;
    if (k > 0 && hand[k - 1].from == m->from && hand[k - 1].to == m->to &&
        hand[k - 1].swap == m->swap)
        return count;
    count += count < size;
    memmove(hand + k + 1, hand + k, sizeof *hand * (count - 1 - k));
    hand[k] = *m;
    return count;
}

/* The best of n drawn moves. */
static int deal(struct pour *p, int n, struct move *hand, int size) {
    int count = 0, hot = 0;
    set_prices(p);
    for (int i = 0; i < n; i++) {
        struct move m;
        if (i % 4 == 0)
            hot = hottest_of(p, 4);
        if (!draw(p, hot, &m))
            continue;
        double limit = count == size ? hand[count - 1].value : 0;
        m.value = m.swap ? expect_swap(p, &m, limit) : expect_rewrite(p, &m, limit);
        if (m.value < limit)
            count = hold(hand, count, size, &m);
    }
    return count;
}

static bool play(struct pour *p, const struct move *m) {
    make(p, m);
    double value = pour_on(p, p->value);
    if (value >= p->value - STEP) {
        unmake(p, m);
        return false;
    }
    p->value = value;
    keep(p);
    return true;
}

/* Every gain is taken. */
static long descend(struct pour *p, long trials) {
    struct move hand[KEEP];
    for (int idle = 0; trials > 0 && idle < PATIENCE && p->value > 1 + STEP; idle++) {
        int count = deal(p, HAND, hand, KEEP), losses = 0;
        trials -= HAND;
        for (int i = 0; i < count && losses < LOSSES; i++) {
            if (!may(p, &hand[i]))
                continue;
            trials -= POURING;
            if (play(p, &hand[i]))
                idle = -1;
            else
                losses++;
        }
    }
    return trials;
}

/* Once nothing helps any more: the loads that were made go further, or, when the only load is the
 * one that counts, the norm comes nearer to the maximum. */
static void descend_twice(struct pour *p, long trials) {
    trials = descend(p, trials);
    if (made_loads(p->s))
        fill_lanes(p, 2);
    else if (p->value < 1.2)
        set_norm(p, 8, 0.75f, 1.35f);
    pour(p);
    descend(p, trials);
}

/* Slots whose weights must move, of which few may: the best of a wide hand, one by one. */
static void improve(struct pour *p) {
    struct move hand[WIDE_KEEP];
    for (const struct move *best = hand; best;) {
        int count = deal(p, WIDE_HAND, hand, WIDE_KEEP);
        double most = WORTH;
        best = NULL;
        for (int i = 0; i < count; i++) {
            int moved = p->s->moved;
            make(p, &hand[i]);
            moved = p->s->moved - moved;
            double gain = (p->value - pour_on(p, p->value)) / (moved > 1 ? 1.7 : 1);
            unmake(p, &hand[i]);
            if (gain > most) {
                most = gain;
                best = &hand[i];
            }
        }
        if (best) {
            make(p, best);
            sweep(p, 30);
            keep(p);
            p->value = norm(p);
        }
    }
}

#define LANES(s, field, n) \
    ((p)->field = state_alloc((s), (size_t)(n) * (p)->groups, sizeof(lanes)))

static void open_pour(struct pour *p, struct balance_state *s) {
    p->s = s;
    p->groups = (s->workloads + made_loads(s) + LANE - 1) / LANE;
    for (int r = 0; r < s->ranks; r++)
        p->speeds += 1 / s->cost[r];
    LANES(s, load, s->experts + 1);
    LANES(s, least, s->experts + 1);
    LANES(s, weight, 1);
    LANES(s, slope, 1);
    LANES(s, flow, s->slots);
    LANES(s, flow0, s->slots);
    LANES(s, time, s->ranks);
    LANES(s, time0, s->ranks);
    LANES(s, price, s->ranks);
    LANES(s, power, s->ranks);
    p->heat = state_alloc(s, s->ranks, sizeof *p->heat);
    p->multi = state_alloc(s, s->experts, sizeof *p->multi);
    p->at = state_alloc(s, s->experts, sizeof *p->at);
    p->victim = state_alloc(s, s->slots, sizeof *p->victim);
    fill_lanes(p, 1);
}

void pour_search(struct balance_state *s, long trials) {
    struct pour p = {0};
    open_pour(&p, s);
    set_norm(&p, 5, 0.1f, 8);
    pour(&p);
    if (s->move_limit < s->slots)
        improve(&p);
    else
        descend_twice(&p, trials ? trials : s->workloads == 1 ? TRIALS / 2 : TRIALS);
}
