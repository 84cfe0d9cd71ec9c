/* Where every expert of every MoE layer lives. */
#include "moec.h"

#include <string.h>

static const struct assignment *assignment_of(const struct deployment *dep, int layer) {
    for (int i = 0; i < dep->num_assignments; i++)
        if (dep->assignments[i].layer == layer)
            return &dep->assignments[i];
    return NULL;
}

/* All experts weigh the same. Without num_slots: experts in order, empty slots last. With it: in
 * order and again from expert 0; policy trtllm starts rank r at expert r*E/ranks, as upstream's
 * default assignment does. Either way every expert has a slot and a rank holds none twice. */
static void place_default(const struct deployment *dep, int slots, int *out) {
    int experts = dep->model->num_experts, ranks = dep->cluster->ranks;
    bool upstream = dep->num_slots && !strcmp(dep->policy, "trtllm");
    for (int r = 0; r < ranks; r++)
        for (int s = 0; s < slots; s++) {
            int first = upstream ? (int)((long long)r * experts / ranks) : r * slots;
            bool empty = !dep->num_slots && first + s >= experts;
            out[r * slots + s] = empty ? -1 : (first + s) % experts;
        }
}

static void share_evenly(struct arena *a, const struct placement *p, int layer) {
    int total = p->ranks * p->slots_per_rank, *count = arena_array(a, int, p->experts);
    const int *slot = p->expert_of_slot + layer * total;
    for (int s = 0; s < total; s++)
        if (slot[s] >= 0)
            count[slot[s]]++;
    for (int s = 0; s < total; s++)
        p->share_of_slot[layer * total + s] = slot[s] >= 0 ? 1.0 / count[slot[s]] : 0;
}

/* Every expert has as many tokens. */
static double judge(const struct placement *p, int layer) {
    int total = p->ranks * p->slots_per_rank;
    double most = 0;
    for (int r = 0; r < p->ranks; r++) {
        double sum = 0;
        for (int s = 0; s < p->slots_per_rank; s++)
            sum += p->share_of_slot[layer * total + r * p->slots_per_rank + s];
        most = sum > most ? sum : most;
    }
    return most * p->ranks / p->experts;
}

struct placement *place_layers(struct arena *a, struct diags *d, const struct deployment *dep,
                               int n_threads) {
    const struct model *m = dep->model;
    struct placement *p = arena_array(a, struct placement, 1);
    int slots = deployment_slots(dep), total = slots * dep->cluster->ranks;
    size_t n = (size_t)m->num_moe_layers;
    (void)n_threads;
    if (dep->policy_path || !strcmp(dep->policy, "deepseek")) {
        diag_error(d, dep->policy_loc, "policy %s is not in this build", dep->policy);
        return NULL;
    }
    *p = (struct placement){.num_layers = m->num_moe_layers,
                            .experts = m->num_experts,
                            .ranks = dep->cluster->ranks,
                            .slots_per_rank = slots,
                            .layers = m->moe_layers};
    p->expert_of_slot = arena_array(a, int, n *(size_t)total);
    p->share_of_slot = arena_array(a, double, n *(size_t)total);
    p->imbalance = arena_array(a, double, n);
    p->imbalance_even = arena_array(a, double, n);
    p->bound = arena_array(a, double, n);
    for (int i = 0; i < m->num_moe_layers; i++) {
        const struct assignment *given = assignment_of(dep, m->moe_layers[i]);
        if (given)
            memcpy(p->expert_of_slot + i * total, given->expert_of_slot,
                   sizeof(int) * (size_t)total);
        else
            place_default(dep, slots, p->expert_of_slot + i * total);
        share_evenly(a, p, i);
        p->imbalance[i] = p->imbalance_even[i] = judge(p, i);
        p->bound[i] = 1;
    }
    return p;
}
