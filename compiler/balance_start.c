/* A first placement: group homes, replica counts, the longest replica first to the rank where it
 * ends earliest, and a way out when the limits leave an expert without a place. */
#include "balance_state.h"

#include <stdlib.h>
#include <string.h>

/* ---- homes: groups packed onto nodes ---- */

struct packing {
    struct balance_state *s;
    int groups, per_node, nodes;
    bool alike;       /* nodes are interchangeable */
    double *load;     /* [G][W] */
    double *node;     /* [N][W] load of what is there so far */
    double *room;     /* [N] sum of speeds */
    int *used;        /* [N] groups there */
    int *home, *best; /* [G] */
    int *pins;        /* [G][N] pinned slots of the group there */
    uint8_t *never;   /* [G][N] an expert of the group may live nowhere there */
    double value;     /* of best */
    long left;        /* leaves and inner nodes still to be looked at */
};

/* Weighted mean over workloads of the largest node time; node times only grow while packing. */
static double packing_value(const struct packing *k) {
    double total = 0;
    for (int w = 0; w < k->s->workloads; w++) {
        double most = 0;
        for (int n = 0; n < k->nodes; n++) {
            double t = k->node[(size_t)n * k->s->workloads + w] / k->room[n];
            most = t > most ? t : most;
        }
        total += k->s->weight[w] * most;
    }
    return total;
}

/* No expert without a rank at home, no more pins off home than slots may be. */
static bool packing_legal(const struct packing *k) {
    int away = 0;
    for (int g = 0; g < k->groups; g++) {
        if (k->never[g * k->nodes + k->home[g]])
            return false;
        for (int n = 0; n < k->nodes; n++)
            away += n == k->home[g] ? 0 : k->pins[g * k->nodes + n];
    }
    return away <= k->s->away_limit;
}

static void packing_move(struct packing *k, int group, int node, int by) {
    k->home[group] = node;
    k->used[node] += by;
    for (int w = 0; w < k->s->workloads; w++)
        k->node[(size_t)node * k->s->workloads + w] +=
            by * k->load[(size_t)group * k->s->workloads + w];
}

static void packing_keep(struct packing *k, double value) {
    k->value = value;
    memcpy(k->best, k->home, sizeof *k->best * k->groups);
}

/* All packings, group by group; of nodes that are alike and empty only the first is tried. */
static void packing_search(struct packing *k, int group) {
    double value = packing_value(k);
    if (value >= k->value || --k->left < 0)
        return;
    if (group == k->groups) {
        if (packing_legal(k))
            packing_keep(k, value);
        return;
    }
    for (int n = 0; n < k->nodes; n++) {
        if (k->used[n] == k->per_node)
            continue;
        bool empty = !k->used[n];
        packing_move(k, group, n, 1);
        packing_search(k, group + 1);
        packing_move(k, group, n, -1);
        if (empty && k->alike)
            break;
    }
}

/* Swaps of two groups until none helps. */
static void packing_swaps(struct packing *k) {
    memcpy(k->home, k->best, sizeof *k->home * k->groups);
    for (int g = 0; g < k->groups; g++)
        packing_move(k, g, k->home[g], 1);
    for (bool better = true; better;) {
        better = false;
        for (int a = 0; a < k->groups; a++)
            for (int b = 0; b < a; b++) {
                int na = k->home[a], nb = k->home[b];
                if (na == nb)
                    continue;
                packing_move(k, a, na, -1), packing_move(k, b, nb, -1);
                packing_move(k, a, nb, 1), packing_move(k, b, na, 1);
                double value = packing_value(k);
                if (value < k->value - 1e-12 && packing_legal(k)) {
                    packing_keep(k, value);
                    better = true;
                    continue;
                }
                packing_move(k, a, nb, -1), packing_move(k, b, na, -1);
                packing_move(k, a, na, 1), packing_move(k, b, nb, 1);
            }
    }
}

static void packing_limits(struct packing *k) {
    struct balance_state *s = k->s;
    int size = s->experts / k->groups;
    k->pins = state_alloc(s, (size_t)k->groups * s->nodes, sizeof *k->pins);
    k->never = state_alloc(s, (size_t)k->groups * s->nodes, 1);
    for (int i = 0; s->p->pin && i < s->slots; i++)
        if (s->p->pin[i] >= 0)
            k->pins[s->p->pin[i] / size * s->nodes + s->node_of_rank[s->rank_of_slot[i]]]++;
    for (int e = 0; s->p->forbidden && e < s->experts; e++)
        for (int n = 0; n < s->nodes; n++) {
            bool some = false;
            for (int r = 0; r < s->ranks; r++)
                some |= s->node_of_rank[r] == n && !s->banned[(size_t)e * s->ranks + r];
            k->never[e / size * s->nodes + n] |= !some;
        }
}

static void packing_init(struct packing *k, struct balance_state *s) {
    int W = s->workloads, G = s->p->groups, size = s->experts / G;
    *k = (struct packing){.s = s,
                          .groups = G,
                          .nodes = s->nodes,
                          .per_node = G / s->nodes,
                          .alike = true,
                          .value = 1e300,
                          .left = 200000};
    k->load = state_alloc(s, (size_t)G * W, sizeof *k->load);
    k->node = state_alloc(s, (size_t)s->nodes * W, sizeof *k->node);
    k->room = state_alloc(s, s->nodes, sizeof *k->room);
    k->used = state_alloc(s, s->nodes, sizeof *k->used);
    k->home = state_alloc(s, G, sizeof *k->home);
    k->best = state_alloc(s, G, sizeof *k->best);
    for (int e = 0; e < s->experts; e++)
        for (int w = 0; w < W; w++)
            k->load[(size_t)(e / size) * W + w] += s->load[(size_t)e * W + w];
    for (int r = 0; r < s->ranks; r++)
        if (!s->p->capacity || s->p->capacity[r])
            k->room[s->node_of_rank[r]] += 1 / s->cost[r];
    for (int n = 0; n < s->nodes; n++)
        if (k->room[n] <= 0)
            k->room[n] = 1e-9;
    if (s->p->speed || s->p->capacity || s->p->pin || s->p->forbidden || s->p->current)
        k->alike = false;
    packing_limits(k);
}

/* Where most of each group lives now, as far as nodes have room. */
static void packing_current(struct packing *k, int *votes) {
    const struct balance_state *s = k->s;
    int size = s->experts / k->groups;
    memset(k->used, 0, sizeof *k->used * s->nodes);
    for (int i = 0; i < s->slots; i++)
        if (s->expert_of_slot[i] >= 0)
            votes[s->expert_of_slot[i] / size * s->nodes +
                  s->node_of_rank[s->rank_of_slot[i]]]++;
    for (int left = k->groups; left; left--) {
        int best = -1;
        for (int i = 0; i < k->groups * s->nodes; i++)
            if (votes[i] >= 0 && k->used[i % s->nodes] < k->per_node &&
                (best < 0 || votes[i] > votes[best]))
                best = i;
        k->best[best / s->nodes] = best % s->nodes;
        k->used[best % s->nodes]++;
        for (int n = 0; n < s->nodes; n++)
            votes[best / s->nodes * s->nodes + n] = -1;
    }
}

double start_homes(struct balance_state *s, bool *exact) {
    struct packing k;
    packing_init(&k, s);
    bool keep = s->p->current && s->p->moves >= 0;
    if (keep) {
        packing_current(&k, state_alloc(s, (size_t)k.groups * s->nodes, sizeof(int)));
    } else {
        packing_search(&k, 0);
        if (k.left < 0) {
            if (k.value > 1e299)
                for (int g = 0; g < k.groups; g++)
                    k.best[g] = g / k.per_node;
            packing_swaps(&k);
        }
    }
    s->home = state_alloc(s, s->experts, sizeof *s->home);
    for (int e = 0; e < s->experts; e++)
        s->home[e] = k.best[e / (s->experts / k.groups)];
    s->away = 0;
    for (int i = 0; i < s->slots; i++)
        s->away += s->expert_of_slot[i] >= 0 &&
                   s->home[s->expert_of_slot[i]] != s->node_of_rank[s->rank_of_slot[i]];
    *exact = !keep && k.left >= 0;
    return k.value;
}

/* ---- counts ---- */

struct heap {
    int *item, size;
    const double *key;
    const int *count;
};

static bool above(const struct heap *h, int a, int b) {
    double ka = h->key[a] * h->count[b], kb = h->key[b] * h->count[a];
    return ka > kb || (ka == kb && a < b);
}

static void sink(struct heap *h, int i) {
    for (int child; (child = 2 * i + 1) < h->size; i = child) {
        if (child + 1 < h->size && above(h, h->item[child + 1], h->item[child]))
            child++;
        if (!above(h, h->item[child], h->item[i]))
            return;
        int t = h->item[i];
        h->item[i] = h->item[child];
        h->item[child] = t;
    }
}

static int pool_of(const struct balance_state *s, int expert) {
    return s->home ? s->home[expert] : 0;
}

/* want[E]: one replica each, and the others one by one to the expert whose replicas are largest:
 * this makes the largest replica as small as it can be. Homes keep to the slots of their node. */
static void choose_counts(struct balance_state *s, const double *key, int *want, int *items) {
    int *pool = state_alloc(s, s->nodes, sizeof *pool),
        *most = state_alloc(s, s->experts, sizeof *most);
    for (int i = 0; i < s->slots; i++)
        if (!s->fixed[i])
            pool[s->home ? s->node_of_rank[s->rank_of_slot[i]] : 0]++;
    for (int e = 0; e < s->experts; e++) {
        want[e] = s->count[e] ? s->count[e] : 1;
        pool[pool_of(s, e)] -= !s->count[e];
        for (int r = 0; r < s->ranks; r++)
            most[e] += !s->banned[(size_t)e * s->ranks + r] &&
                       (!s->home || s->home[e] == s->node_of_rank[r]);
        most[e] = most[e] < s->most[e] ? most[e] : s->most[e];
        items[e] = e;
    }
    struct heap h = {items, s->experts, key, want};
    for (int i = h.size / 2; i-- > 0;)
        sink(&h, i);
    while (h.size) {
        int e = h.item[0];
        if (pool[pool_of(s, e)] > 0 && want[e] < most[e]) {
            want[e]++;
            pool[pool_of(s, e)]--;
        } else {
            h.item[0] = h.item[--h.size];
        }
        sink(&h, 0);
    }
}

/* ---- places ---- */

static int free_slot(const struct balance_state *s, int rank) {
    for (int i = rank * s->slots_per_rank; i < (rank + 1) * s->slots_per_rank; i++)
        if (s->expert_of_slot[i] < 0 && !s->fixed[i])
            return i;
    return -1;
}

struct item {
    double size;
    int expert;
};

static int by_size(const void *a, const void *b) {
    const struct item *x = a, *y = b;
    return x->size != y->size ? x->size < y->size ? 1 : -1 : x->expert - y->expert;
}

/* The rank where one more replica ends earliest. */
static int best_slot(const struct balance_state *s, const double *time, int expert,
                     double size) {
    int best = -1;
    double least = 1e300;
    for (int r = 0; r < s->ranks; r++) {
        double t = time[r] + size * s->cost[r];
        if (t >= least)
            continue;
        int slot = free_slot(s, r);
        if (slot >= 0 && state_may_put(s, slot, expert)) {
            best = slot;
            least = t;
        }
    }
    return best;
}

/* Makes room for an expert without a replica: a free slot, or one that holds a second replica, or
 * one whose expert can go where that is so. Ranks breadth first, each once. */
static bool settle(struct balance_state *s, int expert) {
    int *from = balance_alloc((size_t)s->ranks * 2, sizeof *from), *queue = from + s->ranks,
        head = 0, tail = 0;
    int found = -1;
    for (int r = 0; r < s->ranks; r++) {
        from[r] = -2; /* not seen */
        if (s->banned[(size_t)expert * s->ranks + r] ||
            s->on_rank[(size_t)expert * s->ranks + r] ||
            (s->home && s->home[expert] != s->node_of_rank[r] && s->away >= s->away_limit))
            continue;
        from[r] = -1;
        queue[tail++] = r;
    }
    while (head < tail && found < 0) {
        int r = queue[head++];
        for (int i = r * s->slots_per_rank; i < (r + 1) * s->slots_per_rank && found < 0; i++)
            if (!s->fixed[i] &&
                (s->expert_of_slot[i] < 0 || s->count[s->expert_of_slot[i]] > 1))
                found = i;
        for (int i = r * s->slots_per_rank; i < (r + 1) * s->slots_per_rank && found < 0; i++) {
            int e = s->expert_of_slot[i];
            for (int to = 0; !s->fixed[i] && to < s->ranks; to++)
                if (from[to] == -2 && !s->banned[(size_t)e * s->ranks + to] &&
                    (!s->home || s->node_of_rank[to] == s->node_of_rank[r])) {
                    from[to] = i; /* its expert would come */
                    queue[tail++] = to;
                }
        }
    }
    for (int slot = found; slot >= 0;) {
        int source = from[s->rank_of_slot[slot]];
        int e = source < 0 ? expert : s->expert_of_slot[source];
        if (source >= 0)
            state_put(s, source, -1);
        state_put(s, slot, e);
        slot = source;
    }
    balance_free(from);
    return found >= 0;
}

int start_singles(struct balance_state *s) {
    for (int e = 0; e < s->experts; e++)
        if (!s->count[e] && !settle(s, e))
            return e;
    return -1;
}

/* What is still free takes the expert with the largest replicas that may come. */
static void fill(struct balance_state *s, const double *key) {
    for (int r = 0; r < s->ranks; r++)
        for (int slot; (slot = free_slot(s, r)) >= 0;) {
            int best = -1;
            for (int e = 0; e < s->experts; e++)
                if (state_may_put(s, slot, e) &&
                    (best < 0 || key[e] * s->count[best] > key[best] * s->count[e]))
                    best = e;
            if (best < 0)
                break;
            state_put(s, slot, best);
        }
}

bool start_place(struct balance_state *s, const double *key) {
    int *want = state_alloc(s, s->experts, sizeof *want);
    struct item *items = state_alloc(s, (size_t)s->slots + s->experts, sizeof *items);
    double *time = state_alloc(s, s->ranks, sizeof *time);
    int limit = s->away_limit, n = 0;
    s->away_limit = 0;
    choose_counts(s, key, want, state_alloc(s, s->experts, sizeof(int)));
    for (int i = 0; i < s->slots; i++)
        if (s->expert_of_slot[i] >= 0)
            time[s->rank_of_slot[i]] += key[s->expert_of_slot[i]] / want[s->expert_of_slot[i]] *
                                        s->cost[s->rank_of_slot[i]];
    for (int e = 0; e < s->experts; e++)
        for (int c = s->count[e]; c < want[e]; c++)
            items[n++] = (struct item){key[e] / want[e], e};
    qsort(items, n, sizeof *items, by_size);
    for (int i = 0; i < n; i++) {
        int slot = best_slot(s, time, items[i].expert, items[i].size);
        if (slot < 0)
            continue;
        state_put(s, slot, items[i].expert);
        time[s->rank_of_slot[slot]] += items[i].size * s->cost[s->rank_of_slot[slot]];
    }
    bool done = start_singles(s) < 0;
    if (done)
        fill(s, key);
    s->away_limit = limit;
    return done;
}
