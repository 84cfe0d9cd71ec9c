/* Splits one batch over the replicas of a fixed placement.
 *
 * Two replicas of an expert on ranks a and b can exchange tokens until both ranks take equally
 * long or one replica is empty. Going round all such pairs descends the sum over ranks of
 * load^2/speed, whose minimum is also the least possible maximum: the load vectors that a
 * placement can reach are the bases of a submodular function, and its least-majorised vector
 * minimises every symmetric convex cost. Steps go a little beyond the balance point
 * (over-relaxation), which keeps the descent and crosses long chains of ranks in few sweeps. */
#include <string.h>

#include "balance.h"
#include "split.h"

enum { SWEEPS = 30, WHOLE_SWEEPS = 8 };
static const double RELAX = 1.5;    /* in (0, 2): 1 stops at the balance point */
static const double SETTLED = 1e-5; /* of the mean load: no exchange was larger */

struct pair { /* two slots of one expert on different ranks */
    int a, b, rank_a, rank_b;
    double give, take; /* the balance point: move give * load(a) - take * load(b) */
};

struct batch {
    int experts, ranks, slots;
    const double *speed;
    int *first; /* [E+1] an expert's slots are slot[first[e]], ... in ascending order */
    int *slot;
    int *rank; /* [slots] */
    struct pair *pair;
    int pairs;
    double *tokens; /* [slots] */
    double *load;   /* [R] */
    double mean;    /* load/speed when every rank takes equally long */
};

static double speed_of(const struct batch *b, int rank) {
    return b->speed ? b->speed[rank] : 1;
}

/* Strides between replicas that form pairs: every one up to 8 replicas, then powers of two, so
 * that an expert on all ranks does not cost their square. */
static int next_stride(int stride, int replicas) {
    return replicas <= 8 ? stride + 1 : stride * 2;
}

static int count_pairs(const struct batch *b) {
    int n = 0;
    for (int e = 0; e < b->experts; e++) {
        int replicas = b->first[e + 1] - b->first[e];
        for (int d = 1; d < replicas; d = next_stride(d, replicas))
            n += replicas - d;
    }
    return n;
}

static void add_pair(struct batch *b, int s, int t) {
    int p = b->rank[s], q = b->rank[t];
    double sum = speed_of(b, p) + speed_of(b, q);
    if (p != q)
        b->pair[b->pairs++] =
            (struct pair){s, t, p, q, speed_of(b, q) / sum, speed_of(b, p) / sum};
}

static void make_pairs(struct batch *b) {
    b->pair = balance_alloc((size_t)count_pairs(b), sizeof(*b->pair));
    for (int e = 0; e < b->experts; e++) {
        int replicas = b->first[e + 1] - b->first[e];
        const int *slot = b->slot + b->first[e];
        for (int d = 1; d < replicas; d = next_stride(d, replicas))
            for (int i = 0; i + d < replicas; i++)
                add_pair(b, slot[i], slot[i + d]);
    }
}

/* Which slots hold which expert: a counting sort. */
static void make_hosts(struct batch *b, int slots_per_rank, const int *expert_of_slot) {
    b->first = balance_alloc((size_t)b->experts + 2, sizeof(int));
    b->slot = balance_alloc((size_t)b->slots, sizeof(int));
    b->rank = balance_alloc((size_t)b->slots, sizeof(int));
    for (int s = 0; s < b->slots; s++)
        if (expert_of_slot[s] >= 0)
            b->first[expert_of_slot[s] + 2]++;
    for (int e = 2; e <= b->experts; e++)
        b->first[e] += b->first[e - 1];
    for (int s = 0; s < b->slots; s++) {
        b->rank[s] = s / slots_per_rank;
        if (expert_of_slot[s] >= 0)
            b->slot[b->first[expert_of_slot[s] + 1]++] = s;
    }
}

static void open_batch(struct batch *b, int slots_per_rank, const int *expert_of_slot) {
    make_hosts(b, slots_per_rank, expert_of_slot);
    make_pairs(b);
}

static void close_batch(struct batch *b) {
    balance_free(b->first);
    balance_free(b->slot);
    balance_free(b->rank);
    balance_free(b->pair);
}

/* Where the exchanges begin: an expert's tokens in proportion to its ranks' speeds. */
static void start(struct batch *b, int e, double count) {
    const int *slot = b->slot + b->first[e];
    int n = b->first[e + 1] - b->first[e];
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += speed_of(b, b->rank[slot[i]]);
    for (int i = 0; i < n; i++) {
        int r = b->rank[slot[i]];
        b->tokens[slot[i]] = count * speed_of(b, r) / sum;
        b->load[r] += b->tokens[slot[i]];
    }
}

/* One round of exchanges; the largest of them, in tokens. */
static double sweep(struct batch *b) {
    double largest = 0;
    for (const struct pair *p = b->pair; p < b->pair + b->pairs; p++) {
        double t = RELAX * (p->give * b->load[p->rank_a] - p->take * b->load[p->rank_b]);
        double most = b->tokens[p->a], least = -b->tokens[p->b];
        t = t > most ? most : t < least ? least : t;
        b->tokens[p->a] -= t;
        b->tokens[p->b] += t;
        b->load[p->rank_a] -= t;
        b->load[p->rank_b] += t;
        t = t < 0 ? -t : t;
        largest = t > largest ? t : largest;
    }
    return largest;
}

static double slowest(const struct batch *b) {
    double most = 0;
    for (int r = 0; r < b->ranks; r++) {
        double time = b->load[r] / speed_of(b, r);
        most = time > most ? time : most;
    }
    return most;
}

/* load/speed if every rank took equally long: no split is faster. */
static double ideal(const struct batch *b) {
    double load = 0, speed = 0;
    for (int r = 0; r < b->ranks; r++) {
        load += b->load[r];
        speed += speed_of(b, r);
    }
    return load / speed;
}

/* Sweeps until nothing moves any more or every rank takes equally long. */
static void settle(struct batch *b, int sweeps) {
    double mean = ideal(b);
    for (int i = 0; i < sweeps; i++)
        if (sweep(b) <= SETTLED * mean || slowest(b) <= mean * (1 + SETTLED))
            return;
}

double split_fractions(int experts, int ranks, int slots_per_rank, const int *expert_of_slot,
                       const double *speed, const double *load, int sweeps, double *tokens,
                       double *rank_load) {
    struct batch b = {experts, ranks, ranks * slots_per_rank, speed};
    b.tokens = tokens;
    b.load = rank_load;
    memset(tokens, 0, sizeof(*tokens) * (size_t)b.slots);
    memset(rank_load, 0, sizeof(*rank_load) * (size_t)ranks);
    open_batch(&b, slots_per_rank, expert_of_slot);
    for (int e = 0; e < experts; e++)
        start(&b, e, load[e]);
    settle(&b, sweeps);
    close_batch(&b);
    return slowest(&b);
}

/* ---- whole tokens ---- */

/* The next of an expert's slots to round up: the one whose rank rounding owes most. */
static int most_owed(const struct batch *b, const int *slot, int n, const double *owed) {
    int best = slot[0];
    for (int i = 1; i < n; i++)
        if (b->tokens[slot[i]] + owed[b->rank[slot[i]]] > b->tokens[best] + owed[b->rank[best]])
            best = slot[i];
    return best;
}

/* Largest remainder. What rounding took from a rank is owed to it by the experts that follow, so
 * that a rank is wrong by about one token however many experts it holds. */
static void round_expert(struct batch *b, int e, int64_t count, double *owed, int64_t *whole) {
    const int *slot = b->slot + b->first[e];
    int n = b->first[e + 1] - b->first[e];
    int64_t left = count;
    for (int i = 0; i < n; i++) {
        whole[slot[i]] = (int64_t)b->tokens[slot[i]];
        b->tokens[slot[i]] -= (double)whole[slot[i]];
        left -= whole[slot[i]];
    }
    for (; n && left > 0; left--) {
        int s = most_owed(b, slot, n, owed);
        whole[s]++;
        b->tokens[s] -= 1;
    }
    for (int i = 0; i < n; i++)
        owed[b->rank[slot[i]]] += b->tokens[slot[i]];
}

static void round_all(struct batch *b, const int64_t *count, int64_t *whole) {
    double *owed = balance_alloc((size_t)b->ranks, sizeof(double));
    for (int e = 0; e < b->experts; e++)
        round_expert(b, e, count[e], owed, whole);
    balance_free(owed);
    memset(b->load, 0, sizeof(*b->load) * (size_t)b->ranks);
    for (int s = 0; s < b->slots; s++)
        b->load[b->rank[s]] += (double)whole[s];
}

/* The exchanges once more, in whole tokens and never beyond the balance point. True when one
 * moved. Loads are exact: whole numbers below 2^53. */
static bool sweep_whole(struct batch *b, int64_t *whole) {
    bool moved = false;
    for (const struct pair *p = b->pair; p < b->pair + b->pairs; p++) {
        int64_t t = (int64_t)(p->give * b->load[p->rank_a] - p->take * b->load[p->rank_b]);
        t = t > whole[p->a] ? whole[p->a] : t < -whole[p->b] ? -whole[p->b] : t;
        whole[p->a] -= t;
        whole[p->b] += t;
        b->load[p->rank_a] -= (double)t;
        b->load[p->rank_b] += (double)t;
        moved |= t != 0;
    }
    return moved;
}

double balance_split_batch(int experts, int ranks, int slots_per_rank,
                           const int *expert_of_slot, const double *speed, const int64_t *count,
                           int64_t *tokens_of_slot) {
    struct batch b = {experts, ranks, ranks * slots_per_rank, speed};
    b.tokens = balance_alloc((size_t)b.slots, sizeof(double));
    b.load = balance_alloc((size_t)ranks, sizeof(double));
    memset(tokens_of_slot, 0, sizeof(*tokens_of_slot) * (size_t)b.slots);
    open_batch(&b, slots_per_rank, expert_of_slot);
    for (int e = 0; e < experts; e++)
        start(&b, e, (double)count[e]);
    settle(&b, SWEEPS);
    round_all(&b, count, tokens_of_slot);
    for (int i = 0; i < WHOLE_SWEEPS && sweep_whole(&b, tokens_of_slot); i++)
        continue;
    double time = slowest(&b);
    close_batch(&b);
    balance_free(b.tokens);
    balance_free(b.load);
    return time;
}
