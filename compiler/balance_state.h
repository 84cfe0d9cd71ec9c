/* The placement engine's state: one layer's slots and everything that follows from them, and two
 * moves: swap two slots, rewrite one. Internal to compiler/balance_*.c. */
#ifndef MOE_BALANCE_STATE_H
#define MOE_BALANCE_STATE_H

#include "balance.h"

struct balance_state {
    const struct balance_problem *p;
    int experts, ranks, slots_per_rank, slots, workloads, nodes;
    double *load;    /* [E][W] scaled: were every rank as fast as it can be, all times were 1 */
    double *weight;  /* [W] sums to 1 */
    double *cost;    /* [R] 1 / speed */
    double *inverse; /* [R*S+2] 1 / n; 0 for 0 */

    int *expert_of_slot; /* [R*S] -1: empty */
    int *count;          /* [E] replicas */
    int *first, *next;   /* [E], [R*S]: an expert's slots as a list, -1 ends it */
    int *prev;           /* [R*S] */
    uint16_t *on_rank;   /* [E][R] replicas there: above 1 only where pins say so */
    uint16_t *on_node;   /* [E][N] */

    uint8_t *fixed;        /* [R*S] pinned, or beyond the rank's capacity */
    uint8_t *banned;       /* [E][R] may not live there */
    int *most;             /* [E] replicas at most */
    int *rank_of_slot;     /* [R*S] */
    int *node_of_rank;     /* [R] */
    int *home;             /* [E] node of the expert's group; NULL: no groups */
    double bound;          /* from the homes; 0: none */
    int node_limit;        /* replicas of one expert in a node */
    int away, away_limit;  /* slots that hold an expert off its home */
    int moved, move_limit; /* slots that differ from current and hold something */

    /* balance_even.c; smaller is better */
    double value;  /* weighted mean over workloads of maximum time + spread * mean square */
    double spread; /* of time - 1 */
    double *time;  /* [R][W] rank times */
    int *order;    /* [W][R] ranks, the slowest first */
    int *place;    /* [W][R] a rank's index in order */
    struct even *even;
    double *scratch; /* balanced_time's */

    uint64_t random;
    void *memory; /* what state_free frees */
};

/* Zeroed, freed with the state; as balance_alloc when there is no memory. */
void *state_alloc(struct balance_state *s, size_t count, size_t bytes);
/* Empty slots. */
void state_init(struct balance_state *s, const struct balance_problem *p);
void state_free(struct balance_state *s);
/* Puts an expert (-1: none) into a slot, whatever the limits; its value is not told. */
void state_put(struct balance_state *s, int slot, int expert);

/* May the move be made? Limits, pins, duplicates, homes, the moves left; the last replica of an
 * expert is never rewritten. */
bool state_may_swap(const struct balance_state *s, int a, int b);
bool state_may_rewrite(const struct balance_state *s, int slot, int expert);
/* May expert live in slot, were it empty? */
bool state_may_put(const struct balance_state *s, int slot, int expert);

/* splitmix64 */
static inline uint64_t state_random(struct balance_state *s) {
    uint64_t z = s->random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
/* 0 .. n-1 */
static inline int state_pick(struct balance_state *s, int n) {
    return (int)(((state_random(s) >> 32) * (uint64_t)n) >> 32);
}

/* balance_even.c: values the slots as they are; what a move would make of the value (a result above
 * limit need not be exact, only above it); the moves; all slots at once. */
void even_value(struct balance_state *s);
double even_swap(struct balance_state *s, int a, int b, double limit);
double even_rewrite(struct balance_state *s, int slot, int expert, double limit);
void even_make_swap(struct balance_state *s, int a, int b);
void even_make_rewrite(struct balance_state *s, int slot, int expert);
void even_reset(struct balance_state *s, const int *expert_of_slot);

/* balance_start.c: a first placement, false when there is none. key[E]: loads to place by. */
bool start_place(struct balance_state *s, const double *key);
/* One legal replica of every expert and nothing else; the first expert without a place, or -1. */
int start_singles(struct balance_state *s);
/* Chooses home. The best maximum of mean node time; *exact: no packing is better. */
double start_homes(struct balance_state *s, bool *exact);

/* balance_pour.c: the search for the best split of each batch, of about trials moves (0: a few
 * milliseconds). With current and moves the workloads are windows, the newest last, and only
 * changes are made that are worth their slots. The value is not told. */
void pour_search(struct balance_state *s, long trials);

/* balance_bound.c: no placement's value is smaller, homes aside. */
double state_bound(struct balance_state *s);

/* balance_search.c: at most trials moves are valued; stops at goal. */
void search_descend(struct balance_state *s, double goal, long trials);
void search_climb(struct balance_state *s, double goal, long trials);
/* Within few moves of the slots as they are: the best moves, then again and again some of them
 * taken back and the best made. */
void search_moves(struct balance_state *s, double goal, long trials);

/* balance_worth.c: goes back towards base, a slot or an exchange at a time, while what stays as it was
 * loses less than p->worth a slot; pour: and tries other moves instead. All the way when the rest is
 * not worth it together. */
void worth_search(struct balance_state *s, const int *base, bool pour);

/* balance.c: the largest rank time of workload w under the best split, the mean being 1, in at most
 * so many sweeps; of all ranks in time[R] when that is not NULL. */
double balanced_time(struct balance_state *s, const int *expert_of_slot, int w, int sweeps,
                     double *time);

#endif
