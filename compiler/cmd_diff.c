/* moec diff: what moves when one placement takes another's place. */
#include "device.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char usage[] =
    "usage: moec diff A B [OPTION...]\n"
    "\n"
    "What moves when placement B takes the place of A: slots per layer and rank, bytes, an "
    "order in\n"
    "which weights can be streamed, imbalance before and after. A and B are each a bundle, a\n"
    "deployment or a placement as moec plan writes it or TensorRT-LLM, SGLang and vLLM have "
    "it.\n"
    "\n"
    "      --loads PATH       recorded loads; may be given again. Without, experts weigh the "
    "same\n"
    "      --model FILE       the model, when neither A nor B names it\n"
    "      --ep N             ranks, when neither A nor B says\n"
    "      --layer N          this layer's moves in order\n"
    "      --json             the result as JSON\n"
    "      --help\n";

enum { MAX_LOADS = 64 };

struct options {
    const char *path[2];
    const char *model;
    const char *loads[MAX_LOADS];
    int num_loads, ep, layer; /* -1: all */
    bool json;
};

/* One placement, whatever it came from. */
struct side {
    const char *path, *model_name; /* NULL: the file does not say */
    const struct model *model;     /* NULL: not known in full */
    const struct cluster *cluster; /* NULL: not known */
    int experts, ranks, slots_per_rank, num_layers;
    const int *layers;
    const int **slots;   /* [num_layers] of ranks * slots_per_rank */
    double slot_bytes;   /* 0: not known */
    struct loads *loads; /* a deployment's, or NULL */
};
struct diff {
    struct arena arena;
    struct diags diags;
    const struct options *o;
    struct side side[2];
    struct loads *loads;        /* or NULL */
    struct layer_moves *layers; /* of side[0].num_layers */
    int slots_per_rank;         /* the larger */
    double slot_bytes, us;      /* us: the rank that receives most; -1: not known */
    long long moves, received;
};

static bool parse(int argc, char **argv, struct options *o, int *code) {
    enum { LOADS = 256, MODEL, EP, LAYER, JSON };
    static const struct option longs[] = {{"loads", 1, 0, LOADS},
                                          {"model", 1, 0, MODEL},
                                          {"ep", 1, 0, EP},
                                          {"layer", 1, 0, LAYER},
                                          {"json", 0, 0, JSON},
                                          {"help", 0, 0, 'h'},
                                          {0}};
    int c;
    bool ok = true;
    *o = (struct options){.layer = -1};
    *code = 2;
    while (ok && (c = getopt_long(argc, argv, "h", longs, NULL)) != -1)
        switch (c) {
        case LOADS:
            ok = o->num_loads < MAX_LOADS || say_error("--loads: at most %d", MAX_LOADS);
            if (ok)
                o->loads[o->num_loads++] = optarg;
            break;
        case MODEL:
            o->model = optarg;
            break;
        case EP:
            ok = option_int("--ep", optarg, 1, 1 << 16, &o->ep);
            break;
        case LAYER:
            ok = option_int("--layer", optarg, 0, 1 << 20, &o->layer);
            break;
        case JSON:
            o->json = true;
            break;
        default:
            *code = say_usage(usage, c == 'h');
            return false;
        }
    if (ok && optind + 2 != argc)
        ok = say_usage(usage, false) == 0;
    for (int i = 0; ok && i < 2; i++)
        o->path[i] = argv[optind + i];
    return ok;
}

/* ---- reading ---- */

/* A plan's layers; its classes have equal shape. */
static void side_of_plan(struct diff *d, struct side *s, const struct plan *p) {
    const struct moe_plan_class *c = &p->classes[0];
    int n = (int)p->count[MOE_SECTION_LAYER], *layers = arena_array(&d->arena, int, n);
    s->experts = c->experts;
    s->ranks = c->ranks;
    s->slots_per_rank = c->slots_per_rank;
    s->slot_bytes = (double)c->slot_bytes;
    s->num_layers = n;
    s->slots = arena_array(&d->arena, const int *, n);
    for (int i = 0; i < n; i++) {
        layers[i] = p->layers[i].layer;
        s->slots[i] = p->tables + p->layers[i].expert_of_slot;
    }
    s->layers = layers;
}

static bool read_bundle(struct diff *d, struct side *s) {
    struct plan p;
    if (!bundle_plan(&d->arena, s->path, &p))
        return false;
    side_of_plan(d, s, &p);
    const char *path = path_join(&d->arena, s->path, "plan.yaml");
    struct node *root = yaml_read(&d->arena, &d->diags, path), *n;
    if (!root || !node_kind_is(&d->diags, root, "plan.yaml", NODE_MAP))
        return false;
    if ((n = map_get(root, "model")) && !node_string(&d->diags, n, "model", &s->model_name))
        return false;
    s->cluster = bundle_cluster(&d->arena, &d->diags, root);
    return s->cluster != NULL;
}

static bool read_deployment(struct diff *d, struct side *s) {
    struct overrides o = {.model = d->o->model, .ep = d->o->ep};
    struct deployment *dep = deployment_read(&d->arena, &d->diags, s->path, &o);
    struct plan *p = dep ? plan_make(&d->arena, &d->diags, dep, core_count()) : NULL;
    if (!p)
        return false;
    side_of_plan(d, s, p);
    s->model = dep->model;
    s->model_name = dep->model->name;
    s->cluster = dep->cluster;
    s->loads = dep->loads;
    return true;
}

/* ---- placements in files ---- */

static struct node *find(struct node *map, const char *key) {
    for (int i = 0; i < map->count && map->kind == NODE_MAP; i++)
        if (!strcmp(map->keys[i]->text, key))
            return map->items[i];
    return NULL;
}

static bool is_placement(struct node *root) {
    static const char *const keys[] = {"initial_global_assignments", "physical_to_logical_map",
                                       "layer_list"};
    if (root->kind == NODE_LIST || (find(root, "layers") && find(root, "slots_per_rank")))
        return true;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (find(root, keys[i]))
            return true;
    return false;
}

static int plain_number(const struct node *n) {
    char *end;
    long v = n && n->kind == NODE_SCALAR ? strtol(n->text, &end, 10) : -1;
    return v >= 0 && v < 1 << 20 && !*end ? (int)v : -1;
}

static int largest(const struct node *list) {
    int most = -1;
    for (int i = 0; list && list->kind == NODE_LIST && i < list->count; i++) {
        int e = plain_number(list->items[i]);
        most = e > most ? e : most;
    }
    return most;
}

static int by_number(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

/* What a file of moec or TensorRT-LLM alone says of its model: layers, and experts up to the largest
 * that it names. The checks come with the reading of the file. */
static const struct model *guess_model(struct diff *d, struct node *root) {
    struct node *own = find(root, "layers"), *map = find(root, "initial_global_assignments");
    struct node *all = own ? own : map;
    if (!all || all->kind != (own ? NODE_LIST : NODE_MAP))
        return NULL;
    struct model *m = arena_array(&d->arena, struct model, 1);
    m->name = "this placement";
    m->moe_layers = arena_array(&d->arena, int, all->count);
    for (int i = 0; i < all->count; i++) {
        int layer = plain_number(own ? find(all->items[i], "layer") : all->keys[i]);
        int e = largest(own ? find(all->items[i], "expert_of_slot") : all->items[i]);
        m->num_experts = e + 1 > m->num_experts ? e + 1 : m->num_experts;
        if (layer >= 0)
            m->moe_layers[m->num_moe_layers++] = layer;
    }
    qsort(m->moe_layers, (size_t)m->num_moe_layers, sizeof(int), by_number);
    m->num_hidden_layers = m->num_moe_layers ? m->moe_layers[m->num_moe_layers - 1] + 1 : 0;
    return m;
}

/* A model of as many layers and experts as the other side has. */
static const struct model *model_like(struct diff *d, const struct side *s) {
    struct model *m = arena_array(&d->arena, struct model, 1);
    m->name = s->model_name ? s->model_name : s->path;
    m->num_experts = s->experts;
    m->num_moe_layers = s->num_layers;
    m->moe_layers = arena_array(&d->arena, int, s->num_layers);
    memcpy(m->moe_layers, s->layers, sizeof(int) * (size_t)s->num_layers);
    m->num_hidden_layers = s->layers[s->num_layers - 1] + 1;
    return m;
}

/* What the placement must fit: the model of --model, of the other side, or what the file says. */
static const struct model *model_for(struct diff *d, const struct side *other,
                                     struct node *root) {
    const struct model *m = NULL;
    if (d->o->model)
        return model_read(&d->arena, &d->diags, d->o->model);
    m = other->model ? other->model : other->num_layers ? model_like(d, other) : NULL;
    if (!m && !(m = guess_model(d, root)))
        diag_error(&d->diags, root->loc, "this file does not say what it is for: give --model");
    return m;
}

static int ranks_for(struct diff *d, const struct side *other, struct node *root) {
    int ranks = plain_number(find(root, "ranks"));
    if (ranks <= 0)
        ranks = plain_number(find(root, "ep_size"));
    if (ranks <= 0)
        ranks = d->o->ep ? d->o->ep : other->ranks;
    if (ranks <= 0)
        diag_error(&d->diags, root->loc, "this file does not say how many ranks: give --ep");
    return ranks;
}

static bool read_placement(struct diff *d, struct side *s, const struct side *other,
                           struct node *root) {
    struct cluster *c = cluster_default(&d->arena);
    struct assignment *list;
    struct node *name = find(root, "model");
    const struct model *m = model_for(d, other, root);
    int n;
    if (!m || (c->ranks = ranks_for(d, other, root)) <= 0)
        return false;
    struct assign_context ctx = {
        .arena = &d->arena, .diags = &d->diags, .model = m, .cluster = c};
    if (!assign_file(&ctx, s->path, &list, &n))
        return false;
    if (!n) {
        diag_error(&d->diags, root->loc, "this placement has no layers");
        return false;
    }
    int *layers = arena_array(&d->arena, int, n);
    s->slots = arena_array(&d->arena, const int *, n);
    for (int i = 0; i < n; i++) {
        layers[i] = list[i].layer;
        s->slots[i] = list[i].expert_of_slot;
    }
    s->model_name = name && name->kind == NODE_SCALAR ? name->text : NULL;
    s->model = d->o->model || other->model ? m : NULL;
    s->experts = m->num_experts;
    s->ranks = c->ranks;
    s->slots_per_rank = ctx.num_slots / c->ranks;
    s->num_layers = n;
    s->layers = layers;
    return true;
}

/* Files that know their model are read first, since the others must fit it. */
static bool read_sides(struct diff *d) {
    struct node *later[2] = {NULL, NULL};
    struct stat st;
    for (int i = 0; i < 2; i++) {
        struct side *s = &d->side[i];
        s->path = d->o->path[i];
        if (!stat(s->path, &st) && S_ISDIR(st.st_mode)) {
            if (!read_bundle(d, s))
                return false;
            continue;
        }
        struct node *root = yaml_read(&d->arena, &d->diags, s->path);
        if (!root)
            return false;
        if (is_placement(root))
            later[i] = root;
        else if (!read_deployment(d, s))
            return false;
    }
    for (int i = 0; i < 2; i++)
        if (later[i] && !read_placement(d, &d->side[i], &d->side[!i], later[i]))
            return false;
    return true;
}

/* ---- one side against the other ---- */

static bool differ(const struct diff *d, const char *what, int a, int b) {
    return a == b ||
           say_error("%s has %d %s, but %s has %d", d->o->path[0], a, what, d->o->path[1], b);
}

static int layer_at(const struct side *s, int layer) {
    for (int i = 0; i < s->num_layers; i++)
        if (s->layers[i] == layer)
            return i;
    return -1;
}

/* Every layer of `s` is in the other one, too; multi-token-prediction layers may lack. */
static bool covers(const struct diff *d, int side) {
    const struct side *s = &d->side[side], *other = &d->side[!side];
    const struct model *m = s->model ? s->model : other->model;
    for (int i = 0; i < s->num_layers; i++) {
        if (layer_at(other, s->layers[i]) >= 0)
            continue;
        if (!m || s->layers[i] < m->num_hidden_layers)
            return say_error("layer %d of %s is not in %s", s->layers[i], s->path, other->path);
        fprintf(stderr, "moec: note: layer %d of %s is not in %s: left out\n", s->layers[i],
                s->path, other->path);
    }
    return true;
}

static bool match(const struct diff *d) {
    const struct side *a = &d->side[0], *b = &d->side[1];
    if (a->model_name && b->model_name && strcmp(a->model_name, b->model_name))
        return say_error("%s is for %s, but %s for %s", a->path, a->model_name, b->path,
                         b->model_name);
    if (a->slot_bytes > 0 && b->slot_bytes > 0 && a->slot_bytes != b->slot_bytes)
        return say_error("an expert of %s has %.0f bytes, but one of %s %.0f", a->path,
                         a->slot_bytes, b->path, b->slot_bytes);
    return differ(d, "experts", a->experts, b->experts) &&
           differ(d, "ranks", a->ranks, b->ranks) && covers(d, 0) && covers(d, 1);
}

/* ---- moves ---- */

static bool read_loads(struct diff *d) {
    const struct side *s = &d->side[d->side[0].model ? 0 : 1];
    d->loads = d->side[1].loads ? d->side[1].loads : d->side[0].loads;
    if (!d->o->num_loads)
        return true;
    const struct model *m = s->model ? s->model : model_like(d, s);
    struct loads_options o = {0};
    d->loads = loads_read(&d->arena, &d->diags, d->o->loads, NULL, d->o->num_loads, m, &o);
    return d->loads != NULL;
}

/* A placement with empty slots behind, as many as the wider one has. */
static int *widen(struct diff *d, const struct side *s, int layer) {
    int *wide = arena_array(&d->arena, int, s->ranks * d->slots_per_rank);
    for (int i = 0; i < s->ranks * d->slots_per_rank; i++) {
        int rank = i / d->slots_per_rank, slot = i % d->slots_per_rank;
        wide[i] =
            slot < s->slots_per_rank ? s->slots[layer][rank * s->slots_per_rank + slot] : -1;
    }
    return wide;
}

static int larger(int a, int b) {
    return a > b ? a : b;
}

/* Layers that both have; side[0] keeps only those. */
static void find_moves(struct diff *d) {
    struct side *a = &d->side[0], *b = &d->side[1];
    const struct cluster *c = a->cluster ? a->cluster : b->cluster;
    int *kept = arena_array(&d->arena, int, a->num_layers), n = 0;
    d->slots_per_rank = larger(a->slots_per_rank, b->slots_per_rank);
    d->layers = arena_array(&d->arena, struct layer_moves, a->num_layers);
    for (int i = 0; i < a->num_layers; i++) {
        int j = layer_at(b, a->layers[i]);
        if (j < 0)
            continue;
        struct moves_problem p = {.experts = a->experts,
                                  .ranks = a->ranks,
                                  .slots_per_rank = d->slots_per_rank,
                                  .ranks_per_node = c ? c->ranks_per_node : 0,
                                  .from = widen(d, a, i),
                                  .to = widen(d, b, j)};
        p.load = d->loads ? cost_load(&d->arena, d->loads, a->layers[i]) : NULL;
        moves_order(&d->arena, &p, &d->layers[n]);
        kept[n++] = a->layers[i];
    }
    a->layers = kept;
    a->num_layers = n;
}

static void sum_up(struct diff *d) {
    const struct side *a = &d->side[0], *b = &d->side[1];
    const struct cluster *c = a->cluster ? a->cluster : b->cluster;
    const struct model *m = a->model ? a->model : b->model;
    long long most = 0;
    d->slot_bytes = a->slot_bytes > 0 ? a->slot_bytes : b->slot_bytes;
    if (d->slot_bytes == 0 && m)
        d->slot_bytes = cost_slot_bytes(&(struct cost_setup){
            .model = m, .fp8 = model_record_format(m) == MOE_FORMAT_FP8_BLOCK});
    for (int r = 0; r < a->ranks; r++) {
        long long received = 0;
        for (int i = 0; i < a->num_layers; i++)
            received += d->layers[i].received[r];
        d->received += received;
        most = received > most ? received : most;
    }
    for (int i = 0; i < a->num_layers; i++)
        d->moves += d->layers[i].n;
    d->us = -1;
    if (c && d->slot_bytes > 0 &&
        (c->nvlink_domain >= a->ranks ? c->nvlink_gbps : c->nic_gbps) > 0)
        d->us = cost_link_us(c, a->ranks, (double)most * d->slot_bytes);
}

/* ---- text ---- */

static void print_mb(double slots, const struct diff *d) {
    if (d->slot_bytes > 0)
        printf("  %9.1f", slots * d->slot_bytes / 1e6);
    else
        printf("  %9s", "?");
}

static long long received_in(const struct diff *d, const struct layer_moves *l) {
    long long n = 0;
    for (int r = 0; r < d->side[0].ranks; r++)
        n += l->received[r];
    return n;
}

static void print_order(const struct diff *d, const struct layer_moves *l) {
    int s = d->slots_per_rank;
    printf("  in order, every expert having a copy at any time:\n");
    for (int i = 0; i < l->n; i++) {
        const struct move *m = &l->moves[i];
        printf("  %4d  rank %d slot %d: expert %d from rank %d", i + 1, m->slot / s,
               m->slot % s, m->expert, m->from_rank);
        if (m->replaces >= 0)
            printf(", replaces %d%s", m->replaces,
                   m->spare ? ", which waits in a spare slot" : "");
        printf("; imbalance %.4f\n", m->imbalance);
    }
}

static void print_ranks(const struct diff *d, const struct layer_moves *l) {
    printf("  rank: receives, sends\n");
    for (int r = 0; r < d->side[0].ranks; r++)
        if (l->received[r] || l->sent[r])
            printf("  %4d: %d, %d\n", r, l->received[r], l->sent[r]);
}

static void print_text(const struct diff *d) {
    const struct side *a = &d->side[0], *b = &d->side[1];
    printf("%s -> %s: %d layers, %d ranks, %d -> %d slots of a rank\n", a->path, b->path,
           a->num_layers, a->ranks, a->slots_per_rank, b->slots_per_rank);
    printf("imbalance is max/mean of the ranks, %s, split evenly over replicas\n",
           d->loads ? "by the recorded loads" : "all experts weighing the same");
    printf("%5s  %5s  %7s  %9s  %10s  %7s  %9s  %9s\n", "layer", "moves", "to rank", "MB",
           "renumbered", "dropped", "before", "after");
    for (int i = 0; i < a->num_layers; i++) {
        const struct layer_moves *l = &d->layers[i];
        int most = 0;
        if (d->o->layer >= 0 && a->layers[i] != d->o->layer)
            continue;
        for (int r = 0; r < a->ranks; r++)
            most = larger(most, l->received[r]);
        printf("%5d  %5d  %7d", a->layers[i], l->n, most);
        print_mb((double)received_in(d, l), d);
        printf("  %10d  %7d  %9.4f  %9.4f\n", l->renumbered, l->dropped, l->before, l->after);
        if (d->o->layer >= 0) {
            print_ranks(d, l);
            print_order(d, l);
        }
    }
    printf("all: %lld slots move, %lld of them between ranks", d->moves, d->received);
    if (d->slot_bytes > 0)
        printf(": %.1f MB", (double)d->received * d->slot_bytes / 1e6);
    if (d->us >= 0)
        printf(", %.1f ms on the rank that receives most", d->us / 1e3);
    printf("\n");
}

/* ---- JSON ---- */

static void json_ints(struct buf *b, const char *key, const int *v, int n) {
    buf_printf(b, ", \"%s\": [", key);
    for (int i = 0; i < n; i++)
        buf_printf(b, "%s%d", i ? ", " : "", v[i]);
    buf_printf(b, "]");
}

static void json_layer(struct buf *b, const struct diff *d, int i) {
    const struct layer_moves *l = &d->layers[i];
    int ranks = d->side[0].ranks, s = d->slots_per_rank;
    buf_printf(b,
               "{\"layer\": %d, \"moves\": %d, \"renumbered\": %d, \"dropped\": %d, "
               "\"imbalance_before\": %.6g, \"imbalance_after\": %.6g",
               d->side[0].layers[i], l->n, l->renumbered, l->dropped, l->before, l->after);
    json_ints(b, "received", l->received, ranks);
    json_ints(b, "sent", l->sent, ranks);
    buf_printf(b, ", \"order\": [");
    for (int j = 0; j < l->n; j++) {
        const struct move *m = &l->moves[j];
        buf_printf(b,
                   "%s{\"rank\": %d, \"slot\": %d, \"expert\": %d, \"from_rank\": %d, "
                   "\"replaces\": %d, \"spare\": %s, \"imbalance\": %.6g}",
                   j ? ", " : "", m->slot / s, m->slot % s, m->expert, m->from_rank,
                   m->replaces, m->spare ? "true" : "false", m->imbalance);
    }
    buf_printf(b, "]}");
}

static void json_number(struct buf *b, const char *key, double v, bool known) {
    buf_printf(b, ", \"%s\": ", key);
    buf_printf(b, known ? "%.15g" : "null", v);
}

static void print_json(struct diff *d) {
    struct buf b = {.arena = &d->arena};
    const struct side *a = &d->side[0];
    const char *name = a->model_name ? a->model_name : d->side[1].model_name;
    bool first = true;
    buf_printf(&b, "{\"a\": ");
    buf_json_string(&b, a->path);
    buf_printf(&b, ", \"b\": ");
    buf_json_string(&b, d->side[1].path);
    buf_printf(&b, ", \"model\": ");
    if (name)
        buf_json_string(&b, name);
    else
        buf_printf(&b, "null");
    buf_printf(&b, ", \"ranks\": %d, \"slots_per_rank\": [%d, %d]", a->ranks, a->slots_per_rank,
               d->side[1].slots_per_rank);
    json_number(&b, "slot_bytes", d->slot_bytes, d->slot_bytes > 0);
    buf_printf(&b, ", \"moves\": %lld, \"between_ranks\": %lld", d->moves, d->received);
    json_number(&b, "bytes", (double)d->received * d->slot_bytes, d->slot_bytes > 0);
    json_number(&b, "us", d->us, d->us >= 0);
    buf_printf(&b, ", \"layers\": [");
    for (int i = 0; i < a->num_layers; i++) {
        if (d->o->layer >= 0 && a->layers[i] != d->o->layer)
            continue;
        buf_printf(&b, first ? "\n  " : ",\n  ");
        first = false;
        json_layer(&b, d, i);
    }
    buf_printf(&b, "]}\n");
    fputs(b.data, stdout);
}

static bool has_layer(const struct diff *d) {
    return d->o->layer < 0 || layer_at(&d->side[0], d->o->layer) >= 0 ||
           say_error("%s has no MoE layer %d", d->side[0].path, d->o->layer);
}

int cmd_diff(int argc, char **argv) {
    struct options o;
    int code;
    if (!parse(argc, argv, &o, &code))
        return code;
    struct diff d = {.o = &o};
    d.diags.arena = &d.arena;
    bool ok = read_sides(&d) && match(&d) && read_loads(&d);
    diag_print(&d.diags, stderr);
    if (ok) {
        find_moves(&d);
        sum_up(&d);
        ok = has_layer(&d);
    }
    if (ok)
        o.json ? print_json(&d) : print_text(&d);
    arena_free(&d.arena);
    return ok ? 0 : 1;
}
