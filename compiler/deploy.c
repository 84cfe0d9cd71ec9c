/* The deployment: one file, the files it names and what the command line changes, checked against
 * each other. What this build cannot give is an error here, before any work is done. */
#include "balance.h"
#include "policy.h"

#include <limits.h>
#include <string.h>

enum { DEFAULT_TOKENS = 8192, MAX_TOKENS = 4 << 20, MAX_SLOTS = 1 << 20, MAX_UPDATES = 4096 };

const char *const dispatch_names[MOE_DISPATCH_COUNT] = {
#define X(name, spelling) spelling,
    MOE_DISPATCHES(X)
#undef X
};

/* Upstream's backends; the first two are the ones whose meaning moec has. */
static const char *const backend_names[] = {
    "WIDEEP",    "AUTO",    "CUTLASS", "CUTEDSL", "TRTLLM",           "DEEPGEMM",
    "DENSEGEMM", "VANILLA", "TRITON",  "MARLIN",  "MEGAMOE_DEEPGEMM", "MEGAMOE_CUTEDSL"};
enum { OWN_BACKENDS = 2 };

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

struct reader {
    struct arena *arena;
    struct diags *diags;
    struct deployment *dep;
    const struct overrides *overrides;
    struct node *root, *assignments; /* assignments NULL: not given; else a map or a path */
    struct loc num_slots;            /* where it was set */
    const struct node *keep_groups, *max_replicas, *max_per_node; /* NULL: not given */
};

/* ---- the command line's changes, put into the tree before it is read ---- */

static struct node *node_make(struct arena *a, enum node_kind kind, const char *source,
                              const char *text) {
    struct source *s = arena_array(a, struct source, 1);
    struct node *n = arena_array(a, struct node, 1);
    *s = (struct source){source, text, strlen(text)};
    *n = (struct node){.kind = kind, .loc = {s, 1, 1}, .text = text, .quoted = true};
    return n;
}

static struct node **item_of(struct node *map, const char *key) {
    for (int i = 0; i < map->count; i++)
        if (!strcmp(map->keys[i]->text, key))
            return &map->items[i];
    return NULL;
}

static void map_put(struct arena *a, struct node *map, struct node *key, struct node *value) {
    struct node **item = item_of(map, key->text);
    if (item) {
        *item = value;
        return;
    }
    struct node **keys = arena_array(a, struct node *, map->count + 1);
    struct node **items = arena_array(a, struct node *, map->count + 1);
    for (int i = 0; i < map->count; i++) {
        keys[i] = map->keys[i];
        items[i] = map->items[i];
    }
    keys[map->count] = key;
    items[map->count++] = value;
    map->keys = keys;
    map->items = items;
}

/* The map under a key: made when absent, read from its file when the value names one. */
static struct node *map_enter(struct reader *r, struct node *map, struct node *key) {
    struct node **item = item_of(map, key->text), *n = item ? *item : NULL;
    if (!n || node_is_null(n)) {
        n = node_make(r->arena, NODE_MAP, key->loc.source->path, key->loc.source->text);
        map_put(r->arena, map, key, n);
    } else if (n->kind == NODE_SCALAR &&
               (!strcmp(key->text, "cluster") || !strcmp(key->text, "load_balancer"))) {
        const char *path = node_path(r->arena, r->diags, n, key->text);
        if (!path || !(n = yaml_read(r->arena, r->diags, path)))
            return NULL;
        *item = n;
    }
    if (n->kind == NODE_MAP)
        return n;
    diag_error(r->diags, key->loc, "'%s' is no map, so nothing in it can be set", key->text);
    return NULL;
}

/* A value from the command line at or below n, or NULL. */
static const struct node *override_in(const struct node *n) {
    if (!strncmp(n->loc.source->path, "--", 2))
        return n;
    for (int i = 0; i < n->count; i++) {
        const struct node *found = override_in(n->items[i]);
        if (found)
            return found;
    }
    return NULL;
}

/* The command line may change the file, but not itself. */
static void put_once(struct reader *r, struct node *map, struct node *key, struct node *value) {
    struct node **item = item_of(map, key->text);
    const struct node *first = item ? override_in(*item) : NULL;
    map_put(r->arena, map, key, value);
    if (!first)
        return;
    diag_error(r->diags, value->loc, "the command line sets '%s' twice", key->text);
    diag_add(r->diags, DIAG_NOTE, first->loc, "first set here");
}

/* Sets a dotted key. source is what diagnostics call the place. */
static void put(struct reader *r, const char *source, const char *dotted, struct node *value) {
    struct node *map = r->root;
    char *rest = arena_strdup(r->arena, dotted);
    for (char *part; map && (part = strsep(&rest, "."));) {
        struct node *key = node_make(r->arena, NODE_SCALAR, source, value->loc.source->text);
        key->text = part;
        if (rest)
            map = map_enter(r, map, key);
        else
            put_once(r, map, key, value);
    }
}

static void put_yaml(struct reader *r, const char *source, const char *dotted,
                     const char *text) {
    struct node *value = yaml_parse(r->arena, r->diags, source, text, strlen(text));
    if (value)
        put(r, source, dotted, value);
}

static void put_set(struct reader *r, const char *set) {
    const char *equals = strchr(set, '=');
    if (!equals || equals == set || !equals[1]) {
        diag_error(r->diags, (struct loc){0}, "--set %s: expected key=value", set);
        return;
    }
    const char *key = arena_printf(r->arena, "%.*s", (int)(equals - set), set);
    put_yaml(r, arena_printf(r->arena, "--set %s", key), key, equals + 1);
}

static void apply_overrides(struct reader *r, const struct overrides *o) {
    if (o->model)
        put(r, "--model", "model", node_make(r->arena, NODE_SCALAR, "--model", o->model));
    if (o->policy)
        put(r, "--policy", "policy", node_make(r->arena, NODE_SCALAR, "--policy", o->policy));
    if (o->targets)
        put_yaml(r, "--target", "target", arena_printf(r->arena, "[%s]", o->targets));
    for (int i = 0; i < o->num_set; i++)
        put_set(r, o->set[i]);
    if (o->ep) /* after --set cluster=FILE */
        put_yaml(r, "--ep", "cluster.ranks", arena_printf(r->arena, "%d", o->ep));
}

/* ---- keys of other tools whose meaning moec knows and does not give ---- */

static void refuse_foreign(struct reader *r, struct node *map) {
    static const char tensor[] = "tensor parallelism inside an expert is out of scope; experts "
                                 "are spread over the ranks of 'cluster'";
    static const char ranks[] = "the number of ranks is given by 'cluster: {ranks: N}' or by "
                                "--ep N";
    static const struct {
        const char *key, *why;
    } foreign[] = {
        {"tensor_parallel_size", tensor},      {"tp_size", tensor},
        {"moe_tensor_parallel_size", tensor},  {"moe_tp_size", tensor},
        {"moe_cluster_parallel_size", tensor}, {"moe_expert_parallel_size", ranks},
        {"expert_parallel_size", ranks},       {"moe_ep_size", ranks},
    };
    for (int i = 0; i < COUNT(foreign); i++)
        for (int k = 0; k < map->count; k++)
            if (!strcmp(map->keys[k]->text, foreign[i].key)) {
                map->items[k]->used = true;
                diag_error(r->diags, map->keys[k]->loc, "%s: %s", foreign[i].key,
                           foreign[i].why);
            }
}

/* ---- the parts ---- */

static void read_model(struct reader *r) {
    struct node *n = map_get(r->root, "model");
    if (r->dep->model) {
        if (n)
            diag_error(r->diags, n->loc, "%s is a model itself and takes no other",
                       r->dep->path);
        return;
    }
    if (!n) {
        diag_error(r->diags, r->root->loc,
                   "no model: add 'model: FILE' or give --model FILE on the command line");
    } else if (n->kind == NODE_MAP) {
        r->dep->model = model_is_config(n) ? model_import(r->arena, r->diags, n, NULL)
                                           : model_parse(r->arena, r->diags, n);
    } else {
        const char *path = node_path(r->arena, r->diags, n, "model");
        if (path)
            r->dep->model = model_read(r->arena, r->diags, path);
    }
}

static void read_cluster(struct reader *r) {
    struct node *n = map_get(r->root, "cluster");
    r->dep->cluster = n ? cluster_read(r->arena, r->diags, n) : cluster_default(r->arena);
}

static void read_target(struct reader *r, const struct node *n, struct loc first[]) {
    int target;
    if (!node_enum(r->diags, n, "target", target_names, MOE_TARGET_COUNT, &target))
        return;
    if (r->dep->targets[target]) {
        diag_error(r->diags, n->loc, "target: %s is named twice", target_names[target]);
        diag_add(r->diags, DIAG_NOTE, first[target], "first named here");
        return;
    }
    r->dep->targets[target] = true;
    first[target] = n->loc;
}

/* A name or a list. By default the cluster's GPU; without one, every target. */
static void read_targets(struct reader *r) {
    struct loc first[MOE_TARGET_COUNT];
    struct node *n = map_get(r->root, "target");
    const struct cluster *c = r->dep->cluster;
    for (int i = 0; !n && i < MOE_TARGET_COUNT; i++)
        r->dep->targets[i] = !c || !c->gpu || c->target == (enum moe_target)i;
    if (!n)
        return;
    if (n->kind != NODE_LIST)
        read_target(r, n, first);
    else if (!n->count)
        diag_error(r->diags, n->loc, "target: the list is empty");
    for (int i = 0; n->kind == NODE_LIST && i < n->count; i++)
        read_target(r, n->items[i], first);
}

static void read_backend(struct reader *r, const struct node *n) {
    int backend;
    if (!node_enum(r->diags, n, "backend", backend_names, COUNT(backend_names), &backend))
        return;
    if (backend >= OWN_BACKENDS)
        diag_add(r->diags, DIAG_NOTE, n->loc, "moec's own kernels serve backend %s",
                 backend_names[backend]);
}

static void read_ep_size(struct reader *r, const struct node *n) {
    const struct cluster *c = r->dep->cluster;
    int ranks;
    if (!node_int(r->diags, n, "ep_size", 1, INT_MAX, &ranks) || !c || ranks == c->ranks)
        return;
    diag_error(r->diags, n->loc, "ep_size: %d, but the cluster has %d ranks", ranks, c->ranks);
    if (c->ranks_loc.source)
        diag_add(r->diags, DIAG_NOTE, c->ranks_loc, "ranks is set here");
}

static void read_balancer(struct reader *r, struct node *n) {
    static const char *const legal[] = {"num_slots", "layer_updates_per_iter",
                                        "initial_global_assignments", "ep_size"};
    struct node *v;
    if (n->kind == NODE_SCALAR) {
        const char *path = node_path(r->arena, r->diags, n, "load_balancer");
        if (!path || !(n = yaml_read(r->arena, r->diags, path)))
            return;
    }
    if (!node_kind_is(r->diags, n, "load_balancer", NODE_MAP))
        return;
    if ((v = map_get(n, "num_slots")) && !node_is_null(v) &&
        node_int(r->diags, v, "num_slots", 1, MAX_SLOTS, &r->dep->num_slots))
        r->num_slots = v->loc;
    int *updates = &r->dep->layer_updates_per_iter;
    if ((v = map_get(n, "layer_updates_per_iter")) &&
        node_int(r->diags, v, "layer_updates_per_iter", 0, MAX_UPDATES, updates) && *updates)
        diag_error(r->diags, v->loc,
                   "layer_updates_per_iter: online balancing is not in this build; 0 keeps the "
                   "placement fixed");
    if ((v = map_get(n, "initial_global_assignments")) && !node_is_null(v) &&
        (v->kind == NODE_SCALAR ||
         node_kind_is(r->diags, v, "initial_global_assignments", NODE_MAP)))
        r->assignments = v;
    if ((v = map_get(n, "ep_size")))
        read_ep_size(r, v);
    map_unused(r->diags, n, "load_balancer", legal, COUNT(legal));
}

/* Upstream's None is null here: as if the key were absent. */
static struct node *get_value(struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    return n && !node_is_null(n) ? n : NULL;
}

static void read_moe_config(struct reader *r) {
    static const char *const legal[] = {"backend", "max_num_tokens", "load_balancer",
                                        "use_low_precision_moe_combine",
                                        "disable_finalize_fusion"};
    struct node *map = map_get(r->root, "moe_config"), *n;
    bool low_precision;
    if (!map || !node_kind_is(r->diags, map, "moe_config", NODE_MAP))
        return;
    refuse_foreign(r, map);
    if ((n = map_get(map, "backend")))
        read_backend(r, n);
    if ((n = get_value(map, "max_num_tokens")))
        node_int(r->diags, n, "max_num_tokens", 1, MAX_TOKENS, &r->dep->max_num_tokens);
    if ((n = get_value(map, "load_balancer")))
        read_balancer(r, n);
    if ((n = map_get(map, "use_low_precision_moe_combine")) &&
        node_bool(r->diags, n, "use_low_precision_moe_combine", &low_precision) &&
        low_precision)
        diag_error(r->diags, n->loc,
                   "use_low_precision_moe_combine: a low-precision combine is not in this "
                   "build; only false is possible");
    if ((n = map_get(map, "disable_finalize_fusion")))
        node_bool(r->diags, n, "disable_finalize_fusion", &r->dep->deterministic_combine);
    map_unused(r->diags, map, "moe_config", legal, COUNT(legal));
}

/* A shipped policy's name, or a path to a Lua file: with a slash or ending in .lua. */
static void read_policy(struct reader *r) {
    struct node *n = map_get(r->root, "policy");
    struct deployment *dep = r->dep;
    int policy, shipped = 0;
    while (policy_shipped[shipped])
        shipped++;
    dep->policy = policy_shipped[0];
    if (!n)
        return;
    dep->policy_loc = n->loc;
    if (n->kind == NODE_SCALAR && (strchr(n->text, '/') || strstr(n->text, ".lua"))) {
        dep->policy = n->text;
        dep->policy_path = node_path(r->arena, r->diags, n, "policy");
    } else if (node_enum(r->diags, n, "policy", policy_shipped, shipped, &policy)) {
        dep->policy = policy_shipped[policy];
    }
}

static void read_dispatch(struct reader *r) {
    struct node *n = map_get(r->root, "dispatch");
    int dispatch = DISPATCH_BALANCED;
    if (n)
        node_enum(r->diags, n, "dispatch", dispatch_names, COUNT(dispatch_names), &dispatch);
    r->dep->dispatch = (enum dispatch)dispatch;
}

static void read_limits(struct reader *r) {
    static const char *const legal[] = {"keep_groups_in_nodes", "cross_node_slots",
                                        "max_replicas", "max_replicas_per_node"};
    struct node *map = map_get(r->root, "placement"), *n, *cross;
    struct placement_limits *l = &r->dep->limits;
    if (!map || !node_kind_is(r->diags, map, "placement", NODE_MAP))
        return;
    l->loc = map->loc;
    if ((n = map_get(map, legal[0])))
        node_bool(r->diags, r->keep_groups = n, legal[0], &l->keep_groups_in_nodes);
    if ((cross = map_get(map, legal[1])))
        node_int(r->diags, cross, legal[1], 0, MAX_SLOTS, &l->cross_node_slots);
    if ((n = map_get(map, legal[2])))
        node_int(r->diags, r->max_replicas = n, legal[2], 1, BALANCE_MAX_RANKS,
                 &l->max_replicas);
    if ((n = map_get(map, legal[3])))
        node_int(r->diags, r->max_per_node = n, legal[3], 1, BALANCE_MAX_RANKS,
                 &l->max_replicas_per_node);
    if (cross && !l->keep_groups_in_nodes) {
        diag_error(
            r->diags, cross->loc,
            "cross_node_slots is a budget of exceptions to keep_groups_in_nodes, which is "
            "not on");
        if (r->keep_groups)
            diag_add(r->diags, DIAG_NOTE, r->keep_groups->loc, "it is false here");
    }
    map_unused(r->diags, map, "placement", legal, COUNT(legal));
}

/* ---- one part against another ---- */

static void note_ranks(struct reader *r) {
    const struct cluster *c = r->dep->cluster;
    if (c->ranks_loc.source)
        diag_add(r->diags, DIAG_NOTE, c->ranks_loc, "ranks is %d", c->ranks);
    else
        diag_add(r->diags, DIAG_NOTE, r->root->loc,
                 "no cluster with ranks is given here, which makes one rank");
}

/* num_slots runs from the experts to ranks x experts and is divisible by the ranks. */
static void check_slots(struct reader *r) {
    const struct model *m = r->dep->model;
    int ranks = r->dep->cluster->ranks, slots = r->dep->num_slots, experts = m->num_experts;
    int least = (experts + ranks - 1) / ranks * ranks, most = ranks * experts;
    int below = slots / ranks * ranks, above = below + ranks;
    if (!slots)
        return;
    if (slots < experts) {
        diag_error(r->diags, r->num_slots,
                   "num_slots: %d slots cannot hold %d experts; the least is %d", slots,
                   experts, least);
        diag_add(r->diags, DIAG_NOTE, m->at.num_experts, "num_experts is %d", experts);
    } else if (slots > most) {
        diag_error(r->diags, r->num_slots,
                   "num_slots: %d is more than every expert on every rank (%d x %d); the most "
                   "is %d",
                   slots, ranks, experts, most);
        note_ranks(r);
    } else if (slots % ranks) {
        const char *nearest_legal =
            below < least  ? arena_printf(r->arena, "value is %d", above)
            : above > most ? arena_printf(r->arena, "value is %d", below)
                           : arena_printf(r->arena, "values are %d and %d", below, above);
        diag_error(r->diags, r->num_slots,
                   "num_slots: %d is not divisible by %d ranks; the nearest legal %s", slots,
                   ranks, nearest_legal);
        note_ranks(r);
    }
}

static void note_slots(struct reader *r) {
    if (r->num_slots.source)
        diag_add(r->diags, DIAG_NOTE, r->num_slots, "num_slots is %d, %d for each rank",
                 r->dep->num_slots, deployment_slots(r->dep));
    else
        diag_add(r->diags, DIAG_NOTE, r->dep->model->at.num_experts,
                 "num_slots is not given, so each rank has %d for %d experts",
                 deployment_slots(r->dep), r->dep->model->num_experts);
}

static void check_rank_slots(struct reader *r) {
    const struct cluster *c = r->dep->cluster;
    int S = deployment_slots(r->dep), sum = 0;
    for (int i = 0; c->rank_slots && i < c->ranks; i++) {
        sum += c->rank_slots[i];
        if (c->rank_slots[i] <= S)
            continue;
        diag_error(r->diags, c->rank_slots_loc, "rank_slots: %d of rank %d, which has %d slots",
                   c->rank_slots[i], i, S);
        note_slots(r);
        return;
    }
    if (!c->rank_slots || sum >= r->dep->model->num_experts)
        return;
    diag_error(r->diags, c->rank_slots_loc,
               "rank_slots: %d slots in all cannot hold %d experts", sum,
               r->dep->model->num_experts);
    note_slots(r);
}

/* The model's groups over the cluster's nodes. */
static void check_nodes(struct reader *r) {
    const struct model *m = r->dep->model;
    const struct cluster *c = r->dep->cluster;
    int groups = m->router.n_group;
    int nodes = c->ranks > c->ranks_per_node ? c->ranks / c->ranks_per_node : 1;
    if (!r->dep->limits.keep_groups_in_nodes)
        return;
    if (groups > 1 && groups % nodes == 0)
        return;
    if (groups > 1)
        diag_error(
            r->diags, r->keep_groups->loc,
            "keep_groups_in_nodes: %d groups of experts do not divide over %d nodes of %d "
            "ranks",
            groups, nodes, c->ranks_per_node);
    else
        diag_error(r->diags, r->keep_groups->loc,
                   "keep_groups_in_nodes: the router of %s has no groups of experts", m->name);
    if (groups > 1 && c->ranks_loc.source)
        diag_add(r->diags, DIAG_NOTE, c->ranks_loc, "ranks is %d", c->ranks);
    diag_add(r->diags, DIAG_NOTE, m->at.num_experts, "the model has n_group: %d", groups);
}

/* Slots that a limit on replicas would leave empty. */
static void check_replicas(struct reader *r, const struct node *at, const char *key, int most) {
    const struct deployment *dep = r->dep;
    if (!at || !dep->num_slots || (long long)most * dep->model->num_experts >= dep->num_slots)
        return;
    diag_error(r->diags, at->loc, "%s: %d experts then fill %d slots at most", key,
               dep->model->num_experts, most * dep->model->num_experts);
    note_slots(r);
}

/* What is left is the engine's to say; it is the same for all layers. */
static void check_limits(struct reader *r) {
    const struct deployment *dep = r->dep;
    const struct cluster *c = dep->cluster;
    const struct placement_limits *l = &dep->limits;
    int before = r->diags->errors;
    bool home = l->keep_groups_in_nodes && !l->cross_node_slots;
    int nodes = home || c->ranks <= c->ranks_per_node ? 1 : c->ranks / c->ranks_per_node;
    check_rank_slots(r);
    check_nodes(r);
    check_replicas(r, r->max_replicas, "max_replicas", l->max_replicas);
    check_replicas(r, r->max_per_node, "max_replicas_per_node",
                   l->max_replicas_per_node * nodes);
    if (r->diags->errors != before || !place_limited(dep))
        return;
    struct balance_problem b = {.experts = dep->model->num_experts,
                                .ranks = c->ranks,
                                .slots_per_rank = deployment_slots(dep),
                                .moves = -1};
    place_limits(dep, &b);
    const char *wrong = balance_check(&b);
    if (!wrong)
        return;
    diag_error(r->diags, c->rank_slots ? c->rank_slots_loc : l->loc, "%s", wrong);
    if (c->rank_slots && l->loc.source)
        diag_add(r->diags, DIAG_NOTE, l->loc, "placement is limited here");
}

/* ---- placements that were made before ---- */

/* A map, or the path of a file in any of the forms that assign.c knows. */
static void read_assignments(struct reader *r, struct assign_context *c) {
    struct deployment *dep = r->dep;
    const char *path;
    if (r->assignments->kind == NODE_SCALAR) {
        path = node_path(r->arena, r->diags, r->assignments, "initial_global_assignments");
        if (path)
            assign_file(c, path, &dep->assignments, &dep->num_assignments);
    } else if (!dep->num_slots) {
        diag_error(r->diags, r->assignments->loc,
                   "initial_global_assignments: num_slots must be given");
    } else {
        assign_map(c, r->assignments, &dep->assignments, &dep->num_assignments);
    }
}

/* --start takes the place of given assignments; --moves alone starts from them. */
static void read_placements(struct reader *r) {
    struct deployment *dep = r->dep;
    const struct overrides *o = r->overrides;
    struct assign_context c = {r->arena,     r->diags,       dep->model,
                               dep->cluster, dep->num_slots, r->num_slots};
    dep->moves = o->improve ? o->moves : -1;
    if (o->start) {
        assign_file(&c, o->start, &dep->start, &dep->num_start);
    } else if (r->assignments) {
        read_assignments(r, &c);
    }
    if (o->improve && !o->start && !r->assignments)
        diag_error(r->diags, (struct loc){0},
                   "--moves: nothing to start from; give --start FILE or "
                   "initial_global_assignments");
    if (o->improve && !o->start) {
        dep->start = dep->assignments;
        dep->num_start = dep->num_assignments;
        dep->num_assignments = 0;
    }
    dep->num_slots = c.num_slots;
    r->num_slots = c.slots;
}

int deployment_slots(const struct deployment *dep) {
    int ranks = dep->cluster->ranks;
    int slots = dep->num_slots ? dep->num_slots : dep->model->num_experts;
    return (slots + ranks - 1) / ranks;
}

/* ---- recorded loads ---- */

/* One item of `loads`: an input, the iterations to take of it and how much it weighs. */
struct load_input {
    const char *path;
    struct loc loc;
    bool weighs;
    double weight;
    struct loads_options options;
};

static bool read_iteration(struct reader *r, struct node *map, const char *key,
                           long long *out) {
    struct node *n = map_get(map, key);
    int v;
    if (!n)
        return true;
    if (!node_int(r->diags, n, key, 0, INT_MAX, &v))
        return false;
    *out = v;
    return true;
}

/* The placement that served while the loads were recorded. */
static bool read_recorded_under(struct reader *r, struct node *n, struct loads_options *o) {
    struct assign_context c = {.arena = r->arena,
                               .diags = r->diags,
                               .model = r->dep->model,
                               .cluster = r->dep->cluster};
    struct assignment *list;
    const char *path = node_path(r->arena, r->diags, n, "placement");
    if (!path || !assign_file(&c, path, &list, &o->num_assignments))
        return false;
    o->assignments = list;
    o->num_slots = c.num_slots;
    return true;
}

static bool read_load_map(struct reader *r, struct node *map, struct load_input *in) {
    static const char *const legal[] = {"path", "weight", "iter_start", "iter_stop",
                                        "placement"};
    struct node *path = map_get(map, "path"), *n;
    bool ok = true;
    if (!path)
        diag_error(r->diags, map->loc, "an item of loads needs the key path");
    if ((n = map_get(map, "weight")))
        ok = in->weighs = node_double(r->diags, n, "weight", 0, 1e6, &in->weight);
    bool both = read_iteration(r, map, "iter_start", &in->options.iter_start);
    both = read_iteration(r, map, "iter_stop", &in->options.iter_stop) && both;
    ok = ok && both;
    if (both && (n = map_get(map, "iter_stop")) &&
        in->options.iter_stop <= in->options.iter_start) {
        diag_error(r->diags, n->loc, "iter_stop must be above iter_start (%lld)",
                   in->options.iter_start);
        ok = false;
    }
    if ((n = map_get(map, "placement")))
        ok = read_recorded_under(r, n, &in->options) && ok;
    ok = map_unused(r->diags, map, "an item of loads", legal, COUNT(legal)) && ok;
    if (!path || !node_string(r->diags, path, "path", &in->path))
        return false;
    in->loc = path->loc;
    return ok;
}

/* Counts of slots are told from counts of experts by their number, so the deployment's own
 * placement is offered only when it has replicas. */
static bool read_load_input(struct reader *r, struct node *n, struct load_input *in) {
    const struct deployment *dep = r->dep;
    bool started = dep->num_start > 0;
    *in = (struct load_input){.loc = n->loc, .weight = 1};
    if (dep->num_slots != dep->model->num_experts) {
        in->options.assignments = started ? dep->start : dep->assignments;
        in->options.num_assignments = started ? dep->num_start : dep->num_assignments;
        in->options.num_slots = dep->num_slots;
    }
    if (!(n->kind == NODE_MAP ? read_load_map(r, n, in)
                              : node_string(r->diags, n, "an item of loads", &in->path)))
        return false;
    in->path = path_join(r->arena, path_dir(r->arena, in->loc.source->path), in->path);
    return true;
}

/* The workloads of more inputs; all have the model's layers and experts. */
static void join_loads(struct arena *a, struct loads *to, const struct loads *more) {
    int n = to->num_workloads + more->num_workloads;
    struct workload *all = arena_array(a, struct workload, n);
    memcpy(all, to->workloads, sizeof *all * (size_t)to->num_workloads);
    memcpy(all + to->num_workloads, more->workloads, sizeof *all * (size_t)more->num_workloads);
    to->workloads = all;
    to->num_workloads = n;
}

static void add_loads(struct reader *r, struct node *n) {
    struct load_input in;
    if (!read_load_input(r, n, &in))
        return;
    struct loads *l =
        loads_read(r->arena, r->diags, &in.path, &in.loc, 1, r->dep->model, &in.options);
    for (int i = 0; l && in.weighs && i < l->num_workloads; i++)
        l->workloads[i].weight *= in.weight;
    if (l && r->dep->loads)
        join_loads(r->arena, r->dep->loads, l);
    else if (l)
        r->dep->loads = l;
}

/* A path, a map or a list of either. */
static void read_loads(struct reader *r) {
    struct node *n = map_get(r->root, "loads");
    double sum = 0;
    if (!n || node_is_null(n) || (n->kind == NODE_LIST && !n->count))
        return;
    for (int i = 0; n->kind == NODE_LIST && i < n->count; i++)
        add_loads(r, n->items[i]);
    if (n->kind != NODE_LIST)
        add_loads(r, n);
    const struct loads *l = r->dep->loads;
    for (int i = 0; l && i < l->num_workloads; i++)
        sum += l->workloads[i].weight;
    if (l && sum == 0)
        diag_error(r->diags, n->loc, "loads: the weight of every workload is 0");
}

/* ---- the whole ---- */

/* A model file or a config.json instead of a deployment. */
static bool is_model(struct node *root) {
    static const char *const keys[] = {"hidden_size", "num_experts", "num_hidden_layers"};
    if (item_of(root, "model") || item_of(root, "moe_config"))
        return false;
    for (int i = 0; i < COUNT(keys); i++)
        if (item_of(root, keys[i]))
            return true;
    return model_is_config(root);
}

static void read_deployment(struct reader *r) {
    static const char *const legal[] = {"model", "cluster", "target",   "moe_config",
                                        "loads", "policy",  "dispatch", "placement"};
    int before = r->diags->errors;
    refuse_foreign(r, r->root);
    read_model(r);
    read_cluster(r);
    read_targets(r);
    read_moe_config(r);
    read_policy(r);
    read_dispatch(r);
    read_limits(r);
    map_get(r->root, "loads"); /* read last: they must fit the rest */
    map_unused(r->diags, r->root, "the deployment", legal, COUNT(legal));
    if (r->diags->errors == before)
        check_slots(r);
    if (r->diags->errors == before) {
        int slots = r->dep->num_slots;
        read_placements(r);
        if (r->diags->errors == before && !slots)
            check_slots(r); /* those of the placement */
    }
    if (r->diags->errors == before)
        check_limits(r);
    if (r->diags->errors == before)
        read_loads(r);
}

struct deployment *deployment_read(struct arena *a, struct diags *d, const char *path,
                                   const struct overrides *o) {
    int before = d->errors;
    struct node *root = yaml_read(a, d, path);
    if (!root || !node_kind_is(d, root, "a deployment", NODE_MAP))
        return NULL;
    struct deployment *dep = arena_array(a, struct deployment, 1);
    struct reader r = {.arena = a, .diags = d, .dep = dep, .overrides = o, .root = root};
    dep->path = arena_strdup(a, path);
    dep->max_num_tokens = DEFAULT_TOKENS;
    dep->deterministic_combine = true;
    if (is_model(root)) {
        if (!(dep->model = model_read(a, d, path)))
            return NULL;
        r.root = arena_array(a, struct node, 1);
        *r.root = (struct node){.kind = NODE_MAP, .loc = root->loc};
    }
    apply_overrides(&r, o);
    if (d->errors == before)
        read_deployment(&r);
    return d->errors == before ? dep : NULL;
}
