/* moec simulate: a cluster on paper. Every combination of ranks, slots and batch size is a point:
 * what a step takes there, what it holds, and whether another point is better in every way. */
#include "device.h"
#include "online.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: moec simulate FILE [OPTION...]\n"
    "\n"
    "The MoE layers of a deployment on paper: step time by batch size with exchange, weights "
    "and\n"
    "imbalance, memory, migration, and which combinations no other beats (Pareto). Attention "
    "and\n"
    "the rest of a step are not in it.\n"
    "\n"
    "      --tokens LIST      tokens on every rank; default 1,8,32,128,512,2048\n"
    "      --ep LIST          numbers of ranks; default: the cluster's\n"
    "      --slots LIST       num_slots; default: the deployment's\n"
    "      --imbalance X      the busiest rank's load over the mean, when the deployment has "
    "no\n"
    "                         loads; default 1. With loads every combination is placed\n"
    "      --precision P      bf16 or fp8; default: what the model's weights run in\n"
    "      --moves N          slots of a layer that a migration moves; default 2\n"
    "      --model M, --policy P, --set KEY=VALUE   as for moec build\n"
    "      --online           instead: the load goes from each workload of 'loads' to each "
    "other, and\n"
    "                         the online planner follows; with --moves (default 16) and\n"
    "      --updates N        layers an iteration; default 1\n"
    "      --rotations N      turns of every layer; default 2\n"
    "      --settle N         iterations of the new load before the first turn; default 0\n"
    "      --worth X          what a moved slot must gain of max/mean; default 0.016\n"
    "      --json             the result as JSON\n"
    "      --help\n";

enum { MAX_SET = 32, MAX_LIST = 64, SET_SLOTS = 1 };

struct list {
    int value[MAX_LIST], n;
};
struct options {
    const char *path;
    struct list tokens, ep, slots;
    double imbalance; /* 0: not given */
    int moves;
    bool online;
    struct online_options follow;
    bool bf16, fp8, json; /* neither bf16 nor fp8: as the model says */
    struct overrides overrides;
    const char *set[MAX_SET + SET_SLOTS];
};

/* One combination of ranks and slots. */
struct config {
    struct cost_setup setup;
    struct cost_setup
        *placed; /* [num_placed] of layers and workloads; NULL: all experts alike */
    int num_placed;
    int slots, layers;
    struct cost_memory memory;
};
struct point {
    const struct config *config;
    int tokens;
    struct cost cost;
    double step_us, rate; /* rate: tokens per second and GPU */
    bool pareto;
};
struct sim {
    struct arena arena;
    struct diags diags;
    const struct options *o;
    const char *model, *gpu;
    struct config *configs;
    struct point *points;
    int num_configs, num_points;
};

/* ---- options ---- */

static bool read_precision(const char *text, struct options *o) {
    o->fp8 = !strcmp(text, "fp8");
    o->bf16 = !strcmp(text, "bf16");
    return o->fp8 || o->bf16 || say_error("--precision: expected bf16 or fp8, not '%s'", text);
}

static bool read_set(const char *text, struct options *o) {
    if (o->overrides.num_set == MAX_SET)
        return say_error("--set: at most %d", MAX_SET);
    o->set[o->overrides.num_set++] = text;
    return true;
}

static bool read_list(const char *name, const char *text, struct list *l) {
    return option_list(name, text, 1, l->value, MAX_LIST, &l->n);
}

enum {
    TOKENS = 256,
    EP,
    SLOTS,
    IMBALANCE,
    PRECISION,
    MOVES,
    MODEL,
    POLICY,
    SET,
    ONLINE,
    UPDATES,
    ROTATIONS,
    SETTLE,
    WORTH,
    JSON
};

static bool read_online(int c, struct options *o) {
    switch (c) {
    case UPDATES:
        return option_int("--updates", optarg, 1, 1 << 16, &o->follow.updates);
    case ROTATIONS:
        return option_int("--rotations", optarg, 1, 100, &o->follow.rotations);
    case SETTLE:
        return option_int("--settle", optarg, 0, 1 << 16, &o->follow.settle);
    case WORTH:
        return option_double("--worth", optarg, 1e-9, 1e6, &o->follow.worth);
    default:
        return o->online = true;
    }
}

static bool read_option(int c, struct options *o) {
    switch (c) {
    case TOKENS:
        return read_list("--tokens", optarg, &o->tokens);
    case EP:
        return read_list("--ep", optarg, &o->ep);
    case SLOTS:
        return read_list("--slots", optarg, &o->slots);
    case IMBALANCE:
        return option_double("--imbalance", optarg, 1, MAX_COST_RANKS, &o->imbalance);
    case PRECISION:
        return read_precision(optarg, o);
    case MOVES:
        return option_int("--moves", optarg, 1, 1 << 20, &o->moves);
    case MODEL:
        o->overrides.model = optarg;
        return true;
    case POLICY:
        o->overrides.policy = optarg;
        return true;
    case SET:
        return read_set(optarg, o);
    case JSON:
        return o->json = true;
    default:
        return read_online(c, o);
    }
}

/* Options of one kind have nothing to say to the other. */
static bool check_options(struct options *o, int *code) {
    static const struct list default_tokens = {{1, 8, 32, 128, 512, 2048}, 6};
    const struct online_options *f = &o->follow;
    *code = 2;
    if (!o->online && (f->updates || f->rotations || f->settle || f->worth > 0))
        return say_error("--updates, --rotations, --settle and --worth go with --online");
    if (o->online &&
        (o->tokens.n || o->ep.n > 1 || o->slots.n > 1 || o->imbalance > 0 || o->fp8 || o->bf16))
        return say_error(
            "--online takes one number of ranks and slots, and neither --tokens nor "
            "--imbalance nor --precision");
    if (!o->tokens.n)
        o->tokens = default_tokens;
    o->follow.moves = o->moves ? o->moves : -1;
    o->follow.rotations = f->rotations ? f->rotations : 2;
    o->follow.json = o->json;
    o->moves = o->moves ? o->moves : 2;
    return true;
}

static bool parse(int argc, char **argv, struct options *o, int *code) {
    static const struct option longs[] = {{"tokens", 1, 0, TOKENS},
                                          {"ep", 1, 0, EP},
                                          {"slots", 1, 0, SLOTS},
                                          {"imbalance", 1, 0, IMBALANCE},
                                          {"precision", 1, 0, PRECISION},
                                          {"moves", 1, 0, MOVES},
                                          {"model", 1, 0, MODEL},
                                          {"policy", 1, 0, POLICY},
                                          {"set", 1, 0, SET},
                                          {"online", 0, 0, ONLINE},
                                          {"updates", 1, 0, UPDATES},
                                          {"rotations", 1, 0, ROTATIONS},
                                          {"settle", 1, 0, SETTLE},
                                          {"worth", 1, 0, WORTH},
                                          {"json", 0, 0, JSON},
                                          {"help", 0, 0, 'h'},
                                          {0}};
    int c;
    *o = (struct options){0};
    o->overrides.set = o->set;
    *code = 2;
    while ((c = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
        if (c == 'h' || c == '?') {
            *code = say_usage(usage, c == 'h');
            return false;
        }
        if (!read_option(c, o))
            return false;
    }
    if (optind + 1 != argc) {
        say_usage(usage, false);
        return false;
    }
    o->path = argv[optind];
    return check_options(o, code);
}

/* ---- points ---- */

/* The deployment with other ranks and slots (0: as it is), through its reader, which checks them. */
static struct deployment *read_with(struct sim *s, struct diags *d, int ranks, int slots) {
    struct overrides o = s->o->overrides;
    const char *set[MAX_SET + SET_SLOTS];
    memcpy(set, s->o->set, sizeof set);
    o.set = set;
    o.ep = ranks;
    if (slots)
        set[o.num_set++] =
            arena_printf(&s->arena, "moe_config.load_balancer.num_slots=%d", slots);
    return deployment_read(&s->arena, d, s->o->path, &o);
}

/* With loads or given assignments the placement is what counts. */
static bool place(struct sim *s, struct diags *d, const struct deployment *dep,
                  struct config *c) {
    if (!dep->loads && !dep->num_assignments)
        return true;
    if (s->o->imbalance > 0) {
        diag_error(d, (struct loc){0},
                   "--imbalance: it follows from the deployment's loads and placement");
        return false;
    }
    const struct placement *p = place_layers(&s->arena, d, dep, core_count());
    if (!p)
        return false;
    size_t total = (size_t)p->ranks * (size_t)p->slots_per_rank;
    struct cost_placement q = {.num_layers = p->num_layers,
                               .ranks = p->ranks,
                               .slots_per_rank = p->slots_per_rank,
                               .layers = p->layers,
                               .dispatch = dep->dispatch,
                               .loads = dep->loads};
    q.expert_of_slot = arena_array(&s->arena, const int *, p->num_layers);
    q.share_of_slot = arena_array(&s->arena, const double *, p->num_layers);
    for (int i = 0; i < p->num_layers; i++) {
        q.expert_of_slot[i] = p->expert_of_slot + (size_t)i * total;
        q.share_of_slot[i] = p->share_of_slot + (size_t)i * total;
    }
    c->num_placed = cost_placed(&s->arena, &c->setup, &q, &c->placed);
    return true;
}

static bool add_config(struct sim *s, int ranks, int slots) {
    struct diags d = {.arena =
                          &s->arena}; /* warnings were given once; the table says the rest */
    struct deployment *dep = read_with(s, &d, ranks, slots);
    if (!dep) {
        s->diags = d;
        return false;
    }
    struct config *c = &s->configs[s->num_configs++];
    cost_setup(&c->setup, dep);
    c->setup.imbalance = s->o->imbalance > 0 ? s->o->imbalance : 1;
    c->setup.fp8 = s->o->fp8 || (c->setup.fp8 && !s->o->bf16);
    c->slots = c->setup.ranks * c->setup.slots_per_rank;
    c->layers = dep->model->num_moe_layers;
    cost_memory(&c->setup, &c->memory);
    s->model = dep->model->name;
    s->gpu = dep->cluster->gpu ? dep->cluster->gpu : dep->cluster->name;
    const char *lacks = cost_lacks(&c->setup);
    if (!lacks && place(s, &d, dep, c))
        return true;
    if (!lacks) {
        s->diags = d;
        return false;
    }
    diag_error(&s->diags, dep->cluster->loc,
               "without '%s' of the cluster there is no step time; name a GPU (--set "
               "cluster.gpu=h200) or give the figure",
               lacks);
    return false;
}

/* Slots that these ranks cannot share evenly make no point of a sweep, which is said. */
static bool divisible(const struct options *o, int ranks, int slots) {
    if ((o->ep.n < 2 && o->slots.n < 2) || !slots || slots % ranks == 0)
        return true;
    fprintf(stderr, "moec: note: %d slots are not divisible by %d ranks: left out\n", slots,
            ranks);
    return false;
}

static bool make_configs(struct sim *s) {
    const struct options *o = s->o;
    const struct deployment *dep = read_with(s, &s->diags, o->ep.value[0], 0);
    int eps = o->ep.n ? o->ep.n : 1, slots = o->slots.n ? o->slots.n : 1;
    s->configs = arena_array(&s->arena, struct config, eps * slots);
    for (int i = 0; dep && i < eps; i++)
        for (int j = 0; j < slots; j++)
            if (divisible(o, o->ep.n ? o->ep.value[i] : dep->cluster->ranks,
                          o->slots.value[j]) &&
                !add_config(s, o->ep.value[i], o->slots.value[j]))
                return false;
    return dep &&
           (s->num_configs > 0 || say_error("no combination of --ep and --slots is possible"));
}

static bool fits(const struct config *c) {
    const struct cost_memory *m = &c->memory;
    return m->capacity == 0 || m->weights + m->workspace + m->exchange <= m->capacity;
}

static double bytes_of(const struct config *c) {
    return c->memory.weights + c->memory.workspace + c->memory.exchange;
}

/* At least as good in all three, better in one. */
static bool beats(const struct point *a, const struct point *b) {
    double ma = bytes_of(a->config), mb = bytes_of(b->config);
    bool no_worse = a->rate >= b->rate && a->step_us <= b->step_us && ma <= mb;
    return no_worse && (a->rate > b->rate || a->step_us < b->step_us || ma < mb);
}

static void find_pareto(struct sim *s) {
    for (int i = 0; i < s->num_points; i++) {
        s->points[i].pareto = fits(s->points[i].config);
        for (int j = 0; j < s->num_points && s->points[i].pareto; j++)
            if (fits(s->points[j].config) && beats(&s->points[j], &s->points[i]))
                s->points[i].pareto = false;
    }
}

static void make_points(struct sim *s) {
    const struct list *tokens = &s->o->tokens;
    s->points = arena_array(&s->arena, struct point, s->num_configs * tokens->n);
    for (int i = 0; i < s->num_configs; i++)
        for (int j = 0; j < tokens->n; j++) {
            struct point *p = &s->points[s->num_points++];
            p->config = &s->configs[i];
            p->tokens = tokens->value[j];
            if (p->config->placed)
                cost_layers(p->config->placed, p->config->num_placed, p->tokens, &p->cost);
            else
                cost_layers(&p->config->setup, 1, p->tokens, &p->cost);
            p->step_us = p->cost.layer_us * p->config->layers;
            p->rate = p->tokens * 1e6 / p->step_us;
        }
    find_pareto(s);
}

/* ---- migration ---- */

struct migration {
    double bytes, us; /* over all layers; us: the ranks receive equal parts */
};
static struct migration migrate(const struct config *c, double slots_per_layer) {
    double slots = slots_per_layer * c->layers;
    return (struct migration){slots * cost_slot_bytes(&c->setup),
                              cost_migration_us(&c->setup, slots / c->setup.ranks)};
}

/* ---- text ---- */

static const char *exchange_name(const struct cost *c) {
    return c->exchange < 0 ? "-" : exchange_names[c->exchange];
}

static void print_point(const struct point *p) {
    const struct cost *c = &p->cost;
    printf("%5d %6d %6d %6d %7.3f %7.1f %9.1f %-7s %9.1f %-9s %7.1f %9.3f %9.0f %8.1f%s%s\n",
           p->config->setup.ranks, p->config->slots, p->tokens, c->passes, c->imbalance, c->hit,
           c->gemm_us, c->compute_us > c->memory_us ? "compute" : "memory",
           c->exchange < 0 ? 0 : c->exchange_us[c->exchange], exchange_name(c),
           c->combine_us + c->launch_us, p->step_us / 1e3, p->rate, bytes_of(p->config) / 1e9,
           fits(p->config) ? "" : " over", p->pareto ? " *" : "");
}

static int by_latency(const void *a, const void *b) {
    const struct point *const *p = a, *const *q = b;
    double x = (*p)->step_us, y = (*q)->step_us;
    return x < y ? -1 : x > y ? 1 : *p < *q ? -1 : *p > *q;
}

static void print_pareto(struct sim *s) {
    const struct point **best = arena_array(&s->arena, const struct point *, s->num_points);
    int n = 0;
    for (int i = 0; i < s->num_points; i++)
        if (s->points[i].pareto)
            best[n++] = &s->points[i];
    qsort(best, (size_t)n, sizeof *best, by_latency);
    printf("\nPareto: no other point has more tokens/s/GPU, a shorter step and less memory\n");
    printf("%9s %9s %8s %5s %6s %6s\n", "step ms", "tok/s/GPU", "GB/rank", "ranks", "slots",
           "tokens");
    for (int i = 0; i < n; i++)
        printf("%9.3f %9.0f %8.1f %5d %6d %6d\n", best[i]->step_us / 1e3, best[i]->rate,
               bytes_of(best[i]->config) / 1e9, best[i]->config->setup.ranks,
               best[i]->config->slots, best[i]->tokens);
    if (!n)
        printf("  none: no combination fits into memory\n");
}

static void print_migration(const struct sim *s) {
    printf("\nMigration, spread evenly over the receiving ranks\n");
    printf("%5s %6s %8s  %s\n", "ranks", "slots", "MB/slot",
           "moved slots a layer: GB in all, ms");
    for (int i = 0; i < s->num_configs; i++) {
        const struct config *c = &s->configs[i];
        struct migration some = migrate(c, s->o->moves), all = migrate(c, c->slots);
        printf("%5d %6d %8.1f  %d: %.2f GB, %.2f ms; all: %.1f GB, %.1f ms\n", c->setup.ranks,
               c->slots, cost_slot_bytes(&c->setup) / 1e6, s->o->moves, some.bytes / 1e9,
               some.us / 1e3, all.bytes / 1e9, all.us / 1e3);
    }
}

static void print_text(struct sim *s) {
    printf(
        "%s: %d MoE layers on %s, %s; times of a layer in one pass on the slowest rank in us,\n"
        "a step is all layers and passes; attention and the rest of a step are not in it\n\n",
        s->model, s->configs[0].layers, s->gpu, s->configs[0].setup.fp8 ? "fp8" : "bf16");
    printf("%5s %6s %6s %6s %7s %7s %9s %-7s %9s %-9s %7s %9s %9s %8s\n", "ranks", "slots",
           "tokens", "passes", "imbal", "hit", "GEMMs", "by", "exchange", "method", "other",
           "step ms", "tok/s/GPU", "GB/rank");
    for (int i = 0; i < s->num_points; i++)
        print_point(&s->points[i]);
    print_pareto(s);
    print_migration(s);
}

/* ---- JSON ---- */

static void json_cost(struct buf *b, const struct cost *c) {
#define X(name) buf_printf(b, ", \"" #name "\": %.6g", c->name);
    COST_FIGURES(X)
#undef X
    buf_printf(b, ", \"exchange\": ");
    if (c->exchange < 0)
        buf_printf(b, "null");
    else
        buf_printf(b, "\"%s\"", exchange_names[c->exchange]);
    buf_printf(b, ", \"exchange_us\": {");
    for (int i = 0; i < MOE_EXCHANGE_COUNT; i++) {
        buf_printf(b, "%s\"%s\": ", i ? ", " : "", exchange_names[i]);
        buf_printf(b, c->exchange_us[i] < 0 ? "null" : "%.6g", c->exchange_us[i]);
    }
    buf_printf(b, "}, \"pass_us\": %.6g, \"layer_us\": %.6g", c->pass_us, c->layer_us);
}

static const char *yes_no(bool yes) {
    return yes ? "true" : "false";
}

static void json_point(struct buf *b, const struct point *p) {
    const struct cost_memory *m = &p->config->memory;
    buf_printf(b, "{\"ranks\": %d, \"slots\": %d, \"tokens\": %d, \"passes\": %d",
               p->config->setup.ranks, p->config->slots, p->tokens, p->cost.passes);
    json_cost(b, &p->cost);
    buf_printf(b,
               ", \"step_us\": %.6g, \"tokens_per_s_per_gpu\": %.6g, \"weight_memory_bytes\": "
               "%.0f, \"workspace_bytes\": %.0f, \"exchange_bytes\": %.0f, \"fits\": %s, "
               "\"pareto\": %s}",
               p->step_us, p->rate, m->weights, m->workspace, m->exchange,
               m->capacity == 0 ? "null" : yes_no(fits(p->config)), yes_no(p->pareto));
}

static void json_migration(struct buf *b, const struct sim *s, const struct config *c) {
    struct migration some = migrate(c, s->o->moves), all = migrate(c, c->slots);
    buf_printf(b,
               "{\"ranks\": %d, \"slots\": %d, \"slot_bytes\": %.0f, \"moves\": %d, \"bytes\": "
               "%.0f, \"us\": %.6g, \"all_bytes\": %.0f, \"all_us\": %.6g}",
               c->setup.ranks, c->slots, cost_slot_bytes(&c->setup), s->o->moves, some.bytes,
               some.us, all.bytes, all.us);
}

static void print_json(struct sim *s) {
    struct buf b = {.arena = &s->arena};
    buf_printf(&b, "{\"model\": ");
    buf_json_string(&b, s->model);
    buf_printf(&b, ", \"gpu\": ");
    buf_json_string(&b, s->gpu);
    buf_printf(&b, ", \"layers\": %d, \"precision\": \"%s\", \"points\": [",
               s->configs[0].layers, s->configs[0].setup.fp8 ? "fp8" : "bf16");
    for (int i = 0; i < s->num_points; i++) {
        buf_printf(&b, i ? ",\n  " : "\n  ");
        json_point(&b, &s->points[i]);
    }
    buf_printf(&b, "],\n \"migration\": [");
    for (int i = 0; i < s->num_configs; i++) {
        buf_printf(&b, i ? ",\n  " : "\n  ");
        json_migration(&b, s, &s->configs[i]);
    }
    buf_printf(&b, "]}\n");
    fputs(b.data, stdout);
}

static bool run_online(struct sim *s) {
    const struct deployment *dep =
        read_with(s, &s->diags, s->o->ep.value[0], s->o->slots.value[0]);
    return dep && simulate_online(&s->arena, &s->diags, dep, &s->o->follow);
}

int cmd_simulate(int argc, char **argv) {
    struct options o;
    int code;
    if (!parse(argc, argv, &o, &code))
        return code;
    struct sim s = {.o = &o};
    s.diags.arena = &s.arena;
    bool ok = o.online ? run_online(&s) : make_configs(&s);
    diag_print(&s.diags, stderr);
    if (ok && !o.online) {
        make_points(&s);
        o.json ? print_json(&s) : print_text(&s);
    }
    arena_free(&s.arena);
    return ok ? 0 : 1;
}
