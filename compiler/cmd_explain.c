/* moec explain: what a plan decided, for a file or for a bundle, and why. */
#include "device.h"
#include "explain.h"

#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char usage[] =
    "Usage: moec explain FILE|BUNDLE [options]\n"
    "Says what was recorded, where the experts lie and why, what a rank's memory holds, which "
    "kernels\n"
    "and which exchange serve which batch, the time below which the GPU cannot be, and "
    "whether\n"
    "balancing is worth its memory and its moves.\n"
    "\n"
    "  --layer N     this layer's placement in full\n"
    "  --loads PATH  recorded loads to judge a BUNDLE by; may be given again (a FILE has its "
    "own)\n"
    "  --target T    kernels for this target only\n"
    "  --model M, --ep N, --set KEY=VALUE   as for moec build (FILE only)\n"
    "  --json        the same as JSON\n"
    "Exit status: 0 done, 1 failed, 2 wrong usage.\n";

enum { MAX_SET = 32, MAX_LOADS = 64 };

struct options {
    const char *path;
    int layer, target; /* -1: all */
    bool json;
    struct overrides overrides;
    const char *set[MAX_SET];
    const char *loads[MAX_LOADS];
    int num_loads;
};

static bool parse(int argc, char **argv, struct options *o, int *code) {
    enum { LAYER = 256, TARGET, MODEL, EP, SET, LOADS, JSON };
    static const struct option longs[] = {
        {"layer", 1, 0, LAYER}, {"target", 1, 0, TARGET}, {"model", 1, 0, MODEL},
        {"ep", 1, 0, EP},       {"set", 1, 0, SET},       {"json", 0, 0, JSON},
        {"loads", 1, 0, LOADS}, {"help", 0, 0, 'h'},      {0}};
    int c;
    bool ok = true;
    *o = (struct options){.layer = -1, .target = -1};
    o->overrides.set = o->set;
    *code = 2;
    while (ok && (c = getopt_long(argc, argv, "h", longs, NULL)) != -1)
        switch (c) {
        case LAYER:
            ok = option_int("--layer", optarg, 0, 1 << 20, &o->layer);
            break;
        case TARGET:
            for (int t = 0; t < MOE_TARGET_COUNT; t++)
                if (!strcmp(optarg, target_names[t]))
                    o->target = t;
            o->overrides.targets = optarg;
            ok = o->target >= 0 || say_error("--target: no target '%s'", optarg);
            break;
        case MODEL:
            o->overrides.model = optarg;
            break;
        case EP:
            ok = option_int("--ep", optarg, 1, 1 << 16, &o->overrides.ep);
            break;
        case SET:
            ok = o->overrides.num_set < MAX_SET || say_error("--set: at most %d", MAX_SET);
            if (ok)
                o->set[o->overrides.num_set++] = optarg;
            break;
        case LOADS:
            ok = o->num_loads < MAX_LOADS || say_error("--loads: at most %d", MAX_LOADS);
            if (ok)
                o->loads[o->num_loads++] = optarg;
            break;
        case JSON:
            o->json = true;
            break;
        case 'h':
            *code = say_usage(usage, true);
            return false;
        default:
            say_usage(usage, false);
            return false;
        }
    if (ok && optind + 1 != argc)
        ok = say_usage(usage, false) == 0;
    if (ok)
        o->path = argv[optind];
    return ok;
}

/* ---- reading ---- */

static const char *yaml_text(struct node *map, const char *key, const char *otherwise) {
    struct node *n = map && map->kind == NODE_MAP ? map_get(map, key) : NULL;
    return n && n->kind == NODE_SCALAR && !node_is_null(n) ? n->text : otherwise;
}

/* Layers and experts of a bundle, for reading loads that belong to it. */
static struct model *bundle_model(struct view *v) {
    struct model *m = arena_array(&v->arena, struct model, 1);
    int n = (int)v->plan.count[MOE_SECTION_LAYER];
    *m = (struct model){.name = v->model, .num_experts = v->plan.classes[0].experts};
    m->num_experts_per_tok = v->plan.classes[0].topk;
    m->moe_layers = arena_array(&v->arena, int, n);
    for (int i = 0; i < n; i++)
        m->moe_layers[m->num_moe_layers++] = v->plan.layers[i].layer;
    m->num_hidden_layers = m->moe_layers[n - 1] + 1;
    return m;
}

static bool read_bundle(struct view *v, const struct options *o) {
    const char *dir = v->path;
    const struct overrides *given = &o->overrides;
    struct loads_options all = {0};
    if (given->model || given->ep || given->num_set)
        return say_error("%s is a bundle: --model, --ep and --set belong to a file", dir);
    if (!bundle_plan(&v->arena, dir, &v->plan))
        return false;
    struct node *root = yaml_read(&v->arena, &v->diags, path_join(&v->arena, dir, "plan.yaml"));
    if (!root)
        return false;
    v->model = yaml_text(root, "model", "?");
    v->policy = yaml_text(root, "policy", "?");
    v->dispatch = yaml_text(root, "dispatch", "?");
    v->cluster = bundle_cluster(&v->arena, &v->diags, root);
    if (o->num_loads)
        v->loads = loads_read(&v->arena, &v->diags, o->loads, NULL, o->num_loads,
                              bundle_model(v), &all);
    return v->cluster && (v->loads || !o->num_loads);
}

static bool read_file(struct view *v, const struct options *o) {
    if (o->num_loads)
        return say_error("--loads belongs to a bundle; %s has its own under 'loads'", v->path);
    struct deployment *dep = deployment_read(&v->arena, &v->diags, v->path, &o->overrides);
    struct plan *p = dep ? plan_make(&v->arena, &v->diags, dep, core_count()) : NULL;
    if (!p)
        return false;
    v->plan = *p;
    v->dep = dep;
    v->loads = dep->loads;
    v->model = dep->model->name;
    v->policy = dep->policy;
    v->dispatch = dispatch_names[dep->dispatch];
    v->cluster = dep->cluster;
    return true;
}

/* ---- figures ---- */

static double mats(const struct moe_plan_class *c) {
    return c->activation == MOE_ACT_RELU2 ? 2 : 3;
}

static double layer_bytes(const struct moe_plan_class *c) {
    return (double)c->slot_bytes * c->slots_per_rank + (double)c->shared_bytes +
           4.0 * c->experts * c->hidden;
}

static double workspace_bytes(const struct view *v, const struct moe_plan_class *c) {
    double sum = 0;
    for (int i = 0; i < c->num_buffers; i++)
        sum += (double)v->plan.buffers[c->first_buffer + i].bytes;
    return sum;
}

/* Slots of a rank that a batch of `tokens` on every rank is expected to hit when all experts are
 * as likely: each token names k of E. */
static double expected_hit(const struct moe_plan_class *c, int tokens) {
    double all = (double)c->ranks * c->slots_per_rank;
    double held =
        all - c->experts < c->ranks ? (double)c->experts / c->ranks : c->slots_per_rank;
    double miss = pow(1 - c->topk / (held * c->ranks), (double)tokens * c->ranks);
    return held * (1 - miss);
}

/* Of the products that a class's kernels make. */
static double tflops(const struct view *v, const struct moe_plan_class *c) {
    return cluster_tflops(v->cluster, moe_is_fp8(c));
}

/* Microseconds below which one layer of one rank cannot be, for `tokens` of this rank; what binds
 * it goes to *compute. 0 when no GPU is named. */
static double floor_us(const struct view *v, const struct moe_plan_class *c, int tokens,
                       bool *compute) {
    double params = mats(c) * c->hidden * c->inter,
           shared = mats(c) * c->hidden * c->shared_inter;
    double bytes = (moe_is_fp8(c) ? 1 : 2) * (expected_hit(c, tokens) * params + shared) +
                   4.0 * tokens * c->hidden;
    double flop = 2.0 * tokens * (c->topk * params + shared);
    if (!v->cluster->gpu)
        return 0;
    double by_memory = bytes / v->cluster->memory_tbps / 1e6;
    double by_compute = flop / tflops(v, c) / 1e6;
    *compute = by_compute > by_memory;
    return *compute ? by_compute : by_memory;
}

static const char *kernel_name(const struct view *v, const struct moe_plan_launch *l) {
    return plan_string(&v->plan, v->plan.kernels[l->kernel].expression);
}

/* The variant's number of the first launch whose kernel begins with name ("moe_gemm1<"); -1. */
static int variant_of(const struct view *v, const struct moe_plan_bucket *b, const char *name) {
    for (int i = 0; i < b->num_launches; i++) {
        const char *k = kernel_name(v, &v->plan.launches[b->first_launch + i]);
        if (!strncmp(k, name, strlen(name)))
            return atoi(k + strlen(name));
    }
    return -1;
}

static bool wanted(const struct view *v, const struct moe_plan_target *t, int class_index) {
    return t->class_index == class_index && (v->target < 0 || t->target == v->target);
}

static const int32_t *slots_of(const struct view *v, const struct moe_plan_layer *l) {
    return v->plan.tables + l->expert_of_slot;
}

/* Experts with more than one slot, the most slots of one, and empty slots. */
struct replicas {
    int replicated, most, empty;
};
static struct replicas count_replicas(const struct view *v, const struct moe_plan_layer *l) {
    const struct moe_plan_class *c = &v->plan.classes[l->class_index];
    struct replicas r = {0};
    int *count = calloc((size_t)c->experts, sizeof *count);
    if (!count)
        abort();
    for (int s = 0; s < c->ranks * c->slots_per_rank; s++) {
        int e = slots_of(v, l)[s];
        if (e < 0)
            r.empty++;
        else if (++count[e] > r.most)
            r.most = count[e];
    }
    for (int e = 0; e < c->experts; e++)
        r.replicated += count[e] > 1;
    free(count);
    return r;
}

/* ---- text ---- */

static void print_size(double bytes) {
    if (bytes >= 1e9)
        printf("%.2f GB", bytes / 1e9);
    else
        printf("%.2f MB", bytes / 1e6);
}

/* Numbers as 3-60, 62. */
static void print_layers(const struct view *v, int class_index) {
    int first = -1, last = -1, n = (int)v->plan.count[MOE_SECTION_LAYER];
    bool any = false;
    for (int i = 0; i <= n; i++) {
        bool in = i < n && v->plan.layers[i].class_index == class_index;
        int layer = in ? v->plan.layers[i].layer : -1;
        if (in && first >= 0 && layer == last + 1) {
            last = layer;
            continue;
        }
        if (first >= 0) {
            printf(first == last ? "%s%d" : "%s%d-%d", any ? ", " : "", first, last);
            any = true;
            first = -1;
        }
        if (in)
            first = last = layer;
    }
}

static int layers_in(const struct view *v, int class_index) {
    int n = 0;
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_LAYER]; i++)
        n += v->plan.layers[i].class_index == class_index;
    return n;
}

static void print_shape(const struct view *v, int index, const struct balance_view *balance) {
    struct cost_memory memory;
    const struct moe_plan_class *c = &v->plan.classes[index];
    int n = layers_in(v, index);
    printf("\n%s: layers ", plan_string(&v->plan, c->name));
    print_layers(v, index);
    printf("\n  hidden %d, intermediate %d, %d experts, top-%d, router %s, %s", c->hidden,
           c->inter, c->experts, c->topk, router_names[c->router],
           activation_names[c->activation]);
    if (c->shared_inter)
        printf(", shared expert %d%s", c->shared_inter, c->shared_gate ? " with a gate" : "");
    printf("\n  checkpoint in %s, packed as %s: an expert is ", format_names[c->weights_format],
           moe_is_fp8(c) ? "fp8" : "bf16");
    print_size((double)c->slot_bytes);
    printf("\n  memory of a rank: %d slots, ", c->slots_per_rank);
    print_size(layer_bytes(c));
    printf(" a layer, ");
    print_size(layer_bytes(c) * n);
    printf(" for %d, workspace ", n);
    print_size(workspace_bytes(v, c));
    cost_memory(&balance->base, &memory);
    if (c->ranks > 1) {
        printf(", exchange buffers ");
        print_size(memory.exchange);
    }
    if (v->cluster->gpu)
        printf("; %s has %.0f GB", v->cluster->gpu, v->cluster->memory_gb);
    printf("\n  a pass takes up to %d tokens of a rank; more are split into even chunks\n",
           c->max_tokens);
}

static void print_placement(struct view *v, int index) {
    const struct moe_plan_class *c = &v->plan.classes[index];
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_LAYER]; i++) {
        const struct moe_plan_layer *l = &v->plan.layers[i];
        if (l->class_index != index || (v->layer >= 0 && l->layer != v->layer))
            continue;
        struct replicas r = count_replicas(v, l);
        printf("  layer %d: %d slots for %d experts, %d replicated (at most %d times), %d "
               "empty\n",
               l->layer, c->ranks * c->slots_per_rank, c->experts, r.replicated, r.most,
               r.empty);
        explain_replicas_text(v, l, v->layer >= 0);
        if (v->layer < 0) {
            printf("  (the first layer of the class; --layer N shows another in full)\n");
            return;
        }
        for (int rank = 0; rank < c->ranks; rank++) {
            printf("    rank %d:", rank);
            for (int s = 0; s < c->slots_per_rank; s++)
                printf(" %d", slots_of(v, l)[rank * c->slots_per_rank + s]);
            putchar('\n');
        }
    }
}

static void print_tile(const struct moe_plan_class *c, int id, const struct hopper_variant *h) {
    char text[40] = "-";
    if (h->w1_rows)
        snprintf(text, sizeof text, "%d,%dx%dx%d/%d", h->w1_rows, h->w2_rows,
                 h->tokens * h->cluster, moe_is_fp8(c) ? 128 : 64, h->stages);
    else if (id >= 0 && id < num_gemm_variants)
        snprintf(text, sizeof text, "%dx%dx%d/%d", gemm_variants[id].bm, gemm_variants[id].bn,
                 gemm_variants[id].bk * (moe_is_fp8(c) ? 2 : 1), gemm_variants[id].stages);
    printf("  %18s", text);
}

/* The bucket's launch of the whole experts part, zeros without one. */
static struct hopper_variant hopper_of(const struct view *v, const struct moe_plan_bucket *b) {
    struct hopper_variant h = {0};
    for (int i = 0; i < b->num_launches; i++)
        if (sscanf(kernel_name(v, &v->plan.launches[b->first_launch + i]),
                   "moe_experts<%d,%d,%d,%d,%d,%d", &h.w1_rows, &h.w2_rows, &h.tokens,
                   &h.stages, &h.entries, &h.cluster) == 6)
            break;
    return h;
}

static void print_bucket(const struct view *v, const struct moe_plan_class *c,
                         const struct moe_plan_bucket *b, const struct balance_view *balance) {
    struct cost cost;
    bool compute;
    double us = floor_us(v, c, b->max_tokens, &compute);
    int router = variant_of(v, b, "moe_router<");
    printf("  %9d  %9.1f  %9.1f", b->max_tokens,
           (double)b->max_tokens * c->topk / c->slots_per_rank, expected_hit(c, b->max_tokens));
    if (router >= 0 && router < num_router_variants)
        printf("  %3dx%d/%-2d", router_variants[router].tokens, router_variants[router].experts,
               router_variants[router].split);
    else
        printf("  %9s", "-");
    struct hopper_variant hopper = hopper_of(v, b);
    print_tile(c, variant_of(v, b, "moe_gemm1<"), &hopper);
    if (c->shared_inter)
        print_tile(c, variant_of(v, b, "moe_shared1<"), &hopper);
    if (us > 0)
        printf("  %9.1f  %-7s", us, compute ? "compute" : "memory");
    if (explain_cost(balance, b, &cost))
        printf("  %8.1f", cost.layer_us);
    printf("  %s\n", b->exchange < 0 ? "-" : exchange_names[b->exchange]);
}

static void print_kernels(const struct view *v, int index, const struct balance_view *balance) {
    const struct moe_plan_class *c = &v->plan.classes[index];
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_TARGET]; i++) {
        const struct moe_plan_target *t = &v->plan.targets[i];
        if (!wanted(v, t, index))
            continue;
        printf("  kernels on %s; a tile is weight rows (w1,w2) x token rows x K / stages\n",
               target_names[t->target]);
        printf("  %9s  %9s  %9s  %9s  %18s%s%s%s%s\n", "tokens to", "rows/slot", "slots hit",
               "router", "GEMMs", c->shared_inter ? "              shared" : "",
               v->cluster->gpu ? "   floor us  bound by" : "",
               balance->timed ? "  layer us" : "", "  exchange");
        for (int b = 0; b < t->num_buckets; b++)
            print_bucket(v, c, &v->plan.buckets[t->first_bucket + b], balance);
    }
    printf(
        "  why: the token side of a GEMM tile follows the rows that a slot gets (tokens x k / "
        "slots): the\n  narrowest tile that most slots fill once, so that each weight is read "
        "once and no product is\n  wasted; the router splits K while tokens are few, so that "
        "every SM reads a part of its weights.\n");
    if (v->cluster->gpu)
        printf(
            "  floor: uniform routing, %.2f TB/s and %.0f TFLOP/s of %s; 'slots hit' of this "
            "rank; layer: predicted,\n  slowest rank, exchange in it.\n",
            v->cluster->memory_tbps, tflops(v, &v->plan.classes[0]), v->cluster->gpu);
}

/* One line when anything limits the placement. */
static void print_limits(struct view *v) {
    const struct moe_plan_balance *k = v->plan.balance;
    struct buf t = {.arena = &v->arena};
    int n = (int)v->plan.count[MOE_SECTION_RANK], S = v->plan.classes[0].slots_per_rank;
    int slower = 0, smaller = 0;
    for (int r = 0; r < n; r++) {
        slower += v->plan.ranks[r].speed != v->plan.ranks[0].speed;
        smaller += v->plan.ranks[r].slots < S;
    }
    if (k->groups)
        buf_printf(&t, ", %d groups of experts inside nodes of %d ranks but for %d slots",
                   k->groups, k->ranks_per_node, k->cross_node_slots);
    if (k->max_replicas)
        buf_printf(&t, ", at most %d replicas of an expert", k->max_replicas);
    if (k->max_per_node)
        buf_printf(&t, ", at most %d in a node of %d ranks", k->max_per_node,
                   k->ranks_per_node);
    if (smaller)
        buf_printf(&t, ", %d rank%s with fewer slots", smaller, smaller == 1 ? "" : "s");
    if (slower)
        buf_printf(&t, ", ranks of different speed");
    if (t.len)
        printf("limits: %s\n", t.data + 2);
}

static void print_text(struct view *v) {
    struct balance_view balance;
    const struct moe_plan_class *c = &v->plan.classes[0];
    printf("%s: %u MoE layers, %u class%s, on %d rank%s of %s\n", v->model,
           v->plan.count[MOE_SECTION_LAYER], v->plan.count[MOE_SECTION_CLASS],
           v->plan.count[MOE_SECTION_CLASS] == 1 ? "" : "es", c->ranks,
           c->ranks == 1 ? "" : "s",
           v->cluster->gpu ? v->cluster->gpu
                           : "no particular GPU (memory is not checked, no "
                             "floors)");
    printf("placement: policy %s, dispatch %s\n", v->policy, v->dispatch);
    print_limits(v);
    explain_loads_text(v);
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_CLASS]; i++) {
        explain_balance(v, (int)i, &balance);
        print_shape(v, (int)i, &balance);
        print_placement(v, (int)i);
        print_kernels(v, (int)i, &balance);
        explain_balance_text(v, &balance);
    }
}

/* ---- JSON ---- */

static void json_bucket(const struct view *v, const struct moe_plan_class *c,
                        const struct moe_plan_bucket *b, const struct balance_view *balance,
                        struct buf *out) {
    struct cost cost;
    bool compute = false, timed = explain_cost(balance, b, &cost);
    double us = floor_us(v, c, b->max_tokens, &compute);
    buf_printf(out, "{\"max_tokens\":%d,\"rows_per_slot\":%.3f,\"slots_hit\":%.3f,",
               b->max_tokens, (double)b->max_tokens * c->topk / c->slots_per_rank,
               expected_hit(c, b->max_tokens));
    if (us > 0)
        buf_printf(out, "\"floor_us\":%.3f,\"bound_by\":\"%s\",", us,
                   compute ? "compute" : "memory");
    else
        buf_printf(out, "\"floor_us\":null,\"bound_by\":null,");
    buf_printf(out,
               timed ? "\"layer_us\":%.6g,\"exchange\":" : "\"layer_us\":null,\"exchange\":",
               cost.layer_us);
    if (b->exchange >= 0)
        buf_printf(out, "\"%s\",", exchange_names[b->exchange]);
    else
        buf_printf(out, "null,");
    buf_printf(out, "\"launches\":[");
    for (int i = 0; i < b->num_launches; i++) {
        const struct moe_plan_launch *l = &v->plan.launches[b->first_launch + i];
        buf_printf(out, "%s{\"stage\":\"%s\",\"kernel\":\"%s\"}", i ? "," : "",
                   stage_names[l->stage], kernel_name(v, l));
    }
    buf_printf(out, "]}");
}

static void json_class(struct view *v, int index, struct buf *out) {
    struct balance_view balance;
    struct cost_memory memory;
    const struct moe_plan_class *c = &v->plan.classes[index];
    bool first = true;
    explain_balance(v, index, &balance);
    cost_memory(&balance.base, &memory);
    buf_printf(
        out,
        "{\"name\":\"%s\",\"hidden\":%d,\"inter\":%d,\"experts\":%d,\"topk\":%d,"
        "\"router\":\"%s\",\"activation\":\"%s\",\"shared_inter\":%d,\"checkpoint\":"
        "\"%s\",\"packed\":\"%s\",\"max_tokens\":%d,\"slots_per_rank\":%d,\"slot_bytes\":%lld,"
        "\"layer_bytes\":%.0f,\"workspace_bytes\":%.0f,\"exchange_bytes\":%.0f,"
        "\"targets\":[",
        plan_string(&v->plan, c->name), c->hidden, c->inter, c->experts, c->topk,
        router_names[c->router], activation_names[c->activation], c->shared_inter,
        format_names[c->weights_format], format_names[c->record_format], c->max_tokens,
        c->slots_per_rank, (long long)c->slot_bytes, layer_bytes(c), workspace_bytes(v, c),
        memory.exchange);
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_TARGET]; i++) {
        const struct moe_plan_target *t = &v->plan.targets[i];
        if (!wanted(v, t, index))
            continue;
        buf_printf(out, "%s{\"target\":\"%s\",\"buckets\":[", first ? "" : ",",
                   target_names[t->target]);
        first = false;
        for (int b = 0; b < t->num_buckets; b++) {
            buf_printf(out, b ? "," : "");
            json_bucket(v, c, &v->plan.buckets[t->first_bucket + b], &balance, out);
        }
        buf_printf(out, "]}");
    }
    buf_printf(out, "],\"balance\":");
    explain_balance_json(v, &balance, out);
    buf_printf(out, "}");
}

static void json_layer(struct view *v, const struct moe_plan_layer *l, struct buf *out) {
    const struct moe_plan_class *c = &v->plan.classes[l->class_index];
    struct replicas r = count_replicas(v, l);
    buf_printf(out,
               "{\"layer\":%d,\"class\":\"%s\",\"replicated\":%d,\"max_replicas\":%d,"
               "\"empty\":%d,\"expert_of_slot\":[",
               l->layer, plan_string(&v->plan, c->name), r.replicated, r.most, r.empty);
    for (int s = 0; s < c->ranks * c->slots_per_rank; s++)
        buf_printf(out, "%s%d", s ? "," : "", slots_of(v, l)[s]);
    buf_printf(out, "]");
    explain_replicas_json(v, l, out);
    buf_printf(out, "}");
}

static void print_json(struct view *v) {
    struct buf out = {.arena = &v->arena};
    bool first = true;
    buf_printf(&out, "{\"model\":");
    buf_json_string(&out, v->model);
    buf_printf(&out, ",\"gpu\":");
    if (v->cluster->gpu)
        buf_json_string(&out, v->cluster->gpu);
    else
        buf_printf(&out, "null");
    buf_printf(&out, ",\"ranks\":%d,\"policy\":", v->plan.classes[0].ranks);
    buf_json_string(&out, v->policy);
    buf_printf(&out, ",\"dispatch\":");
    buf_json_string(&out, v->dispatch);
    buf_printf(&out, ",");
    explain_loads_json(v, &out);
    buf_printf(&out, ",\"classes\":[");
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_CLASS]; i++) {
        buf_printf(&out, i ? "," : "");
        json_class(v, (int)i, &out);
    }
    buf_printf(&out, "],\"layers\":[");
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_LAYER]; i++) {
        if (v->layer >= 0 && v->plan.layers[i].layer != v->layer)
            continue;
        buf_printf(&out, first ? "" : ",");
        json_layer(v, &v->plan.layers[i], &out);
        first = false;
    }
    buf_printf(&out, "]}");
    puts(out.data);
}

static bool has_layer(const struct view *v) {
    for (uint32_t i = 0; i < v->plan.count[MOE_SECTION_LAYER]; i++)
        if (v->plan.layers[i].layer == v->layer)
            return true;
    return v->layer < 0 || say_error("%s has no MoE layer %d", v->path, v->layer);
}

int cmd_explain(int argc, char **argv) {
    struct options o;
    struct stat st;
    int code;
    if (!parse(argc, argv, &o, &code))
        return code;
    struct view v = {.path = o.path, .layer = o.layer, .target = o.target};
    v.diags.arena = &v.arena;
    bool bundle = !stat(o.path, &st) && S_ISDIR(st.st_mode);
    bool ok = bundle ? read_bundle(&v, &o) : read_file(&v, &o);
    diag_print(&v.diags, stderr);
    ok = ok && has_layer(&v);
    if (ok)
        o.json ? print_json(&v) : print_text(&v);
    arena_free(&v.arena);
    return ok ? 0 : 1;
}
