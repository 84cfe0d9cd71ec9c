/* The placement engine: how often each expert of one layer is replicated, on which rank each
 * replica lives, and how a batch is split over replicas. Plain arrays, no YAML, Lua or CUDA: the
 * compiler calls it offline and the runtime links the same object for online balancing.
 *
 * Words: E experts, R ranks, S slots of one rank, slot r*S+s is slot s of rank r, W workloads.
 * A placement is expert_of_slot[R*S], -1: empty. Everything is deterministic: effort is counted in
 * trials, never in time, and a seed gives the same bytes on every machine (integers, or doubles
 * without contraction and without libm). Functions return false only when the problem has no
 * answer (balance_check says why). */
#ifndef MOE_BALANCE_H
#define MOE_BALANCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BALANCE_MAX_EXPERTS = 1024, BALANCE_MAX_RANKS = 1024, BALANCE_MAX_WORKLOADS = 64 };

/* How the dispatcher will split an expert's tokens over its replicas. */
enum balance_split {
    BALANCE_EVEN,     /* equal parts */
    BALANCE_SHARE,    /* fixed fractions, chosen with the placement */
    BALANCE_BALANCED, /* the best split of each batch, by water-filling */
};

/* One layer's problem. NULL pointers and zeros mean: no such limit. */
struct balance_problem {
    int experts, ranks, slots_per_rank;
    int workloads;
    /* [W][E] tokens, >= 0; each workload is normalised by its own sum, and one without tokens is
     * left out. Nothing at all, like 0 workloads: all experts weigh the same. With current and a
     * limit on moves, workloads are windows of the recent past, the newest last. */
    const double *load;
    const double *weight; /* [W] */
    enum balance_split split;

    const int *capacity; /* [R] slots of a rank that may be used, <= S */
    const double *speed; /* [R] relative; a rank's time is load / speed, and the mean that it is
                          * measured by is the time were all equally long at work */
    int ranks_per_node;  /* 0: no nodes */
    int groups;          /* experts in E/groups consecutive groups that share a node; 0: none */
    int cross_node_slots; /* with groups: slots that may hold an expert off its group's node */
    int max_per_node;     /* replicas of one expert in a node */
    int max_replicas;     /* replicas of one expert */
    const int *pin;       /* [R*S] expert that this slot must hold, -1: free */
    const uint8_t *forbidden; /* [E][R] 1: this expert may not live there */

    const int *current; /* [R*S] where to start; slots that stay cost nothing */
    /* With current: slots whose expert may change; -1: any number. What must change because current
     * breaks a limit is changed in any case. Few moves and BALANCE_BALANCED: workloads are windows
     * in time, the newest last, and the trend of the last two counts too. */
    int moves;
    /* With current: what a slot must gain of max/mean rank time, weighted over workloads, for its
     * weights to move; moves that gain less are taken back, the least first. 0: any gain will do. */
    double worth;

    uint64_t seed;
    long effort; /* trials; 0: the default for the size */
};

struct balance_result {
    double imbalance;      /* mean over workloads of max/mean rank time, under the split */
    double imbalance_even; /* the same, split evenly */
    double worst;          /* largest over workloads, under the split */
    double bound;          /* no placement of this problem is below it */
    int moved;             /* slots that differ from current and hold something */
};

/* What is wrong with a problem, as one clause ("256 experts need at least 256 slots, ..."), or
 * NULL. */
const char *balance_check(const struct balance_problem *p);

/* The first limit that a placement breaks, as one clause, or NULL: capacity, replicas, groups at
 * home (balance_check has passed the problem; pins and forbidden ranks are not looked at). */
const char *balance_broken(const struct balance_problem *p, const int *expert_of_slot);

/* The planner: offline, robust (several workloads) or incremental (current and moves). No rank
 * holds an expert twice; every slot is used that the limits let be used, and empty ones come last.
 * Slots that keep an expert keep its place. share_of_slot may be NULL. */
bool balance_plan(const struct balance_problem *p, int *expert_of_slot, double *share_of_slot,
                  struct balance_result *r);

/* Judges a placement: fills r, and when not NULL the rank times loads[W][R], 1 being the mean.
 * share_of_slot counts under BALANCE_SHARE only; NULL: equal parts. */
void balance_judge(const struct balance_problem *p, const int *expert_of_slot,
                   const double *share_of_slot, struct balance_result *r, double *loads);

/* The shares that go with a placement: equal parts, or under SHARE and BALANCED the best split of
 * the mean load. An expert's add up to 1. */
void balance_shares(const struct balance_problem *p, const int *expert_of_slot,
                    double *share_of_slot);

/* Shares as whole parts of `one`, 0 for empty slots: rounded down, and what is left of an expert goes
 * to its slots in order, one part each, so that its shares add up to `one` exactly. */
void balance_whole_shares(int experts, int slots, const int *expert_of_slot,
                          const double *share_of_slot, int one, int *out);

/* No placement of the problem has a smaller mean of max/mean rank time. */
double balance_bound(const struct balance_problem *p);

/* ---- balance_memory.c ---- */

/* Zeroed. Without memory it aborts, but inside balance_within. */
void *balance_alloc(size_t n, size_t size);
void balance_free(void *p);
/* Calls fn(user). False when there was no memory for it: it ended there, and what it had from
 * balance_alloc is free again. Does not nest. */
bool balance_within(void (*fn)(void *user), void *user);
/* For tests: so many allocations of this thread find memory; below 0: as many as there is. */
extern _Thread_local long balance_allocations;

/* ---- split.c: a batch over the replicas of a fixed placement ---- */

/* The best split of one batch: count[E] tokens; tokens_of_slot[R*S] receives whole numbers whose
 * sum over an expert's slots is its count (an expert with a count has a slot). Water-filling
 * from pair to pair of replicas, at most 30 sweeps, ties to the lowest slot: every rank computes
 * the same. speed may be NULL. Returns the largest rank time. */
double balance_split_batch(int experts, int ranks, int slots_per_rank,
                           const int *expert_of_slot, const double *speed, const int64_t *count,
                           int64_t *tokens_of_slot);

/* ---- exact.c: what others compute, to the bit ---- */

/* TensorRT-LLM: replicas per expert from float loads (double arithmetic, ties to the larger id;
 * all loads zero: base + 1 for the first), and their places (load per replica descending, id
 * ascending; the least loaded rank that is not full, ties to the lower rank). slots >= experts,
 * slots % ranks == 0. */
void balance_trtllm_replicate(int experts, int slots, const float *load, int *count);
void balance_trtllm_place(int experts, int ranks, int slots_per_rank, const float *load,
                          const int *count, int *expert_of_slot);
/* Its assignment without loads: slot s of rank r holds expert (r*E/R + s) mod E. */
void balance_trtllm_default(int experts, int ranks, int slots_per_rank, int *expert_of_slot);
/* DeepSeek's EPLB: global (nodes 1 or groups not divisible by nodes), else hierarchical. */
void balance_deepseek(int experts, int slots, int groups, int nodes, int ranks,
                      const double *load, int *expert_of_slot);

#endif
