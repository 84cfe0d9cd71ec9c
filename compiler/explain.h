/* Between the parts of moec explain. */
#ifndef MOEC_EXPLAIN_H
#define MOEC_EXPLAIN_H

#include "moec.h"

/* A plan as plan.bin has it, and what plan.yaml or the deployment adds. */
struct view {
    struct arena arena;
    struct diags diags;
    int layer, target; /* asked for; -1: all */
    struct plan plan;
    const struct deployment *dep; /* NULL: a bundle */
    const char *path, *model, *policy, *dispatch;
    struct cluster *cluster;   /* figures of the GPU; gpu NULL: none named */
    const struct loads *loads; /* NULL: none */
};

/* Ways to lay out the layers of a class: experts in order without replicas; the policy's placement
 * of as many slots as there are experts; the plan's. */
#define EXPLAIN_WAYS(X) X(in_order) X(rearranged) X(planned)
#define X(name) WAY_##name,
enum { EXPLAIN_WAYS(X) NUM_WAYS };
#undef X
struct way {
    struct cost_setup *setups; /* NULL: there is no such way */
    int n, slots_per_rank;
    double imbalance; /* mean of max/mean over layers and workloads */
};
enum { MAX_STEPS = 16 };
enum verdict { VERDICT_ONE_RANK, VERDICT_NO_LOADS, VERDICT_NO_GPU, VERDICT_NO, VERDICT_YES };
struct balance_view {
    struct model model; /* of the class */
    struct cost_setup base;
    struct way ways[NUM_WAYS];
    int num_layers, redundant_slots; /* of a layer, over all ranks */
    bool timed;                      /* the cluster's figures suffice for times */
    int num_steps, tokens[MAX_STEPS];
    struct cost cost[NUM_WAYS][MAX_STEPS]; /* mean of the layers */
    double redundant_bytes;                /* on each rank, of all layers */
    double move_us; /* one slot of every layer, received by the ranks in equal parts */
    enum verdict verdict;
    int best;               /* index into tokens of the largest gain */
    int from;               /* and of the first from which the plan is worth it; -1: none */
    double gain[MAX_STEPS]; /* part of a step that the plan saves against experts in order */
    const char *text;       /* the verdict in words */
};
void explain_balance(struct view *v, int class_index, struct balance_view *out);
/* A mean layer of the plan at a bucket's most tokens, with its exchange; false when the cluster has
 * no figures. */
bool explain_cost(const struct balance_view *b, const struct moe_plan_bucket *bucket,
                  struct cost *out);

void explain_loads_text(struct view *v);
void explain_loads_json(struct view *v, struct buf *out);
void explain_balance_text(const struct view *v, const struct balance_view *b);
void explain_balance_json(const struct view *v, const struct balance_view *b, struct buf *out);
/* Why a layer's experts have the replicas they have: the hottest, and all replicated ones with
 * `full`. */
void explain_replicas_text(struct view *v, const struct moe_plan_layer *l, bool full);
/* ,"imbalance":...,"hottest":[...] */
void explain_replicas_json(struct view *v, const struct moe_plan_layer *l, struct buf *out);

#endif
