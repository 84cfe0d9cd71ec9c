/* moe.*: what a policy need not write in Lua. Arguments are one layer's arrays as DESIGN 4 has
 * them (entry 1 is expert 0 or slot 0, expert ids count from 0); every one is checked here, because
 * the author may mean harm. lua/README.md says what each function does. */
#include "balance.h"
#include "policy.h"

#include <lua5.4/lauxlib.h>
#include <lua5.4/lua.h>
#include <lua5.4/lualib.h>

#include <limits.h>
#include <math.h>
#include <string.h>

enum { MAX_SLOTS = 1 << 20, STEPS_PER_SLOT = 50 };

/* ---- reading ---- */

/* Memory that Lua owns, with a reference on the stack. */
static void *scratch(lua_State *L, size_t n, size_t size) {
    luaL_checkstack(L, 4, NULL);
    return memset(lua_newuserdatauv(L, (n + !n) * size, 0), 0, (n + !n) * size);
}

/* Length of the array at `at`, without metamethods. */
static int array_length(lua_State *L, int at, const char *what, int least, int most) {
    if (!lua_istable(L, at))
        luaL_error(L, "%s: expected an array, got %s", what, luaL_typename(L, at));
    lua_Unsigned n = lua_rawlen(L, at);
    if (n < (lua_Unsigned)least || n > (lua_Unsigned)most)
        luaL_error(L, "%s: %I entries, expected %d to %d", what, (LUAI_UACINT)n, least, most);
    sandbox_charge(L, (long long)n);
    return (int)n;
}

static long long to_int(lua_State *L, int at, long long least, long long most,
                        const char *what) {
    int is;
    lua_Integer n = lua_tointegerx(L, at, &is);
    if (lua_type(L, at) != LUA_TNUMBER || !is || n < least || n > most)
        luaL_error(L, "%s: expected a whole number from %I to %I", what, (LUAI_UACINT)least,
                   (LUAI_UACINT)most);
    return n;
}

static int argument(lua_State *L, int at, int least, int most, const char *what) {
    return (int)to_int(L, at, least, most, what);
}

/* Loads: finite, not negative. */
static void read_loads(lua_State *L, int at, int n, double *out, const char *what) {
    for (int i = 0; i < n; i++) {
        lua_rawgeti(L, at, i + 1);
        double x = lua_type(L, -1) == LUA_TNUMBER ? lua_tonumber(L, -1) : -1;
        if (!(x >= 0 && x <= 1e30))
            luaL_error(L, "%s: entry %d is no number from 0 to 1e30", what, i + 1);
        out[i] = x;
        lua_pop(L, 1);
    }
}

static double *load_argument(lua_State *L, int at, int *experts) {
    *experts = array_length(L, at, "load", 1, BALANCE_MAX_EXPERTS);
    double *load = scratch(L, (size_t)*experts, sizeof *load);
    read_loads(L, at, *experts, load, "load");
    return load;
}

static int *read_ints(lua_State *L, int at, int n, int least, int most, const char *what) {
    int *out = scratch(L, (size_t)n, sizeof *out);
    for (int i = 0; i < n; i++) {
        int is;
        lua_rawgeti(L, at, i + 1);
        lua_Integer x = lua_tointegerx(L, -1, &is);
        if (lua_type(L, -1) != LUA_TNUMBER || !is || x < least || x > most)
            luaL_error(L, "%s: entry %d is no whole number from %d to %d", what, i + 1, least,
                       most);
        out[i] = (int)x;
        lua_pop(L, 1);
    }
    return out;
}

/* Counts of replicas, at least one each, slots in all. */
static int *count_argument(lua_State *L, int at, int experts, long long *slots) {
    array_length(L, at, "counts", experts, experts);
    int *count = read_ints(L, at, experts, 1, BALANCE_MAX_RANKS, "counts");
    *slots = 0;
    for (int e = 0; e < experts; e++)
        *slots += count[e];
    return count;
}

static void push_ints(lua_State *L, const int *x, int n) {
    lua_createtable(L, n, 0);
    for (int i = 0; i < n; i++) {
        lua_pushinteger(L, x[i]);
        lua_rawseti(L, -2, i + 1);
    }
}

static float *to_floats(lua_State *L, const double *x, int n) {
    float *f = scratch(L, (size_t)n, sizeof *f);
    for (int i = 0; i < n; i++)
        f[i] = (float)x[i];
    return f;
}

/* ---- what others compute ---- */

/* moe.trtllm_replicate(load, slots) -> counts */
static int trtllm_replicate(lua_State *L) {
    int experts;
    double *load = load_argument(L, 1, &experts);
    int slots = argument(L, 2, experts, MAX_SLOTS, "slots");
    int *count = scratch(L, (size_t)experts, sizeof *count);
    sandbox_charge(L, (long long)slots * 20);
    balance_trtllm_replicate(experts, slots, to_floats(L, load, experts), count);
    push_ints(L, count, experts);
    return 1;
}

/* moe.trtllm_place(load, counts, ranks) -> slots */
static int trtllm_place(lua_State *L) {
    int experts;
    long long slots;
    double *load = load_argument(L, 1, &experts);
    int *count = count_argument(L, 2, experts, &slots);
    int ranks = argument(L, 3, 1, BALANCE_MAX_RANKS, "ranks");
    if (slots % ranks)
        return luaL_error(L, "counts: %I slots are not divisible by %d ranks",
                          (LUAI_UACINT)slots, ranks);
    int *out = scratch(L, (size_t)slots, sizeof *out);
    sandbox_charge(L, slots * 20);
    balance_trtllm_place(experts, ranks, (int)slots / ranks, to_floats(L, load, experts), count,
                         out);
    push_ints(L, out, (int)slots);
    return 1;
}

/* moe.trtllm_default(experts, ranks, slots_per_rank) -> slots */
static int trtllm_default(lua_State *L) {
    int experts = argument(L, 1, 1, BALANCE_MAX_EXPERTS, "experts");
    int ranks = argument(L, 2, 1, BALANCE_MAX_RANKS, "ranks");
    int spr = argument(L, 3, 1, MAX_SLOTS / ranks, "slots_per_rank");
    int *out = scratch(L, (size_t)ranks * (size_t)spr, sizeof *out);
    sandbox_charge(L, (long long)ranks * spr);
    balance_trtllm_default(experts, ranks, spr, out);
    push_ints(L, out, ranks * spr);
    return 1;
}

/* moe.deepseek(load, slots, groups, nodes, ranks) -> slots */
static int deepseek(lua_State *L) {
    int experts;
    double *load = load_argument(L, 1, &experts);
    int slots = argument(L, 2, experts, MAX_SLOTS, "slots");
    int groups = argument(L, 3, 1, experts, "groups");
    int nodes = argument(L, 4, 1, BALANCE_MAX_RANKS, "nodes");
    int ranks = argument(L, 5, 1, BALANCE_MAX_RANKS, "ranks");
    if (slots % ranks || ranks % nodes || experts % groups)
        return luaL_error(L, "moe.deepseek: ranks must divide slots, nodes ranks, and groups "
                             "experts");
    int *out = scratch(L, (size_t)slots, sizeof *out);
    sandbox_charge(L, (long long)slots * 20);
    balance_deepseek(experts, slots, groups, nodes, ranks, load, out);
    push_ints(L, out, slots);
    return 1;
}

/* ---- steps ---- */

/* moe.replicate(load, slots [, most]) -> counts: each replica to the expert whose replicas are the
 * heaviest, equals to the lowest id; at most `most` of one expert. */
static int replicate(lua_State *L) {
    int experts;
    lua_settop(L, 3);
    double *load = load_argument(L, 1, &experts);
    int slots = argument(L, 2, experts, MAX_SLOTS, "slots");
    int most = lua_isnil(L, 3) ? slots : argument(L, 3, 1, MAX_SLOTS, "most");
    int *count = scratch(L, (size_t)experts, sizeof *count);
    if ((long long)most * experts < slots)
        return luaL_error(L,
                          "moe.replicate: %d experts with at most %d replicas are fewer than "
                          "%d slots",
                          experts, most, slots);
    sandbox_charge(L, (long long)(slots - experts) * (experts / 8 + 1));
    place_counts(experts, slots, most, load, count);
    push_ints(L, count, experts);
    return 1;
}

/* moe.place(load, counts, ranks, slots_per_rank) -> slots */
static int place(lua_State *L) {
    int experts;
    long long slots;
    double *load = load_argument(L, 1, &experts);
    int *count = count_argument(L, 2, experts, &slots);
    int ranks = argument(L, 3, 1, BALANCE_MAX_RANKS, "ranks");
    int spr = argument(L, 4, 1, MAX_SLOTS / ranks, "slots_per_rank");
    if (slots > (long long)ranks * spr)
        return luaL_error(L, "counts: %I replicas do not fit %d slots", (LUAI_UACINT)slots,
                          ranks * spr);
    int *out = scratch(L, (size_t)ranks * (size_t)spr, sizeof *out);
    sandbox_charge(L, (long long)ranks * spr * STEPS_PER_SLOT);
    struct balance_problem p = {.experts = experts, .ranks = ranks, .slots_per_rank = spr};
    place_counted(&p, load, count, out);
    push_ints(L, out, ranks * spr);
    return 1;
}

/* ---- the engine ---- */

/* A problem's numbers. X(name, least, most) */
#define PROBLEM_INTS(X) \
    X(ranks, 1, BALANCE_MAX_RANKS) \
    X(slots_per_rank, 1, MAX_SLOTS) \
    X(ranks_per_node, 0, BALANCE_MAX_RANKS) \
    X(groups, 0, BALANCE_MAX_EXPERTS) \
    X(cross_node_slots, 0, MAX_SLOTS) \
    X(max_per_node, 0, MAX_SLOTS) \
    X(max_replicas, 0, MAX_SLOTS) \
    X(moves, -1, MAX_SLOTS) \
    X(effort, 0, 100000000) \
    X(seed, 0, INT_MAX)

static const char *const split_names[] = {"even", "share", "balanced"};

/* Arrays of a problem, each of a length that is known when it is read. */
static const char *const problem_arrays[] = {"load",     "loads", "weight", "split",
                                             "capacity", "speed", "pin",    "current"};

static void check_keys(lua_State *L, int at) {
    static const char *const ints[] = {
#define X(name, ...) #name,
        PROBLEM_INTS(X)
#undef X
    };
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        bool known = false;
        size_t len = 0;
        const char *key = lua_type(L, -2) == LUA_TSTRING ? lua_tolstring(L, -2, &len) : "[...]";
        for (size_t i = 0; i < sizeof ints / sizeof *ints; i++)
            known = known || !strcmp(ints[i], key);
        for (size_t i = 0; i < sizeof problem_arrays / sizeof *problem_arrays; i++)
            known = known || !strcmp(problem_arrays[i], key);
        if (!known || strlen(key) != len)
            luaL_error(L, "a problem has no key '%s'", key);
    }
}

static bool raw_field(lua_State *L, int at, const char *key) {
    lua_pushstring(L, key);
    if (lua_rawget(L, at) != LUA_TNIL)
        return true;
    lua_pop(L, 1);
    return false;
}

static void read_problem_ints(lua_State *L, int at, struct balance_problem *p) {
    p->moves = -1;
#define X(name, least, most) \
    if (raw_field(L, at, #name)) { \
        p->name = argument(L, -1, least, most, #name); \
        lua_pop(L, 1); \
    }
    PROBLEM_INTS(X)
#undef X
    if (!p->ranks || !p->slots_per_rank || (long long)p->ranks * p->slots_per_rank > MAX_SLOTS)
        luaL_error(L, "a problem needs ranks and slots_per_rank, %d slots at most", MAX_SLOTS);
}

/* `load`: one workload, or `loads`: several. */
static void read_problem_loads(lua_State *L, int at, struct balance_problem *p) {
    bool one = raw_field(L, at, "load");
    if (one && raw_field(L, at, "loads"))
        luaL_error(L, "a problem has load or loads, not both");
    if (!one && !raw_field(L, at, "loads"))
        luaL_error(L, "a problem needs load or loads");
    int top = lua_gettop(L);
    p->workloads = one ? 1 : array_length(L, top, "loads", 1, BALANCE_MAX_WORKLOADS);
    double *load = NULL;
    for (int w = 0; w < p->workloads; w++) {
        if (one)
            lua_pushvalue(L, top);
        else
            lua_rawgeti(L, top, w + 1);
        int list = lua_gettop(L);
        int n = array_length(L, list, "load", w ? p->experts : 1,
                             w ? p->experts : BALANCE_MAX_EXPERTS);
        p->experts = n;
        if (!load)
            load = scratch(L, (size_t)n * (size_t)p->workloads, sizeof *load);
        read_loads(L, list, n, load + (size_t)w * (size_t)n, "load");
    }
    p->load = load;
}

static const double *doubles_field(lua_State *L, int at, const char *key, int n) {
    if (!raw_field(L, at, key))
        return NULL;
    int list = lua_gettop(L);
    array_length(L, list, key, n, n);
    double *out = scratch(L, (size_t)n, sizeof *out);
    read_loads(L, list, n, out, key);
    return out;
}

static const int *ints_field(lua_State *L, int at, const char *key, int n, int least,
                             int most) {
    if (!raw_field(L, at, key))
        return NULL;
    int list = lua_gettop(L);
    array_length(L, list, key, n, n);
    return read_ints(L, list, n, least, most, key);
}

/* What it reads stays on the stack. */
static void read_problem(lua_State *L, int at, struct balance_problem *p) {
    luaL_checktype(L, at, LUA_TTABLE);
    luaL_checkstack(L, 32 + BALANCE_MAX_WORKLOADS, NULL);
    *p = (struct balance_problem){0};
    check_keys(L, at);
    read_problem_ints(L, at, p);
    read_problem_loads(L, at, p);
    int slots = p->ranks * p->slots_per_rank;
    p->weight = doubles_field(L, at, "weight", p->workloads);
    p->speed = doubles_field(L, at, "speed", p->ranks);
    p->capacity = ints_field(L, at, "capacity", p->ranks, 0, p->slots_per_rank);
    p->pin = ints_field(L, at, "pin", slots, -1, p->experts - 1);
    p->current = ints_field(L, at, "current", slots, -1, p->experts - 1);
    p->split = BALANCE_BALANCED;
    if (raw_field(L, at, "split")) {
        int split = -1;
        for (int i = 0; i < 3; i++)
            if (lua_type(L, -1) == LUA_TSTRING && !strcmp(lua_tostring(L, -1), split_names[i]))
                split = i;
        if (split < 0)
            luaL_error(L, "split: expected even, share or balanced");
        p->split = (enum balance_split)split;
    }
    const char *wrong = balance_check(p);
    if (wrong)
        luaL_error(L, "%s", wrong);
    sandbox_charge(L, (long long)slots * STEPS_PER_SLOT);
}

static void set_number(lua_State *L, const char *key, double x) {
    lua_pushnumber(L, x);
    lua_setfield(L, -2, key);
}

static void push_result(lua_State *L, const struct balance_result *r) {
    lua_newtable(L);
    set_number(L, "imbalance", r->imbalance);
    set_number(L, "imbalance_even", r->imbalance_even);
    set_number(L, "worst", r->worst);
    set_number(L, "bound", r->bound);
    lua_pushinteger(L, r->moved);
    lua_setfield(L, -2, "moved");
}

static int run_plan(lua_State *L, struct balance_problem *p) {
    int slots = p->ranks * p->slots_per_rank;
    int *out = scratch(L, (size_t)slots, sizeof *out);
    double *share = scratch(L, (size_t)slots, sizeof *share);
    struct balance_result r = {0};
    if (!balance_plan(p, out, share, &r))
        return luaL_error(L, "this problem has no placement");
    push_ints(L, out, slots);
    lua_createtable(L, slots, 0);
    for (int i = 0; i < slots; i++) {
        lua_pushnumber(L, share[i]);
        lua_rawseti(L, -2, i + 1);
    }
    push_result(L, &r);
    return 3;
}

/* moe.plan(problem) -> slots, shares, result */
static int plan(lua_State *L) {
    struct balance_problem p;
    lua_settop(L, 1);
    read_problem(L, 1, &p);
    return run_plan(L, &p);
}

static int *slots_argument(lua_State *L, int at, const struct balance_problem *p) {
    int n = p->ranks * p->slots_per_rank;
    array_length(L, at, "slots", n, n);
    int *slots = read_ints(L, at, n, -1, p->experts - 1, "slots");
    int *count = scratch(L, (size_t)p->experts, sizeof *count);
    for (int i = 0; i < n; i++)
        if (slots[i] >= 0)
            count[slots[i]]++;
    for (int e = 0; e < p->experts; e++)
        if (!count[e])
            luaL_error(L, "slots: expert %d has no slot", e);
    return slots;
}

/* moe.improve(problem, slots) -> slots, shares, result */
static int improve(lua_State *L) {
    struct balance_problem p;
    lua_settop(L, 2);
    read_problem(L, 1, &p);
    p.current = slots_argument(L, 2, &p);
    return run_plan(L, &p);
}

/* moe.imbalance(problem, slots [, shares]) -> result */
static int imbalance(lua_State *L) {
    struct balance_problem p;
    struct balance_result r = {0};
    double *share = NULL;
    lua_settop(L, 3);
    read_problem(L, 1, &p);
    int *slots = slots_argument(L, 2, &p), n = p.ranks * p.slots_per_rank;
    if (!lua_isnil(L, 3)) {
        array_length(L, 3, "shares", n, n);
        share = scratch(L, (size_t)n, sizeof *share);
        read_loads(L, 3, n, share, "shares");
    }
    balance_judge(&p, slots, share, &r, NULL);
    push_result(L, &r);
    return 1;
}

/* moe.bound(problem) -> number */
static int bound(lua_State *L) {
    struct balance_problem p;
    lua_settop(L, 1);
    read_problem(L, 1, &p);
    lua_pushnumber(L, balance_bound(&p));
    return 1;
}

void policy_lib_open(struct lua_State *L) {
    static const luaL_Reg functions[] = {
        {"bound", bound},
        {"deepseek", deepseek},
        {"imbalance", imbalance},
        {"improve", improve},
        {"place", place},
        {"plan", plan},
        {"replicate", replicate},
        {"trtllm_default", trtllm_default},
        {"trtllm_place", trtllm_place},
        {"trtllm_replicate", trtllm_replicate},
        {NULL, NULL},
    };
    luaL_newlib(L, functions);
}
