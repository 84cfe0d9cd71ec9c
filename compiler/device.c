#include "device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

bool say_error(const char *fmt, ...) {
    va_list args;
    fputs("moec: error: ", stderr);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    return false;
}

int say_usage(const char *text, bool help) {
    fputs(text, help ? stdout : stderr);
    return help ? 0 : 2;
}

bool option_int(const char *name, const char *text, long long min, long long max, int *out) {
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (errno || end == text || *end || v < min || v > max)
        return say_error("%s: expected a number from %lld to %lld, not '%s'", name, min, max,
                         text);
    *out = (int)v;
    return true;
}

bool option_double(const char *name, const char *text, double min, double max, double *out) {
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !(v >= min && v <= max))
        return say_error("%s: expected a number from %g to %g, not '%s'", name, min, max, text);
    *out = v;
    return true;
}

bool option_device(const char *text, const char **out) {
    *out = text;
    return !strcmp(text, "host") || !strcmp(text, "cuda") ||
           say_error("--device: expected host or cuda, not '%s'", text);
}

bool option_list(const char *name, const char *text, int min, int *list, int max, int *n) {
    char *copy = strdup(text), *rest = *text ? copy : NULL;
    bool ok = copy != NULL;
    for (char *w; ok && (w = strsep(&rest, ","));)
        ok = *n < max ? option_int(name, w, min, 1 << 22, &list[(*n)++])
                      : say_error("%s: at most %d numbers", name, max);
    free(copy);
    return ok && (*n > 0 || say_error("%s: expected a list such as 1,7,64", name));
}

bool session_ok(moert_result r, const char *what) {
    if (r == MOERT_OK)
        return true;
    const char *text = moert_last_error();
    if (strstr(text, what)) /* it says where already */
        return say_error("%s", text);
    return say_error("%s: %s", what, *text ? text : moert_result_text(r));
}

static void close_ranks(struct session *s) {
    for (int r = 0; r < MOE_MAX_RANKS; r++) {
        moert_context_destroy(s->rank[r]);
        s->rank[r] = NULL;
    }
    moert_world_destroy(s->world);
    s->world = NULL;
}

/* The contexts of all ranks; world NULL: one alone. */
static moert_result make_ranks(struct session *s, bool cuda, int ranks) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    moert_world_config world = MOERT_WORLD_CONFIG_INIT;
    moert_result r = MOERT_OK;
    world.ranks = ranks;
    if (ranks > 1)
        r = moert_world_local(&world, &s->world);
    cfg.device = cuda ? MOERT_CUDA_DEVICE : MOERT_HOST;
    cfg.world = s->world;
    s->cuda = cuda;
    for (int i = 0; r == MOERT_OK && i < ranks; i++) {
        cfg.rank = i;
        r = moert_context_create(s->bundle, &cfg, &s->rank[i]);
    }
    if (r == MOERT_OK && ranks > 1)
        r = moert_world_connect(s->world);
    if (r != MOERT_OK)
        close_ranks(s);
    s->context = s->rank[0];
    return r;
}

bool session_open(struct session *s, const char *dir, const char *device, bool ranks) {
    *s = (struct session){0};
    if (!session_ok(moert_bundle_open(dir, &s->bundle), dir))
        return false;
    const struct moe_plan_class *c =
        moert_tool_class(s->bundle, moert_bundle_layer(s->bundle, 0));
    int n = ranks && c ? c->ranks : 1;
    moert_result r = make_ranks(s, !device || !strcmp(device, "cuda"), n);
    if (r == MOERT_NO_DEVICE && !device)
        r = make_ranks(s, false, n);
    if (!session_ok(r, s->cuda ? "GPU" : "host")) {
        session_close(s);
        return false;
    }
    moert_tool_device(s->context, &s->device);
    return true;
}

void session_close(struct session *s) {
    close_ranks(s);
    moert_bundle_close(s->bundle);
    *s = (struct session){0};
}

bool session_has_layer(const struct session *s, int layer) {
    if (moert_tool_class(s->bundle, layer))
        return true;
    struct arena a = {0};
    int n = moert_bundle_num_layers(s->bundle), *layers = arena_array(&a, int, n);
    for (int i = 0; i < n; i++)
        layers[i] = moert_bundle_layer(s->bundle, i);
    say_error("layer %d is no MoE layer of this bundle; those are %s", layer,
              layer_ranges(&a, layers, n));
    arena_free(&a);
    return false;
}

moert_layer *session_layer(struct session *s, int rank, int layer, const char *weights,
                           unsigned long long seed) {
    moert_layer *l = NULL;
    if (!session_has_layer(s, layer) ||
        !session_ok(moert_layer_create(s->rank[rank], layer, &l), "layer"))
        return NULL;
    moert_result r = weights ? moert_layer_load(l, weights) : moert_layer_random(l, seed);
    if (session_ok(r, weights ? weights : "random weights"))
        return l;
    moert_layer_destroy(l);
    return NULL;
}

bool session_first_of_class(const struct session *s, int i) {
    const struct moe_plan_class *c =
        moert_tool_class(s->bundle, moert_bundle_layer(s->bundle, i));
    for (int j = 0; j < i; j++)
        if (moert_tool_class(s->bundle, moert_bundle_layer(s->bundle, j)) == c)
            return false;
    return true;
}

/* ---- what a bundle was planned for ---- */

/* plan.bin's sections; moert_bundle_open has checked every index. */
static void point_at_sections(struct plan *p, char *data) {
    const struct moe_plan_header *h = (const struct moe_plan_header *)data;
    void *array[MOE_SECTION_COUNT] = {&p->classes, &p->layers,  &p->tables,  &p->targets,
                                      &p->kernels, &p->buffers, &p->buckets, &p->launches,
                                      &p->strings, &p->balance, &p->pins,    &p->forbidden,
                                      &p->weights, &p->ranks,   &p->maps};
    for (int s = 0; s < MOE_SECTION_COUNT; s++) {
        char *section = data + h->sections[s].offset;
        memcpy(array[s], &section, sizeof section);
        p->count[s] = h->sections[s].count;
    }
}

bool bundle_plan(struct arena *a, const char *dir, struct plan *p) {
    moert_bundle *b = NULL;
    char *data;
    size_t len;
    bool ok = session_ok(moert_bundle_open(dir, &b), dir);
    moert_bundle_close(b);
    if (!ok)
        return false;
    const char *path = path_join(a, dir, "plan.bin");
    if (file_read(a, path, (size_t)1 << 31, &data, &len))
        return say_error("%s cannot be read", path);
    *p = (struct plan){.arena = a};
    point_at_sections(p, data);
    return true;
}

struct cluster *bundle_cluster(struct arena *a, struct diags *d, struct node *root) {
    static const char *const keys[] = {"ranks", "ranks_per_node", "nvlink_domain"};
    struct node *map = root->kind == NODE_MAP ? map_get(root, "cluster") : NULL;
    struct node *gpu = map && map->kind == NODE_MAP ? map_get(map, "gpu") : NULL;
    struct node *speed = gpu ? map_get(map, "rank_speed") : NULL;
    bool named = gpu && gpu->kind == NODE_SCALAR && !node_is_null(gpu);
    struct buf text = {.arena = a};
    if (!named && !speed)
        return cluster_default(a);
    buf_printf(&text, "gpu: ");
    buf_json_string(&text, gpu->text);
    if (!named)
        text.len = 0;
    for (int i = 0; speed && i < speed->count; i++)
        buf_printf(&text, "%s%s%s", i ? ", " : "\nrank_speed: [", speed->items[i]->text,
                   i == speed->count - 1 ? "]" : "");
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        struct node *n = map_get(map, keys[i]);
        if (n && n->kind == NODE_SCALAR)
            buf_printf(&text, "\n%s: %s", keys[i], n->text);
    }
    struct node *n = yaml_parse(a, d, "plan.yaml", text.data, text.len);
    return n ? cluster_read(a, d, n) : NULL;
}
