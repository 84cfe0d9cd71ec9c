/* Plans and judges one layer's placement: what the problem allows, a start, a search. */
#include "balance_state.h"
#include "split.h"

#include <stdio.h>
#include <string.h>

/* ---- what is wrong with a problem ---- */

static _Thread_local char why[160];
#define WRONG(...) (snprintf(why, sizeof why, __VA_ARGS__), why)

static const char *check_sizes(const struct balance_problem *p) {
    if (p->experts < 1 || p->experts > BALANCE_MAX_EXPERTS)
        return WRONG("%d experts are not in 1..%d", p->experts, BALANCE_MAX_EXPERTS);
    if (p->ranks < 1 || p->ranks > BALANCE_MAX_RANKS)
        return WRONG("%d ranks are not in 1..%d", p->ranks, BALANCE_MAX_RANKS);
    if (p->slots_per_rank < 1 || p->slots_per_rank > BALANCE_MAX_EXPERTS)
        return WRONG("%d slots per rank are not in 1..%d", p->slots_per_rank,
                     BALANCE_MAX_EXPERTS);
    if (p->workloads < 0 || p->workloads > BALANCE_MAX_WORKLOADS)
        return WRONG("%d workloads are not in 0..%d", p->workloads, BALANCE_MAX_WORKLOADS);
    if (p->ranks_per_node < 0 || p->max_per_node < 0 || p->max_replicas < 0 ||
        p->cross_node_slots < 0 || p->groups < 0 || p->effort < 0)
        return "a limit is negative";
    return NULL;
}

static const char *check_numbers(const struct balance_problem *p) {
    double weights = 0, largest = 1e300;
    for (int w = 0; p->load && w < p->workloads; w++) {
        for (int e = 0; e < p->experts; e++) {
            double load = p->load[(size_t)w * p->experts + e];
            if (!(load >= 0 && load <= largest / p->experts))
                return WRONG("workload %d: the load of expert %d is no number from 0", w, e);
        }
        double weight = p->weight ? p->weight[w] : 1;
        if (!(weight >= 0 && weight <= largest))
            return WRONG("the weight of workload %d is no number from 0", w);
        weights += weight;
    }
    if (p->load && p->workloads && !(weights > 0 && weights <= largest))
        return "the weights of all workloads are 0";
    for (int r = 0; r < p->ranks; r++) {
        if (p->capacity && (p->capacity[r] < 0 || p->capacity[r] > p->slots_per_rank))
            return WRONG("rank %d: %d usable slots are not in 0..%d", r, p->capacity[r],
                         p->slots_per_rank);
        if (p->speed && !(p->speed[r] > 1e-6 && p->speed[r] < 1e6))
            return WRONG("the speed of rank %d is not in 1e-6..1e6", r);
    }
    return NULL;
}

static int usable(const struct balance_problem *p, int from, int to) {
    int n = 0;
    for (int r = from; r < to; r++)
        n += p->capacity ? p->capacity[r] : p->slots_per_rank;
    return n;
}

static const char *check_groups(const struct balance_problem *p) {
    int size = p->ranks_per_node;
    if (!p->groups)
        return NULL;
    if (!size || p->ranks % size)
        return WRONG("groups need nodes of equal size: %d ranks, %d per node", p->ranks, size);
    int nodes = p->ranks / size;
    if (p->experts % p->groups || p->groups % nodes)
        return WRONG("%d experts in %d groups do not divide over %d nodes", p->experts,
                     p->groups, nodes);
    for (int n = 0; n < nodes; n++)
        if (usable(p, n * size, (n + 1) * size) < p->experts / nodes)
            return WRONG("node %d has %d usable slots for the %d experts of its groups", n,
                         usable(p, n * size, (n + 1) * size), p->experts / nodes);
    return NULL;
}

/* Pins, one by one; on_rank and the others tell of those before. */
static const char *check_pin(const struct balance_state *s, int slot, int e) {
    const struct balance_problem *p = s->p;
    int r = s->rank_of_slot[slot], j = slot % s->slots_per_rank;
    if (e < -1 || e >= p->experts)
        return WRONG("rank %d, slot %d: pinned expert %d is not in 0..%d", r, j, e,
                     p->experts - 1);
    if (e < 0)
        return NULL;
    if (s->fixed[slot])
        return WRONG("rank %d, slot %d: pinned, but the rank has %d usable slots", r, j,
                     p->capacity[r]);
    if (s->banned[(size_t)e * s->ranks + r])
        return WRONG("expert %d is pinned to rank %d and forbidden there", e, r);
    if (s->on_rank[(size_t)e * s->ranks + r])
        return WRONG("expert %d is pinned twice to rank %d", e, r);
    if (s->count[e] >= s->most[e] ||
        s->on_node[(size_t)e * s->nodes + s->node_of_rank[r]] >= s->node_limit)
        return WRONG("expert %d is pinned more often than it may be replicated", e);
    return NULL;
}

/* Puts the pins; what is wrong with one, or NULL. */
static const char *put_pins(struct balance_state *s) {
    for (int i = 0; s->p->pin && i < s->slots; i++) {
        const char *wrong = check_pin(s, i, s->p->pin[i]);
        if (wrong)
            return wrong;
        if (s->p->pin[i] >= 0)
            state_put(s, i, s->p->pin[i]);
    }
    for (int i = 0; s->p->pin && i < s->slots; i++)
        s->fixed[i] |= s->p->pin[i] >= 0;
    return NULL;
}

/* Whether every expert finds a place within pins, forbidden ranks and homes. */
static const char *check_places(const struct balance_problem *p) {
    struct balance_state s;
    state_init(&s, p);
    const char *wrong = put_pins(&s);
    bool exact;
    if (!wrong && p->groups) {
        start_homes(&s, &exact);
        if (s.away > s.away_limit)
            wrong = WRONG("pins hold %d slots off their group's node, %d may be", s.away,
                          s.away_limit);
    }
    int e = wrong ? -1 : start_singles(&s);
    if (e >= 0)
        wrong = WRONG("no rank is left for expert %d: pins, forbidden ranks and nodes", e);
    state_free(&s);
    return wrong;
}

static const char *check_current(const struct balance_problem *p) {
    if (p->current && p->moves < -1)
        return WRONG("%d moved slots are not possible", p->moves);
    if (!(p->worth >= 0 && p->worth <= 1e6))
        return "what a moved slot must gain is no number from 0";
    for (int i = 0; p->current && i < p->ranks * p->slots_per_rank; i++)
        if (p->current[i] < -1 || p->current[i] >= p->experts)
            return WRONG("slot %d: the current expert %d is not in 0..%d", i, p->current[i],
                         p->experts - 1);
    return NULL;
}

const char *balance_check(const struct balance_problem *p) {
    const char *wrong = check_sizes(p);
    wrong = wrong ? wrong : check_numbers(p);
    wrong = wrong ? wrong : check_current(p);
    if (!wrong && usable(p, 0, p->ranks) < p->experts)
        wrong = WRONG("%d experts need at least %d slots, there are %d", p->experts, p->experts,
                      usable(p, 0, p->ranks));
    wrong = wrong ? wrong : check_groups(p);
    if (!wrong && (p->pin || p->forbidden))
        wrong = check_places(p);
    return wrong;
}

/* ---- planning ---- */

enum { SWEEPS = 200 };

double balanced_time(struct balance_state *s, const int *expert_of_slot, int w, int sweeps,
                     double *time) {
    if (!s->scratch)
        s->scratch = state_alloc(s, (size_t)s->experts + s->slots + s->ranks, sizeof(double));
    double *load = s->scratch, *tokens = load + s->experts;
    double *own = time ? time : tokens + s->slots;
    for (int e = 0; e < s->experts; e++)
        load[e] = s->load[(size_t)e * s->workloads + w];
    double most = split_fractions(s->experts, s->ranks, s->slots_per_rank, expert_of_slot,
                                  s->p->speed, load, sweeps, tokens, own);
    for (int r = 0; r < s->ranks; r++)
        own[r] *= s->cost[r];
    return most;
}

/* What to place by: the mean over workloads and two thirds of a standard deviation, so that an
 * expert whose load changes is replicated sooner. */
static void placing_key(const struct balance_state *s, double *key) {
    for (int e = 0; e < s->experts; e++) {
        const double *load = s->load + (size_t)e * s->workloads;
        double mean = 0, variance = 0;
        for (int w = 0; w < s->workloads; w++)
            mean += s->weight[w] * load[w];
        for (int w = 0; w < s->workloads; w++)
            variance += s->weight[w] * (load[w] - mean) * (load[w] - mean);
        key[e] = mean + 0.67 * __builtin_sqrt(variance);
    }
}

/* The current placement as far as the limits allow it. */
static void put_current(struct balance_state *s) {
    for (int i = 0; i < s->slots; i++) {
        int e = s->p->current[i];
        if (e >= 0 && s->expert_of_slot[i] < 0 && state_may_put(s, i, e))
            state_put(s, i, e);
    }
}

/* Empties slots off their expert's home until so many are left: first those whose expert has
 * another. Pins stay. */
static void bring_home(struct balance_state *s, int limit) {
    for (int last = 0; last < 2; last++)
        for (int i = 0; i < s->slots && s->away > limit; i++) {
            int e = s->expert_of_slot[i];
            if (e >= 0 && !s->fixed[i] && s->home[e] != s->node_of_rank[s->rank_of_slot[i]] &&
                (last || s->count[e] > 1))
                state_put(s, i, -1);
        }
}

/* A current placement that the limits may have taken experts from. Where nodes are too full for
 * those and what lives there from elsewhere, all go home. */
static bool start_current(struct balance_state *s) {
    if (s->home)
        bring_home(s, s->away_limit);
    if (start_singles(s) < 0)
        return true;
    if (!s->home)
        return false;
    int limit = s->away_limit;
    bring_home(s, s->away_limit = 0);
    bool done = start_singles(s) < 0;
    s->away_limit = limit;
    return done;
}

static bool begin(struct balance_state *s) {
    bool exact;
    double *key = state_alloc(s, s->experts, sizeof *key);
    put_pins(s);
    if (s->p->current)
        put_current(s);
    if (s->p->groups) {
        double packed = start_homes(s, &exact);
        s->bound = exact && !s->away_limit ? packed : 0;
    }
    placing_key(s, key);
    return s->p->current ? start_current(s) : start_place(s, key);
}

/* How much the mean square of rank times weighs beside their maximum. Several workloads stand for
 * those to come: ranks that are near the mean in all of them are near it in the next. For one it
 * leads past the places where no single move lowers the maximum. */
enum { SPREAD = 100 };

static const double CLOSE = 2e-4; /* to the bound: done */
/* Trials. */
enum { DESCEND = 400000, CLIMB = 32768, CLIMB_PER_SLOT = 72, MOVES_PER_SLOT = 80 };

static void spread(struct balance_state *s, double weight) {
    s->spread = weight;
    even_value(s);
}

static void search_one(struct balance_state *s, double goal) {
    static const double weights[] = {SPREAD, SPREAD / 10.0, SPREAD / 100.0, 0};
    long effort = s->p->effort ? s->p->effort : DESCEND;
    if (s->p->current || s->away_limit) {
        spread(s, SPREAD); /* far to go, and not by exchanges alone */
        search_climb(s, goal, effort / 10);
    }
    for (int i = 0; i < 4; i++) {
        spread(s, weights[i]);
        search_descend(s, goal, effort / 4);
    }
}

static void search_several(struct balance_state *s, double goal) {
    spread(s, SPREAD);
    search_climb(s, goal,
                 s->p->effort ? s->p->effort : CLIMB + (long)CLIMB_PER_SLOT * s->slots);
    spread(s, 0);
}

static void search_few_moves(struct balance_state *s, double goal) {
    spread(s, SPREAD);
    search_moves(s, goal, s->p->effort ? s->p->effort : (long)MOVES_PER_SLOT * s->slots);
    spread(s, 0);
}

static int *keep_slots(struct balance_state *s) {
    int *kept = state_alloc(s, s->slots, sizeof *kept);
    return memcpy(kept, s->expert_of_slot, sizeof *kept * s->slots);
}

static void search_even(struct balance_state *s, double bound) {
    double before = s->value, goal = bound * (1 + CLOSE);
    int *start = keep_slots(s);
    if (s->move_limit < s->slots)
        search_few_moves(s, goal);
    else
        (s->workloads == 1 ? search_one : search_several)(s, goal);
    if (s->value > before)
        even_reset(s, start);
}

/* One workload that pouring does not bring to the bound (few replicas, many ranks) may fit without
 * splits as well as with them. */
static void search_balanced(struct balance_state *s, double bound) {
    pour_search(s, s->p->effort);
    if (s->workloads > 1 || s->p->current)
        return;
    double poured = balanced_time(s, s->expert_of_slot, 0, SWEEPS, NULL);
    if (poured <= bound * (1 + 3 * CLOSE))
        return;
    int *slots = keep_slots(s);
    even_value(s);
    search_even(s, bound);
    if (balanced_time(s, s->expert_of_slot, 0, SWEEPS, NULL) > poured)
        even_reset(s, slots);
}

static void exchange(int *a, int *b) {
    int t = *a;
    *a = *b;
    *b = t;
}

/* Inside a rank the order is free. Experts that were there take their old slot; without a current
 * placement they ascend. Empty slots come last where that moves nothing. */
static void tidy_rank(const struct balance_state *s, int *slot, const int *current,
                      const uint8_t *fixed) {
    int S = s->slots_per_rank;
    for (int i = 0; current && i < S; i++)
        for (int j = 0; j < S; j++)
            if (slot[j] >= 0 && slot[j] == current[i] && slot[i] != current[i] && !fixed[i] &&
                !fixed[j])
                exchange(slot + i, slot + j);
    for (int i = 0; i < S; i++)
        for (int j = i + 1; j < S; j++) {
            if (fixed[i] || fixed[j] || slot[j] < 0)
                continue;
            bool moves = !current || (slot[i] < 0 && slot[j] != current[j]);
            if (moves && (slot[i] < 0 || (!current && slot[j] < slot[i])))
                exchange(slot + i, slot + j);
        }
}

static void tidy(const struct balance_state *s, int *expert_of_slot) {
    memcpy(expert_of_slot, s->expert_of_slot, sizeof *expert_of_slot * s->slots);
    for (int i = 0; i < s->slots; i += s->slots_per_rank)
        tidy_rank(s, expert_of_slot + i, s->p->current ? s->p->current + i : NULL,
                  s->fixed + i);
}

bool balance_plan(const struct balance_problem *p, int *expert_of_slot, double *share_of_slot,
                  struct balance_result *r) {
    struct balance_state s;
    if (balance_check(p))
        return false;
    state_init(&s, p);
    bool done = begin(&s);
    if (done) {
        even_value(&s);
        double bound = state_bound(&s);
        bound = s.bound > bound ? s.bound : bound;
        bool split = p->split == BALANCE_BALANCED || (p->split && s.workloads == 1);
        int *base = keep_slots(&s);
        if (s.move_limit)
            (split ? search_balanced : search_even)(&s, bound);
        if (p->current && p->worth > 0)
            worth_search(&s, base, split && s.move_limit < s.slots);
        tidy(&s, expert_of_slot);
    }
    state_free(&s);
    if (done && share_of_slot)
        balance_shares(p, expert_of_slot, share_of_slot);
    if (done)
        balance_judge(p, expert_of_slot, share_of_slot, r, NULL);
    return done;
}

/* ---- judging ---- */

double balance_bound(const struct balance_problem *p) {
    struct balance_state s;
    state_init(&s, p);
    bool exact;
    double bound = state_bound(&s);
    if (p->groups && !p->cross_node_slots && !p->current) {
        double nodes = start_homes(&s, &exact);
        bound = exact && nodes > bound ? nodes : bound;
    }
    state_free(&s);
    return bound;
}

/* Parts of each slot when an expert's tokens are split evenly. */
static void even_shares(const struct balance_problem *p, const int *expert_of_slot,
                        double *share) {
    int slots = p->ranks * p->slots_per_rank;
    int *count = balance_alloc((size_t)p->experts, sizeof *count);
    for (int i = 0; i < slots; i++)
        if (expert_of_slot[i] >= 0)
            count[expert_of_slot[i]]++;
    for (int i = 0; i < slots; i++)
        share[i] = expert_of_slot[i] >= 0 ? 1.0 / count[expert_of_slot[i]] : 0;
    balance_free(count);
}

/* Rank times of workload w by fixed shares, into time[R]; the largest. */
static double judge_shares(const struct balance_state *s, const int *expert_of_slot,
                           const double *share, int w, double *time) {
    double most = 0;
    memset(time, 0, sizeof *time * s->ranks);
    for (int i = 0; i < s->slots; i++)
        if (expert_of_slot[i] >= 0)
            time[s->rank_of_slot[i]] +=
                share[i] * s->load[(size_t)expert_of_slot[i] * s->workloads + w];
    for (int r = 0; r < s->ranks; r++) {
        time[r] *= s->cost[r];
        most = time[r] > most ? time[r] : most;
    }
    return most;
}

/* The best split of the mean load, in parts; kept when it serves the workloads better than equal
 * parts, which are in share[]. */
static void mean_shares(struct balance_state *s, const int *expert_of_slot, double *share) {
    double *mean = state_alloc(s, s->experts, sizeof *mean);
    double *part = state_alloc(s, s->slots, sizeof *part);
    double *time = state_alloc(s, s->ranks, sizeof *time), even = 0, split = 0;
    for (int e = 0; e < s->experts; e++)
        for (int w = 0; w < s->workloads; w++)
            mean[e] += s->weight[w] * s->load[(size_t)e * s->workloads + w];
    split_fractions(s->experts, s->ranks, s->slots_per_rank, expert_of_slot, s->p->speed, mean,
                    SWEEPS, part, time);
    for (int i = 0; i < s->slots; i++) {
        int e = expert_of_slot[i];
        part[i] = e >= 0 && mean[e] > 0 ? part[i] / mean[e] : share[i];
    }
    for (int w = 0; w < s->workloads; w++) {
        even += s->weight[w] * judge_shares(s, expert_of_slot, share, w, time);
        split += s->weight[w] * judge_shares(s, expert_of_slot, part, w, time);
    }
    if (split < even)
        memcpy(share, part, sizeof *share * s->slots);
}

void balance_shares(const struct balance_problem *p, const int *expert_of_slot, double *share) {
    struct balance_state s;
    even_shares(p, expert_of_slot, share);
    if (p->split == BALANCE_EVEN)
        return;
    state_init(&s, p);
    mean_shares(&s, expert_of_slot, share);
    state_free(&s);
}

void balance_whole_shares(int experts, int slots, const int *expert_of_slot,
                          const double *share, int one, int *out) {
    int *left = balance_alloc((size_t)experts, sizeof *left);
    for (int i = 0; i < experts; i++)
        left[i] = one;
    for (int i = 0; i < slots; i++) {
        int e = expert_of_slot[i], part = e >= 0 ? (int)(share[i] * one) : 0;
        out[i] = e >= 0 && part > left[e] ? left[e] : part;
        if (e >= 0)
            left[e] -= out[i];
    }
    for (bool again = true; again;) {
        again = false;
        for (int i = 0; i < slots; i++)
            if (expert_of_slot[i] >= 0 && left[expert_of_slot[i]] > 0) {
                out[i]++;
                again = --left[expert_of_slot[i]] > 0 || again;
            }
    }
    balance_free(left);
}

void balance_judge(const struct balance_problem *p, const int *expert_of_slot,
                   const double *share_of_slot, struct balance_result *r, double *loads) {
    struct balance_state s;
    state_init(&s, p);
    double *even = state_alloc(&s, s.slots, sizeof *even);
    double *time = state_alloc(&s, s.ranks, sizeof *time);
    even_shares(p, expert_of_slot, even);
    *r = (struct balance_result){.bound = balance_bound(p)};
    for (int w = 0; w < s.workloads; w++) {
        double most = judge_shares(&s, expert_of_slot, even, w, time);
        r->imbalance_even += s.weight[w] * most;
        if (p->split == BALANCE_BALANCED)
            most = balanced_time(&s, expert_of_slot, w, SWEEPS, time);
        else if (p->split == BALANCE_SHARE && share_of_slot)
            most = judge_shares(&s, expert_of_slot, share_of_slot, w, time);
        r->imbalance += s.weight[w] * most;
        r->worst = s.weight[w] > 0 && most > r->worst ? most : r->worst;
        if (loads)
            memcpy(loads + (size_t)w * s.ranks, time, sizeof *time * s.ranks);
    }
    for (int i = 0; p->current && i < s.slots; i++)
        r->moved += expert_of_slot[i] >= 0 && expert_of_slot[i] != p->current[i];
    state_free(&s);
}
