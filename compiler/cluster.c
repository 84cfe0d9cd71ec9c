/* The machines: a cluster file or an inline map, and the GPU table behind it. */
#include "moec.h"

#include <string.h>
#include <unistd.h>

static const double slowest = 1e-3, fastest = 1e3; /* of relative speeds */
enum { MAX_RANKS = 1024, MAX_SMS = 4096, RANKS_PER_NODE = 8, MAX_RANK_SLOTS = 1024 };

#define KEY(name, ...) #name,
#define GPU_KEYS "target", "sms", "nvlink_domain", "ranks_per_node", CLUSTER_FIGURES(KEY)
#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

struct reader {
    struct arena *arena;
    struct diags *diags;
    struct cluster *c;
};

static void read_int(struct reader *r, struct node *map, const char *key, int max, int *out) {
    struct node *n = map_get(map, key);
    if (n)
        node_int(r->diags, n, key, 1, max, out);
}

/* What the GPU table and a cluster both may say. */
static void read_figures(struct reader *r, struct node *map) {
    struct node *n;
    read_int(r, map, "sms", MAX_SMS, &r->c->sms);
    read_int(r, map, "nvlink_domain", MAX_RANKS, &r->c->nvlink_domain);
    read_int(r, map, "ranks_per_node", MAX_RANKS, &r->c->ranks_per_node);
#define X(name, least, most) \
    if ((n = map_get(map, #name))) \
        node_double(r->diags, n, #name, least, most, &r->c->name);
    CLUSTER_FIGURES(X)
#undef X
}

/* ---- the GPU table ---- */

extern const char embed_gpus_yaml[], embed_gpus_yaml_end[];

static struct node *table_beside(struct reader *r, const struct node *cluster) {
    const char *dir = path_dir(r->arena, cluster->loc.source->path);
    const char *path = path_join(r->arena, dir, "gpus.yaml");
    return access(path, F_OK) ? NULL : yaml_read(r->arena, r->diags, path);
}

static struct node *table_built_in(struct reader *r) {
    return yaml_parse(r->arena, r->diags, "plans/clusters/gpus.yaml (built in)",
                      embed_gpus_yaml, (size_t)(embed_gpus_yaml_end - embed_gpus_yaml));
}

static void read_gpu(struct reader *r, struct node *gpu, const char *name) {
    static const char *const legal[] = {GPU_KEYS};
    int target;
    if (!node_kind_is(r->diags, gpu, name, NODE_MAP))
        return;
    struct node *n = map_get(gpu, "target");
    if (!n)
        diag_error(r->diags, gpu->loc, "GPU %s: missing key 'target'", name);
    else if (node_enum(r->diags, n, "target", target_names, MOE_TARGET_HOST, &target))
        r->c->target = target;
    read_figures(r, gpu);
    map_unused(r->diags, gpu, arena_printf(r->arena, "GPU %s", name), legal, COUNT(legal));
}

static void unknown_gpu(struct reader *r, const struct node *n, struct node *const tables[2]) {
    struct buf known = {.arena = r->arena};
    int count = (tables[0] ? tables[0]->count : 0) + (tables[1] ? tables[1]->count : 0), k = 0;
    const char **names = arena_array(r->arena, const char *, count);
    for (int t = 0; t < 2; t++)
        for (int i = 0; tables[t] && i < tables[t]->count; i++) {
            names[k++] = tables[t]->keys[i]->text;
            buf_printf(&known, "%s%s", k == 1 ? "" : ", ", names[k - 1]);
        }
    const char *near = nearest(n->text, names, count);
    if (near)
        diag_error(r->diags, n->loc, "unknown GPU '%.60s'; did you mean '%s'?", n->text, near);
    else
        diag_error(r->diags, n->loc,
                   "unknown GPU '%.60s'; known are %s (a gpus.yaml beside this file adds more)",
                   n->text, known.data);
}

static void find_gpu(struct reader *r, struct node *n) {
    struct node *tables[2] = {NULL, NULL}, *gpu = NULL;
    if (!node_string(r->diags, n, "gpu", &r->c->gpu))
        return;
    for (int t = 0; t < 2 && !gpu; t++) {
        int before = r->diags->errors;
        tables[t] = t ? table_built_in(r) : table_beside(r, n);
        if (tables[t] && node_kind_is(r->diags, tables[t], "a GPU table", NODE_MAP))
            gpu = map_get(tables[t], r->c->gpu);
        if (r->diags->errors != before)
            return;
    }
    if (gpu)
        read_gpu(r, gpu, r->c->gpu);
    else
        unknown_gpu(r, n, tables);
}

/* ---- the cluster ---- */

static int largest_divisor(int n, int most) {
    int divisor = most < n ? most : n;
    while (n % divisor)
        divisor--;
    return divisor;
}

static void check_nodes(struct reader *r, struct node *map) {
    struct cluster *c = r->c;
    struct node *per_node = map_get(map, "ranks_per_node"),
                *domain = map_get(map, "nvlink_domain");
    if (per_node && c->ranks > c->ranks_per_node && c->ranks % c->ranks_per_node) {
        diag_error(r->diags, per_node->loc, "ranks_per_node: %d does not divide %d ranks",
                   c->ranks_per_node, c->ranks);
        if (c->ranks_loc.source)
            diag_add(r->diags, DIAG_NOTE, c->ranks_loc, "ranks is set here");
    } else if (!per_node) {
        c->ranks_per_node = largest_divisor(c->ranks, c->ranks_per_node);
    }
    if (domain && c->nvlink_domain % c->ranks_per_node && c->ranks_per_node % c->nvlink_domain)
        diag_error(r->diags, domain->loc,
                   "nvlink_domain: %d is neither whole nodes nor whole parts of a node of %d "
                   "ranks",
                   c->nvlink_domain, c->ranks_per_node);
}

/* A list with an item for every rank, or NULL. */
static struct node *rank_list(struct reader *r, struct node *map, const char *key,
                              struct loc *at) {
    struct node *n = map_get(map, key);
    const struct cluster *c = r->c;
    if (!n || !node_kind_is(r->diags, n, key, NODE_LIST))
        return NULL;
    *at = n->loc;
    if (n->count == c->ranks)
        return n;
    diag_error(r->diags, n->loc, "%s: %d number%s for %d ranks", key, n->count,
               n->count == 1 ? "" : "s", c->ranks);
    if (c->ranks_loc.source)
        diag_add(r->diags, DIAG_NOTE, c->ranks_loc, "ranks is set here");
    return NULL;
}

static double *rank_numbers(struct reader *r, struct node *map, const char *key, double least,
                            double most, struct loc *at) {
    struct node *n = rank_list(r, map, key, at);
    double *out = n ? arena_array(r->arena, double, n->count) : NULL;
    for (int i = 0; n && i < n->count; i++)
        node_double(r->diags, n->items[i], key, least, most, &out[i]);
    return out;
}

static int *rank_counts(struct reader *r, struct node *map, const char *key, int most,
                        struct loc *at) {
    struct node *n = rank_list(r, map, key, at);
    int *out = n ? arena_array(r->arena, int, n->count) : NULL;
    for (int i = 0; n && i < n->count; i++)
        node_int(r->diags, n->items[i], key, 0, most, &out[i]);
    return out;
}

/* What the ranks do not have in common. */
static void read_differences(struct reader *r, struct node *map) {
    struct cluster *c = r->c;
    c->rank_speed = rank_numbers(r, map, "rank_speed", slowest, fastest, &c->rank_speed_loc);
    c->rank_memory_gb = rank_numbers(r, map, "rank_memory_gb", 0.001, 1e5, &c->rank_memory_loc);
    c->rank_slots = rank_counts(r, map, "rank_slots", MAX_RANK_SLOTS, &c->rank_slots_loc);
}

/* A file's name without its folder and its ending. */
static const char *stem(struct arena *a, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const char *dot = strrchr(name, '.');
    return arena_printf(a, "%.*s",
                        (int)(dot && dot > name ? (size_t)(dot - name) : strlen(name)), name);
}

static void read_cluster(struct reader *r, struct node *map) {
    static const char *const legal[] = {"name",           "gpu",
                                        "ranks",          "sms",
                                        "ranks_per_node", CLUSTER_FIGURES(KEY) "nvlink_domain",
                                        "rank_speed",     "rank_memory_gb",
                                        "rank_slots"};
    struct cluster *c = r->c;
    struct node *n = map_get(map, "name");
    if (n)
        node_string(r->diags, n, "name", &c->name);
    if ((n = map_get(map, "gpu")))
        find_gpu(r, n);
    if ((n = map_get(map, "ranks")) && node_int(r->diags, n, "ranks", 1, MAX_RANKS, &c->ranks))
        c->ranks_loc = n->loc;
    read_figures(r, map);
    read_differences(r, map);
    map_unused(r->diags, map, "cluster", legal, COUNT(legal));
    if (!c->name)
        c->name = arena_printf(r->arena, "%s-%d", c->gpu ? c->gpu : "ranks", c->ranks);
}

struct cluster *cluster_default(struct arena *a) {
    struct cluster *c = arena_array(a, struct cluster, 1);
    c->name = "one-rank";
    c->ranks = c->ranks_per_node = c->nvlink_domain = 1;
    return c;
}

struct cluster *cluster_read(struct arena *a, struct diags *d, struct node *n) {
    int before = d->errors;
    struct cluster *c = arena_array(a, struct cluster, 1);
    struct reader r = {a, d, c};
    *c = (struct cluster){.ranks = 1, .ranks_per_node = RANKS_PER_NODE};
    c->loc = n->loc;
    if (n->kind == NODE_SCALAR) {
        const char *path = node_path(a, d, n, "cluster");
        if (!path || !(n = yaml_read(a, d, path)))
            return NULL;
        c->name = stem(a, path);
    }
    if (!node_kind_is(d, n, "cluster", NODE_MAP))
        return NULL;
    read_cluster(&r, n);
    if (d->errors == before)
        check_nodes(&r, n);
    if (!c->nvlink_domain)
        c->nvlink_domain = c->ranks_per_node;
    return d->errors == before ? c : NULL;
}

double cluster_tflops(const struct cluster *c, bool fp8) {
    return fp8 && c->fp8_tflops > 0 ? c->fp8_tflops : c->bf16_tflops;
}
