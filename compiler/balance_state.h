/* The placement engine's state: one layer's slots and everything that follows from them, two moves
 * (swap two slots; rewrite one), and an objective that values both without making them. Internal
 * to compiler/balance*.c and compiler/split.c.
 *
 * An objective is five functions. begin values the slots as they are; swap and rewrite say what
 * the value would be; swapped and rewrote follow a move that the state has just made. It keeps
 * s->value, and s->time and s->order through state_retime, from which the search learns which ranks
 * are hot. What else it needs hangs off s->own, from state_alloc. Smaller is better. limit: a value
 * above it need not be exact, only above it. */
#ifndef MOE_BALANCE_STATE_H
#define MOE_BALANCE_STATE_H

#include "balance.h"

struct balance_state;
struct balance_objective {
    void (*begin)(struct balance_state *s);
    double (*swap)(struct balance_state *s, int a, int b, double limit);
    double (*rewrite)(struct balance_state *s, int slot, int expert, double limit);
    void (*swapped)(struct balance_state *s, int a, int b);
    void (*rewrote)(struct balance_state *s, int slot, int old);
};

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

    const struct balance_objective *objective;
    double value;
    double *time;  /* [R][W] rank times */
    int *order;    /* [W][R] ranks, the slowest first */
    int *place;    /* [W][R] a rank's index in order */
    double spread; /* even: the weight of the mean square of (time - 1) beside the maximum */
    void *own;     /* the objective's */

    uint64_t random;
    void *memory; /* what state_free frees */
};

/* Zeroed, freed with the state; aborts when there is no memory. */
void *state_alloc(struct balance_state *s, size_t count, size_t bytes);
/* Empty slots; the problem passed balance_check. */
void state_init(struct balance_state *s, const struct balance_problem *p);
void state_free(struct balance_state *s);
/* Puts an expert (-1: none) into a slot, whatever the limits; the objective is not told. */
void state_put(struct balance_state *s, int slot, int expert);
/* Sets the objective and values the slots. */
void state_value(struct balance_state *s, const struct balance_objective *objective);

/* May the move be made? Limits, pins, duplicates, homes, the moves left; the last replica of an
 * expert is never rewritten. */
bool state_may_swap(const struct balance_state *s, int a, int b);
bool state_may_rewrite(const struct balance_state *s, int slot, int expert);
/* May expert live in slot, were it empty? */
bool state_may_put(const struct balance_state *s, int slot, int expert);
void state_swap(struct balance_state *s, int a, int b);
void state_rewrite(struct balance_state *s, int slot, int expert);

/* Moves rank to its place in the order of workload w after its time there changed. */
void state_retime(struct balance_state *s, int w, int rank, double time);
/* All orders anew from s->time. */
void state_order(struct balance_state *s);

uint64_t state_random(struct balance_state *s);
/* 0 .. n-1 */
static inline int state_pick(struct balance_state *s, int n) {
    return (int)(((state_random(s) >> 32) * (uint64_t)n) >> 32);
}

extern const struct balance_objective balance_even;
/* split.c */
extern const struct balance_objective balance_balanced;

/* balance_start.c: a first placement, false when there is none. key[E]: loads to place by. */
bool start_place(struct balance_state *s, const double *key);
/* One legal replica of every expert and nothing else; the first expert without a place, or -1. */
int start_singles(struct balance_state *s);
/* Chooses home. The best maximum of mean node time; *exact: no packing is better. */
double start_homes(struct balance_state *s, bool *exact);

/* balance_bound.c: no placement's value is smaller, homes aside. */
double state_bound(struct balance_state *s);

/* balance_search.c: at most trials moves are valued; stops at goal. */
void search_descend(struct balance_state *s, double goal, long trials);
void search_climb(struct balance_state *s, double goal, long trials);

#endif
