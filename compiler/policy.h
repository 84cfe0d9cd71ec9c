/* Lua policies (DESIGN 4). policy.c is the parent's side: it starts a child process for every call,
 * waits for it within limits and checks every value that comes back. sandbox.c is the child's: a
 * Lua state that can compute and nothing else. policy_lib.c is what the child offers as moe.*. */
#ifndef MOEC_POLICY_H
#define MOEC_POLICY_H

#include "moec.h"

struct balance_problem;
struct lua_State;

/* Functions that a policy may define, and what they are for. X(name, what) */
#define POLICY_HOOKS(X) \
    X(replicate, "how often each expert is replicated") \
    X(place, "which expert each slot holds") \
    X(share, "the fraction of its expert's tokens that each slot takes") \
    X(exchange, "how ranks exchange tokens") \
    X(variant, "tile shapes") \
    X(constraints, "pins, forbidden ranks, workload weights, move budget")
#define X(name, ...) HOOK_##name,
enum policy_hook { POLICY_HOOKS(X) NUM_HOOKS };
#undef X
extern const char *const hook_names[NUM_HOOKS];

enum {
    POLICY_STEPS = 100000000,  /* Lua instructions of one call */
    POLICY_MEMORY = 256 << 20, /* bytes of one call's Lua objects */
    POLICY_RESULT = 64 << 20,  /* bytes that may come back, and values in them */
    POLICY_VALUES = 4 << 20,
    POLICY_FILE = 1 << 20, /* bytes of a policy's text */
    POLICY_DEPTH = 8,      /* tables in tables */
    POLICY_NOTES = 100,    /* lines that print() may make, and their bytes */
    POLICY_NOTE = 1000,
};
#define POLICY_CPU 3.0  /* seconds of processor time of one call */
#define POLICY_WALL 8.0 /* seconds that all calls of a policy may take together */

/* An opened policy. */
struct policy {
    const char *name;            /* what it calls itself, else what it was opened as */
    const struct source *source; /* its text, for diagnostics */
    bool shipped;
    bool defines[NUM_HOOKS];
    int line[NUM_HOOKS]; /* where each is defined */
    double seconds_left;
};

/* What a policy decides about, and with. */
struct policy_world {
    const struct model *model;
    const struct cluster *cluster;
    const struct loads *loads; /* NULL: all experts weigh the same */
    int slots_per_rank;
    int num_slots; /* that hold an expert; the other ones of ranks * slots_per_rank come last */
    const struct placement_limits *limits; /* NULL: none */
};

/* The shipped policies, the default first; NULL-terminated. */
extern const char *const policy_shipped[];

/* Reads a policy and runs it once to see what it defines. path NULL: the shipped one of that name.
 * at: where it was named. NULL on error. */
struct policy *policy_open(struct arena *a, struct diags *d, const char *name, const char *path,
                           struct loc at);

/* One call each, false on error. The policy must define the function. layers are the model's MoE
 * layers, in order; E, R, S as in balance.h. count: [layers][E]; slots: [layers][R * S]. */
bool policy_replicate(struct policy *p, struct arena *a, struct diags *d,
                      const struct policy_world *w, int *count);
bool policy_place(struct policy *p, struct arena *a, struct diags *d,
                  const struct policy_world *w, const int *count, int *expert_of_slot);
bool policy_share(struct policy *p, struct arena *a, struct diags *d,
                  const struct policy_world *w, const int *expert_of_slot,
                  double *share_of_slot);
bool policy_constraints(struct policy *p, struct arena *a, struct diags *d,
                        const struct policy_world *w, struct constraints *c);
/* An enum moe_exchange; -1 on error. tokens: of one rank. */
int policy_exchange(struct policy *p, struct arena *a, struct diags *d,
                    const struct policy_world *w, int tokens);
/* Changes what the policy has an opinion on; a bucket of up to `tokens` tokens. */
bool policy_variant(struct policy *p, struct arena *a, struct diags *d,
                    const struct policy_world *w, enum moe_target target, int tokens,
                    struct variant_choice *v);

/* ---- between policy.c and sandbox.c ---- */

/* A call: which function, and what it gets besides the model and the cluster. */
struct policy_call {
    int hook; /* NUM_HOOKS: none, say what is defined */
    const struct policy_world *world;
    double seconds; /* that are left */
    const int *count, *expert_of_slot;
    enum moe_target target;
    int tokens;
};
/* The child's whole life: runs the call and writes records to fd. Never returns. */
void sandbox_run(const struct source *source, const struct policy_call *call, int fd)
    __attribute__((noreturn));

/* A record is a type byte, the line it is about (int32, 0: none), its length (uint32) and so many
 * bytes. The last one is a value or an error. */
#define RECORD_NOTE 'n'  /* text of print() */
#define RECORD_ERROR 'e' /* text */
#define RECORD_VALUE 'v' /* a value, as follows */
#define RECORD_HEAD 9

/* A value is a tag and what belongs to it; numbers are the machine's. */
#define VALUE_NIL 'N'
#define VALUE_FALSE 'F'
#define VALUE_TRUE 'T'
#define VALUE_INT 'I'    /* int64 */
#define VALUE_NUMBER 'D' /* double */
#define VALUE_STRING 'S' /* uint32 bytes */
#define VALUE_TABLE \
    't' /* uint32 n, uint32 pairs; values of keys 1 .. n, then keys and values */
#define VALUE_OTHER 'X' /* uint32 bytes: what it is ("function") */

/* Whether bytes are one value and nothing else; what call results are read with. */
bool policy_value_ok(struct arena *a, const char *data, size_t len);

/* ---- policy_lib.c ---- */

/* Pushes the table moe. */
void policy_lib_open(struct lua_State *L);
/* Adds to what the call has cost, in instructions; does not return when that is too much. */
void sandbox_charge(struct lua_State *L, long long steps);

/* ---- numbers.c ---- */

double number_exp(double x);
double number_log(double x);

/* ---- place.c ---- */

/* place_layers with a policy that is open. */
struct placement *place_with(struct arena *a, struct diags *d, const struct deployment *dep,
                             struct policy *policy, int n_threads);

/* Replicas of each expert: one, then one more for the expert whose replicas are the heaviest, equals
 * to the lowest id, until there are `slots` or all have `most`. */
void place_counts(int experts, int slots, int most, const double *load, int *count);
/* Places replicas whose numbers are given and fit: heaviest first on the rank with room and not yet
 * this expert where it ends earliest, then exchanges. Of the problem's limits it keeps capacity,
 * pins and forbidden ranks; load: [E]. False when the counts leave no room for them. */
bool place_counted(const struct balance_problem *b, const double *load, const int *count,
                   int *expert_of_slot);
/* The deployment's limits and the differences of its ranks, put into a problem; and whether there
 * are any. */
void place_limits(const struct deployment *dep, struct balance_problem *b);
bool place_limited(const struct deployment *dep);
/* Slots over all ranks that may hold an expert, num_slots at most. */
int place_usable(const struct deployment *dep);

#endif
