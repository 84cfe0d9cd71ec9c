/* Whether a placement keeps a problem's limits, whoever made it. */
#include "balance.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char why[160];
#define BROKEN(...) (snprintf(why, sizeof why, __VA_ARGS__), why)

static int node_count(const struct balance_problem *p) {
    return p->ranks_per_node ? (p->ranks + p->ranks_per_node - 1) / p->ranks_per_node : 1;
}

static int node_of(const struct balance_problem *p, int slot) {
    return p->ranks_per_node ? slot / p->slots_per_rank / p->ranks_per_node : 0;
}

static const char *broken_capacity(const struct balance_problem *p, const int *slot) {
    for (int i = 0; p->capacity && i < p->ranks * p->slots_per_rank; i++) {
        int r = i / p->slots_per_rank;
        if (slot[i] >= 0 && i % p->slots_per_rank >= p->capacity[r])
            return BROKEN(
                "slot %d of rank %d holds expert %d, but only its first %d may be used",
                i % p->slots_per_rank, r, slot[i], p->capacity[r]);
    }
    return NULL;
}

static const char *broken_counts(const struct balance_problem *p, const int *slot) {
    int nodes = node_count(p);
    int *count = balance_alloc((size_t)p->experts, sizeof *count);
    int *there = balance_alloc((size_t)p->experts * (size_t)nodes, sizeof *there);
    const char *broken = NULL;
    for (int i = 0; i < p->ranks * p->slots_per_rank && !broken; i++) {
        int e = slot[i], n = node_of(p, i);
        if (e < 0)
            continue;
        if (++count[e] > p->max_replicas && p->max_replicas)
            broken = BROKEN("expert %d has more than %d replicas", e, p->max_replicas);
        else if (++there[e * nodes + n] > p->max_per_node && p->max_per_node)
            broken =
                BROKEN("expert %d has more than %d replicas on node %d", e, p->max_per_node, n);
    }
    balance_free(count);
    balance_free(there);
    return broken;
}

/* The assignment of n rows to n columns, one each, with the largest sum: the Hungarian method with
 * potentials. Column j counts gain[row][j / per_node]. */
static int best_assignment(const int *gain, int n, int per_node) {
    int nodes = n / per_node, sum = 0;
    int *memory = balance_alloc((size_t)(n + 1) * 5, sizeof *memory);
    int *row_price = memory, *price = row_price + n + 1, *row_of = price + n + 1;
    int *from = row_of + n + 1, *slack = from + n + 1;
    char *seen = balance_alloc((size_t)n + 1, 1);
    for (int i = 1; i <= n; i++) { /* rows and columns from 1; column 0 holds the new row */
        int at = 0;
        row_of[0] = i;
        memset(seen, 0, (size_t)n + 1);
        for (int j = 0; j <= n; j++)
            slack[j] = INT32_MAX;
        while (row_of[at]) {
            int row = row_of[at], least = INT32_MAX, next = 0;
            seen[at] = 1;
            for (int j = 1; j <= n; j++) {
                int cost = -gain[(row - 1) * nodes + (j - 1) / per_node];
                if (seen[j])
                    continue;
                if (cost - row_price[row] - price[j] < slack[j]) {
                    slack[j] = cost - row_price[row] - price[j];
                    from[j] = at;
                }
                if (slack[j] < least) {
                    least = slack[j];
                    next = j;
                }
            }
            for (int j = 0; j <= n; j++)
                if (seen[j]) {
                    row_price[row_of[j]] += least;
                    price[j] -= least;
                } else {
                    slack[j] -= least;
                }
            at = next;
        }
        for (; at; at = from[at])
            row_of[at] = row_of[from[at]];
    }
    for (int j = 1; j <= n; j++)
        sum += gain[(row_of[j] - 1) * nodes + (j - 1) / per_node];
    balance_free(memory);
    balance_free(seen);
    return sum;
}

/* Every node is home to equally many groups; of all such homes, those that leave the fewest slots
 * away from them count. */
static const char *broken_groups(const struct balance_problem *p, const int *slot) {
    int nodes = node_count(p), used = 0;
    if (!p->groups)
        return NULL;
    int *held = balance_alloc((size_t)p->groups * (size_t)nodes, sizeof *held);
    for (int i = 0; i < p->ranks * p->slots_per_rank; i++)
        if (slot[i] >= 0) {
            held[slot[i] / (p->experts / p->groups) * nodes + node_of(p, i)]++;
            used++;
        }
    int away = used - best_assignment(held, p->groups, p->groups / nodes);
    balance_free(held);
    if (away <= p->cross_node_slots)
        return NULL;
    return BROKEN("%d slot%s an expert off the node of its group, %d may", away,
                  away == 1 ? " holds" : "s hold", p->cross_node_slots);
}

const char *balance_broken(const struct balance_problem *p, const int *expert_of_slot) {
    const char *broken = broken_capacity(p, expert_of_slot);
    broken = broken ? broken : broken_counts(p, expert_of_slot);
    return broken ? broken : broken_groups(p, expert_of_slot);
}
