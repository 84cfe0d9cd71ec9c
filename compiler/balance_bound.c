/* A lower bound on what any placement can reach, under any split. */
#include "balance_state.h"

#include <stdlib.h>

struct bound {
    int experts, ranks, slots;
    const int *most; /* [E] replicas at most, by rank of load */
    double *load;    /* [E] descending, scaled so that the perfect time is 1 */
    double *sum;     /* [E+1] of the first loads */
    double *speed;   /* [R+1] sum of the fastest ranks' speeds */
    int *room;       /* [R+1] slots of the roomiest ranks */
    double fastest;
};

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Could the a hottest experts, with at most `replicas` replicas, live on some n ranks without any
 * of these taking longer than t? All their load is there, and so is that of every other expert
 * for which the other ranks have no slot; the coldest are the least that can be. */
static bool hottest_fit(const struct bound *b, int a, int replicas, double t) {
    for (int n = 1; n <= replicas && n <= b->ranks; n++) {
        int stay = b->experts - a - b->room[b->ranks - n];
        double load = b->sum[a];
        if (stay > 0)
            load += b->sum[b->experts] - b->sum[b->experts - stay];
        if (load <= t * b->speed[n] * (1 + 1e-12))
            return true;
    }
    return false;
}

/* False: no placement has all rank times at or below t. */
static bool possible(const struct bound *b, double t) {
    int needed = 0, limit = b->slots;
    double top = t * b->fastest * (1 + 1e-12);
    for (int pass = 0; pass < 2; pass++) {
        int used = 0;
        for (int e = 0; e < b->experts; e++) {
            double parts = b->load[e] / top;
            if (parts > b->ranks)
                return false;
            int count = (int)parts;
            count += count < parts;
            count = count ? count : 1;
            if (!pass) {
                needed += count;
                continue;
            }
            used += count;
            int replicas = used + limit - needed;
            if (replicas >= b->ranks)
                return true;
            if (!hottest_fit(b, e + 1, replicas, t))
                return false;
        }
        if (needed > limit)
            return false;
    }
    return true;
}

/* Without replicas, of the k*R+1 hottest experts some rank holds k+1. */
static double crowded(const struct bound *b) {
    double most = 0;
    for (int k = 0; k * b->ranks < b->experts; k++) {
        int last = k * b->ranks + 1;
        double load = b->sum[last] - b->sum[last - k - 1];
        most = load > most ? load : most;
    }
    return most / b->fastest;
}

static double bound_of(const struct balance_state *s, struct bound *b, int w) {
    int E = b->experts, most = 0;
    for (int e = 0; e < E; e++) {
        b->load[e] = s->load[(size_t)e * s->workloads + w];
        most = s->most[e] > most ? s->most[e] : most;
    }
    qsort(b->load, E, sizeof *b->load, descending);
    for (int e = 0; e < E; e++)
        b->sum[e + 1] = b->sum[e] + b->load[e];
    double low = 1, high = b->load[0] / b->fastest + b->sum[E];
    if (b->load[0] / most / b->fastest >
        low) /* the largest replica, however often replicated */
        low = b->load[0] / most / b->fastest;
    if ((most == 1 || b->slots == b->experts) && crowded(b) > low)
        low = crowded(b);
    if (possible(b, low))
        return low;
    while (high - low > 1e-7 * low) {
        double t = (low + high) / 2;
        *(possible(b, t) ? &high : &low) = t;
    }
    return low;
}

static void sort_ranks(const struct balance_state *s, struct bound *b) {
    int R = s->ranks;
    double *speed = balance_alloc((size_t)R * 2, sizeof *speed), *room = speed + R;
    for (int r = 0; r < R; r++) {
        room[r] = s->p->capacity ? s->p->capacity[r] : s->slots_per_rank;
        speed[r] = room[r] > 0 ? 1 / s->cost[r] : 0;
        b->slots += (int)room[r];
    }
    qsort(speed, R, sizeof *speed, descending);
    qsort(room, R, sizeof *room, descending);
    b->fastest = speed[0];
    for (int r = 0; r < R; r++) {
        b->speed[r + 1] = b->speed[r] + speed[r];
        b->room[r + 1] = b->room[r] + (int)room[r];
    }
    balance_free(speed);
}

double state_bound(struct balance_state *s) {
    struct bound b = {.experts = s->experts, .ranks = s->ranks};
    b.load = state_alloc(s, s->experts, sizeof *b.load);
    b.sum = state_alloc(s, s->experts + 1, sizeof *b.sum);
    b.speed = state_alloc(s, s->ranks + 1, sizeof *b.speed);
    b.room = state_alloc(s, s->ranks + 1, sizeof *b.room);
    sort_ranks(s, &b);
    double total = 0;
    for (int w = 0; w < s->workloads; w++)
        total += s->weight[w] * bound_of(s, &b, w);
    return total;
}
