/* Replanning while serving. Every iteration the next few layers are looked at, in turn: where the
 * loads have moved on, a few of their slots get other experts, as few as bring the most.
 *
 * One rank plans (rt_rebalance_plan) and sends the update's bytes to all; the others check that they
 * hold what it started from and would hold what it ends with (rt_rebalance_check). Nothing changes
 * until rt_rebalance_apply, so that an update whose weights do not arrive can be dropped
 * (rt_rebalance_drop); until then its layers are not planned again. No clock, no device, no ranks in
 * here: the caller brings the loads and moves the weights. One thread at a time. */
#ifndef MOERT_REBALANCE_H
#define MOERT_REBALANCE_H

#include "../compiler/balance.h"
#include "moert.h"

/* Of a layer's slots so many change at most in one update when nothing is said. */
enum { RT_MOVES = 16 };
/* What each must gain of the layer's max/mean rank load when nothing is said. A slot's weights are on
 * the way for slot_us and the layer's experts take layer_us: it pays for itself in
 * slot_us / (RT_WORTH * layer_us) iterations, an expert of DeepSeek-V3 through a NIC of 400 Gbit/s in
 * about a hundred. */
#define RT_WORTH 0.016

struct rt_rebalance_layer {
    int layer; /* the model's own number */
    /* Shape, split and limits; its arrays stay in use. load, weight, workloads, current, moves,
     * worth and seed are not read. */
    struct balance_problem limits;
    const int32_t *expert_of_slot; /* [R*S] to begin with, -1: empty */
    const int32_t *share_of_slot;  /* [R*S] parts of MOE_SHARE_ONE; read under BALANCE_SHARE */
};
struct rt_rebalance_options {
    int updates_per_iter; /* layers of an iteration at most, from 1 */
    int moves;    /* slots of a layer that an update may give another expert; -1: RT_MOVES */
    double worth; /* 0: RT_WORTH */
};

struct rt_rebalance;
/* Layers come in the order of their turns. */
moert_result rt_rebalance_open(const struct rt_rebalance_layer *layers, int n,
                               const struct rt_rebalance_options *o, struct rt_rebalance **out);
/* Everything that the plan of a bundle says about it; updates_per_iter is at least 1. */
struct moert_bundle;
moert_result rt_rebalance_open_bundle(const struct moert_bundle *b, double worth,
                                      struct rt_rebalance **out);
void rt_rebalance_close(struct rt_rebalance *r);

int rt_rebalance_layers(const struct rt_rebalance *r);
/* Iterations after which every layer has had its turn, as TensorRT-LLM has them: n layers in
 * F = ceil(n / updates_per_iter) groups, layer i in group i % F; when the first and the last group
 * are equally large an iteration without any follows. */
int rt_rebalance_rotation(const struct rt_rebalance *r);
/* Whether layer i (an index from 0) has its turn in an iteration (from 0). */
bool rt_rebalance_due(const struct rt_rebalance *r, int64_t iteration, int i);
/* Its slots and, under BALANCE_SHARE, shares as they are; they change in rt_rebalance_apply. */
const int32_t *rt_rebalance_slots(const struct rt_rebalance *r, int i);
const int32_t *rt_rebalance_shares(const struct rt_rebalance *r, int i);

/* One slot gets another expert. */
struct rt_move {
    int32_t slot;     /* over all ranks */
    int32_t from, to; /* -1: nothing */
    int32_t
        source; /* a rank that holds `to`: of the same node where one does, then the one that
                       * sends least; -1: none, or nothing to send */
};
struct rt_update_layer {
    int32_t index; /* of the layer */
    int32_t first_move, num_moves;
    int32_t first_share, num_shares; /* R*S, or 0: the shares stay */
};
struct rt_update {
    unsigned char *bytes; /* what is sent */
    size_t size;
    int64_t iteration;
    int num_layers; /* those that change at all */
    const struct rt_update_layer *layers;
    const struct rt_move *moves; /* by layer, then slot, ascending */
    const int32_t *shares;
};
void rt_update_free(struct rt_update *u);

/* Plans the layers whose turn it is. load[i]: tokens per expert of layer i, any scale, NULL or all
 * zero: nothing is known, the layer stays as it is; only due layers are read. The same loads give the
 * same bytes on every machine. */
moert_result rt_rebalance_plan(struct rt_rebalance *r, int64_t iteration,
                               const double *const *load, struct rt_update *out);
/* Takes another rank's bytes. MOERT_CORRUPT when they are damaged or break a limit, MOERT_INVALID
 * when this rank's placement is not the one they start from. */
moert_result rt_rebalance_check(struct rt_rebalance *r, const void *bytes, size_t size,
                                struct rt_update *out);
/* The update's weights are all there; or will not come. */
void rt_rebalance_apply(struct rt_rebalance *r, const struct rt_update *u);
void rt_rebalance_drop(struct rt_rebalance *r, const struct rt_update *u);

#endif
