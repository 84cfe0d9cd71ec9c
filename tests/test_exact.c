/* What others compute: against plain implementations that search instead of keeping heaps, and
 * against published results. */
#include "../compiler/balance.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

TestSuite(exact, .timeout = 300);

enum { MAX_E = 96, MAX_SLOTS = 256 };

/* ---- plain: the largest, the first, by looking at all of them ---- */

/* TensorRT-LLM gives a slot to the heaviest replica, of equals to the largest id. */
static void plain_trtllm_replicate(int experts, int slots, const float *load, int *count) {
    bool zero = true;
    for (int e = 0; e < experts; e++) {
        count[e] = 1;
        zero = zero && load[e] == 0;
    }
    for (int used = experts; used < slots; used++) {
        int best = zero ? (used - experts) % experts : 0;
        for (int e = 0; !zero && e < experts; e++)
            if ((double)load[e] / count[e] >= (double)load[best] / count[best])
                best = e;
        count[best]++;
    }
}

static void plain_trtllm_place(int experts, int ranks, int spr, const float *load,
                               const int *count, int *expert_of_slot) {
    int left[MAX_E], used[MAX_SLOTS] = {0};
    double rank_load[MAX_SLOTS] = {0};
    memcpy(left, count, sizeof *count * (size_t)experts);
    for (int i = 0; i < ranks * spr; i++) {
        int e = -1, r = -1;
        for (int x = 0; x < experts; x++)
            if (left[x] && (e < 0 || (double)load[x] / count[x] > (double)load[e] / count[e]))
                e = x;
        for (int x = 0; x < ranks; x++)
            if (used[x] < spr && (r < 0 || rank_load[x] < rank_load[r]))
                r = x;
        left[e]--;
        expert_of_slot[r * spr + used[r]++] = e;
        rank_load[r] += (double)load[e] / count[e];
    }
}

/* DeepSeek's packing: items by descending weight, equals in order, each to the lightest pack that
 * has room, equals to the first. With one item a pack there is nothing to choose. */
static void plain_pack(const float *w, int n, int packs, int *pack_of, int *pos_in_pack) {
    float total[MAX_SLOTS] = {0};
    int used[MAX_SLOTS] = {0};
    bool done[MAX_SLOTS] = {false};
    for (int i = 0; i < n; i++) {
        int best = -1, p = -1;
        for (int x = 0; x < n; x++)
            if (!done[x] && (best < 0 || (n != packs && w[x] > w[best])))
                best = x;
        for (int x = 0; x < packs; x++)
            if (used[x] < n / packs && (p < 0 || (n != packs && total[x] < total[p])))
                p = x;
        done[best] = true;
        pack_of[best] = p;
        pos_in_pack[best] = used[p]++;
        total[p] = total[p] + w[best];
    }
}

static void plain_deepseek(int experts, int slots, int groups, int nodes, int ranks,
                           const double *load, int *expert_of_slot) {
    float w[MAX_E], group[MAX_E] = {0}, replica[MAX_SLOTS];
    int pack_of[MAX_SLOTS], pos[MAX_SLOTS], expert[MAX_SLOTS], ids[MAX_E], count[MAX_E];
    if (groups % nodes)
        groups = nodes = 1;
    for (int e = 0; e < experts; e++) {
        w[e] = (float)load[e];
        group[e / (experts / groups)] += w[e];
    }
    int group_pack[MAX_SLOTS], group_pos[MAX_SLOTS];
    plain_pack(group, groups, nodes, group_pack, group_pos);
    for (int node = 0; node < nodes; node++) {
        int n = 0, ns = slots / nodes, nr = ranks / nodes;
        for (int p = 0; p < groups / nodes; p++) /* this node's experts in its own order */
            for (int g = 0; g < groups; g++)
                for (int i = 0; i < experts / groups; i++)
                    if (group_pack[g] == node && group_pos[g] == p)
                        ids[n++] = g * (experts / groups) + i;
        for (int i = 0; i < ns; i++) {
            int best = i;
            if (i >= n) {
                best = 0;
                for (int x = 0; x < n; x++)
                    if (w[ids[x]] / (float)count[x] > w[ids[best]] / (float)count[best])
                        best = x;
                count[best]++;
            } else {
                count[i] = 1;
            }
            expert[i] = best;
        }
        for (int i = 0; i < ns; i++)
            replica[i] = w[ids[expert[i]]] / (float)count[expert[i]];
        plain_pack(replica, ns, nr, pack_of, pos);
        for (int i = 0; i < ns; i++)
            expert_of_slot[node * ns + pack_of[i] * (ns / nr) + pos[i]] = ids[expert[i]];
    }
}

/* ---- random cases ---- */

static uint64_t state;

static int pick(int n) { /* 0 .. n - 1 */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int)((state >> 33) % (uint64_t)n);
}

/* Whole loads: most cases from few values, so that they tie, zeros among them; some all zero. */
static void random_load(double *load, int n) {
    int kind = pick(8), values = kind < 5 ? 1 + pick(6) : 60000;
    for (int e = 0; e < n; e++)
        load[e] = kind == 0 ? 0 : kind == 5 && pick(2) ? 0 : pick(values + 1);
}

static const int divisors[] = {1, 2, 3, 4, 6, 8, 12};

Test(exact, trtllm_agrees_with_a_plain_search_in_1000_cases) {
    int ties = 0;
    state = 1;
    for (int i = 0; i < 1000; i++) {
        int ranks = divisors[pick(7)], experts = 1 + pick(MAX_E);
        int spr = (experts + ranks - 1) / ranks + pick(4);
        int slots = ranks * spr, count[MAX_E], expected_count[MAX_E];
        int got[MAX_SLOTS], expected[MAX_SLOTS];
        double load[MAX_E];
        float f[MAX_E];
        bool tie = false;
        random_load(load, experts);
        for (int e = 0; e < experts; e++) {
            f[e] = (float)(i % 3 ? load[e] : load[e] * 0.9);
            for (int o = 0; o < e; o++)
                tie = tie || f[o] == f[e];
        }
        ties += tie;
        balance_trtllm_replicate(experts, slots, f, count);
        plain_trtllm_replicate(experts, slots, f, expected_count);
        cr_assert_arr_eq(count, expected_count, sizeof *count * (size_t)experts, "case %d", i);
        balance_trtllm_place(experts, ranks, spr, f, count, got);
        plain_trtllm_place(experts, ranks, spr, f, count, expected);
        cr_assert_arr_eq(got, expected, sizeof *got * (size_t)slots, "case %d", i);
    }
    cr_expect_gt(ties, 700, "only %d cases tie", ties);
}

Test(exact, deepseek_agrees_with_a_plain_search_in_1000_cases) {
    int hierarchical = 0;
    state = 2;
    for (int i = 0; i < 1000; i++) {
        int nodes = divisors[pick(5)], ranks = nodes * (1 + pick(4));
        int groups = divisors[pick(7)], experts = groups * (1 + pick(MAX_E / groups));
        int spr = (experts + ranks - 1) / ranks + pick(3);
        int slots = ranks * spr, got[MAX_SLOTS], expected[MAX_SLOTS];
        double load[MAX_E];
        random_load(load, experts);
        for (int e = 0; e < experts && groups % nodes; e++)
            load[e] *= 0.37; /* no sums of groups, so any fraction will do */
        hierarchical += groups % nodes == 0 && nodes > 1;
        balance_deepseek(experts, slots, groups, nodes, ranks, load, got);
        plain_deepseek(experts, slots, groups, nodes, ranks, load, expected);
        cr_assert_arr_eq(got, expected, sizeof *got * (size_t)slots, "case %d", i);
    }
    cr_expect_gt(hierarchical, 200, "only %d cases are hierarchical", hierarchical);
}

/* ---- published results ---- */

/* The example of EPLB's README: 12 experts in 4 groups, 16 replicas, 2 nodes, 8 GPUs. */
Test(exact, deepseek_gives_what_its_readme_prints) {
    static const double load[2][12] = {{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86},
                                       {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}};
    static const int expected[2][16] = {{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1},
                                        {7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}};
    int got[16];
    for (int l = 0; l < 2; l++) {
        balance_deepseek(12, 16, 4, 2, 8, load[l], got);
        cr_expect_arr_eq(got, expected[l], sizeof got, "layer %d", l);
    }
}

Test(exact, trtllm_ties_go_to_the_larger_expert_and_the_lower_rank) {
    static const float load[4] = {5, 5, 5, 5};
    int count[4], slots[6];
    balance_trtllm_replicate(4, 6, load, count);
    cr_expect_arr_eq(count, ((int[]){1, 1, 2, 2}), sizeof count);
    balance_trtllm_place(4, 2, 3, load, count, slots); /* 0 1 | 2 2 3 3, heaviest first */
    cr_expect_arr_eq(slots, ((int[]){0, 2, 3, 1, 2, 3}), sizeof slots);
}

Test(exact, trtllm_without_loads_adds_to_the_first_experts) {
    static const float load[4] = {0};
    int count[4];
    balance_trtllm_replicate(4, 10, load, count);
    cr_expect_arr_eq(count, ((int[]){3, 3, 2, 2}), sizeof count);
}

Test(exact, trtllm_default_starts_every_rank_at_its_part_of_the_experts) {
    int slots[12];
    balance_trtllm_default(8, 4, 3, slots);
    cr_expect_arr_eq(slots, ((int[]){0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0}), sizeof slots);
    balance_trtllm_default(5, 3, 2, slots); /* rank r starts at r * 5 / 3 */
    cr_expect_arr_eq(slots, ((int[]){0, 1, 1, 2, 3, 4}), 6 * sizeof *slots);
}
