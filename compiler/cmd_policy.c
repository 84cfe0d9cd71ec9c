/* moec policy check: what a policy defines, what falls back to the built-in, and how its functions
 * do on a small made-up model and on a given one. */
#include <getopt.h>
#include <string.h>

#include "device.h"
#include "policy.h"

static const char usage[] =
    "usage: moec policy check FILE.lua [--model M] [--ep N] [--slots S] [--json]\n"
    "\n"
    "Runs every function of a policy with made-up loads, on a small model and, with --model, "
    "on a\n"
    "given one, and checks what comes back. FILE may be the name of a shipped policy.\n"
    "\n"
    "      --model M   a model file or a config.json\n"
    "      --ep N      its ranks (default: 8)\n"
    "      --slots S   its slots over all ranks (default: one spare slot a rank)\n"
    "      --json      the result as JSON\n"
    "      --help\n";

enum { OPT_MODEL = 256, OPT_EP, OPT_SLOTS, OPT_JSON, OPT_HELP };

struct options {
    const char *file, *model;
    int ranks, slots;
    bool json;
};

/* One model that the policy was tried on. */
struct trial {
    const struct model *model;
    int ranks, slots;
    bool ok;
    double imbalance, worst, bound; /* means over layers, and the worst layer */
};
enum { MAX_TRIALS = 2 };

struct check {
    struct arena *arena;
    struct diags diags;
    const struct options *o;
    struct policy *policy;
    struct trial trials[MAX_TRIALS];
    int num_trials;
};

/* ---- made-up inputs ---- */

static const char small_model[] = "name: small\nnum_hidden_layers: 6\nmoe_layers: odd\n"
                                  "hidden_size: 256\nmoe_intermediate_size: 128\n"
                                  "num_experts: 16\nnum_experts_per_tok: 2\n"
                                  "router: {method: softmax_topk}\n";

/* Two workloads in which the i-th hottest expert has 1/(i+1) of the hottest one's tokens; which
 * expert that is differs by layer and workload. */
static struct loads *make_loads(struct arena *a, const struct model *m) {
    static const char *const names[] = {"first", "second"};
    struct loads *l = arena_array(a, struct loads, 1);
    int E = m->num_experts;
    l->num_layers = m->num_moe_layers;
    l->experts = E;
    l->layers = m->moe_layers;
    l->num_workloads = 2;
    l->workloads = arena_array(a, struct workload, 2);
    for (int w = 0; w < 2; w++) {
        double *count = arena_array(a, double, (size_t)l->num_layers *E);
        l->workloads[w] = (struct workload){.name = names[w], .weight = 1, .count = count};
        for (int i = 0; i < l->num_layers; i++)
            for (int e = 0; e < E; e++) {
                int heat = (e * 7 + i * 5 + w * 3) % E;
                count[(size_t)i * E + e] = 1000000 / (heat + 1);
            }
    }
    return l;
}

static struct cluster *make_cluster(struct arena *a, int ranks) {
    struct cluster *c = cluster_default(a);
    c->ranks = ranks;
    c->ranks_per_node = ranks % 8 ? ranks : 8;
    c->nvlink_domain = c->ranks_per_node;
    return c;
}

/* ---- trying ---- */

static void judge(struct trial *t, const struct placement *p) {
    for (int i = 0; i < p->num_layers; i++) {
        t->imbalance += p->imbalance[i] / p->num_layers;
        t->bound += p->bound[i] / p->num_layers;
        t->worst = p->imbalance[i] > t->worst ? p->imbalance[i] : t->worst;
    }
}

/* exchange and variant, which no placement needs. */
static void try_rest(struct check *c, const struct policy_world *w) {
    static const int tokens[] = {1, 64, 4096};
    for (int i = 0; i < 3 && c->policy->defines[HOOK_exchange]; i++)
        if (policy_exchange(c->policy, c->arena, &c->diags, w, tokens[i]) < 0)
            break;
    for (int i = 0; i < 3 && c->policy->defines[HOOK_variant]; i++) {
        struct variant_choice v = {0};
        if (!policy_variant(c->policy, c->arena, &c->diags, w, MOE_TARGET_HOST, tokens[i], &v))
            break;
    }
}

static void try_model(struct check *c, const struct model *m, int ranks, int slots) {
    struct trial *t = &c->trials[c->num_trials++];
    int before = c->diags.errors;
    struct deployment dep = {
        .model = (struct model *)m,
        .cluster = make_cluster(c->arena, ranks),
        .num_slots = slots,
        .loads = make_loads(c->arena, m),
        .dispatch = DISPATCH_BALANCED,
        .moves = -1,
    };
    struct policy_world w = {m, dep.cluster, dep.loads, slots / ranks, slots};
    *t = (struct trial){.model = m, .ranks = ranks, .slots = slots};
    struct placement *p = place_with(c->arena, &c->diags, &dep, c->policy, 1);
    if (p)
        judge(t, p);
    try_rest(c, &w);
    t->ok = c->diags.errors == before;
}

static bool try_given(struct check *c) {
    const struct model *m = model_read(c->arena, &c->diags, c->o->model);
    if (!m)
        return false;
    int ranks = c->o->ranks ? c->o->ranks : 8, E = m->num_experts;
    int slots = c->o->slots ? c->o->slots : ((E + ranks - 1) / ranks + 1) * ranks;
    if (slots > ranks * E && !c->o->slots)
        slots = ranks * E;
    if (slots % ranks || slots < E || slots > ranks * E) {
        diag_error(&c->diags, (struct loc){0},
                   "--slots %d: the slots of %d experts on %d ranks run from %d to %d and are "
                   "divisible by %d",
                   slots, E, ranks, (E + ranks - 1) / ranks * ranks, ranks * E, ranks);
        return false;
    }
    try_model(c, m, ranks, slots);
    return true;
}

static bool is_shipped(const char *file) {
    for (const char *const *s = policy_shipped; *s; s++)
        if (!strcmp(*s, file))
            return true;
    return false;
}

/* Everything; false when the policy could not be opened or a file not be read. */
static bool try_all(struct check *c) {
    const char *file = c->o->file;
    c->policy =
        policy_open(c->arena, &c->diags, file, is_shipped(file) ? NULL : file, (struct loc){0});
    if (!c->policy)
        return false;
    struct node *root =
        yaml_parse(c->arena, &c->diags, "small.yaml", small_model, sizeof small_model - 1);
    struct model *m = root ? model_parse(c->arena, &c->diags, root) : NULL;
    if (m)
        try_model(c, m, 4, 24);
    return m && (!c->o->model || try_given(c));
}

/* ---- saying ---- */

static void print_text(const struct check *c) {
    const struct policy *p = c->policy;
    if (!p)
        return;
    printf("policy %s: %s\n", p->name, p->source->path);
    for (int h = 0; h < NUM_HOOKS; h++)
        if (p->defines[h])
            printf("  %-12s line %d\n", hook_names[h], p->line[h]);
        else
            printf("  %-12s built in\n", hook_names[h]);
    for (int i = 0; i < c->num_trials; i++) {
        const struct trial *t = &c->trials[i];
        printf("%s, %d layers of %d experts, %d slots on %d ranks: ", t->model->name,
               t->model->num_moe_layers, t->model->num_experts, t->slots, t->ranks);
        if (t->ok)
            printf("imbalance %.4f, worst layer %.4f, bound %.4f\n", t->imbalance, t->worst,
                   t->bound);
        else
            printf("failed\n");
    }
}

static void json_hooks(struct buf *b, const struct policy *p, bool defined) {
    const char *comma = "";
    for (int h = 0; h < NUM_HOOKS; h++)
        if (p && p->defines[h] == defined) {
            buf_printf(b, "%s\"%s\"", comma, hook_names[h]);
            comma = ", ";
        }
}

static void json_faults(struct buf *b, const struct diags *d) {
    const char *comma = "";
    for (const struct diag *g = d->first; g; g = g->next) {
        if (g->severity != DIAG_ERROR)
            continue;
        buf_printf(b, "%s\n  {\"file\": ", comma);
        buf_json_string(b, g->loc.source ? g->loc.source->path : "");
        buf_printf(b, ", \"line\": %d, \"col\": %d, \"text\": ", g->loc.line, g->loc.col);
        buf_json_string(b, g->text);
        buf_printf(b, "}");
        comma = ",";
    }
}

static void print_json(const struct check *c) {
    struct buf b = {.arena = c->arena};
    buf_printf(&b, "{\"policy\": ");
    buf_json_string(&b, c->policy ? c->policy->name : "");
    buf_printf(&b, ", \"file\": ");
    buf_json_string(&b, c->o->file);
    buf_printf(&b, ", \"defines\": [");
    json_hooks(&b, c->policy, true);
    buf_printf(&b, "], \"built_in\": [");
    json_hooks(&b, c->policy, false);
    buf_printf(&b, "], \"runs\": [");
    for (int i = 0; i < c->num_trials; i++) {
        const struct trial *t = &c->trials[i];
        buf_printf(&b, "%s\n  {\"model\": ", i ? "," : "");
        buf_json_string(&b, t->model->name);
        buf_printf(&b, ", \"layers\": %d, \"experts\": %d, \"ranks\": %d, \"num_slots\": %d, ",
                   t->model->num_moe_layers, t->model->num_experts, t->ranks, t->slots);
        buf_printf(&b, "\"ok\": %s", t->ok ? "true" : "false");
        if (t->ok)
            buf_printf(&b, ", \"imbalance\": %.6f, \"worst\": %.6f, \"bound\": %.6f",
                       t->imbalance, t->worst, t->bound);
        buf_printf(&b, "}");
    }
    buf_printf(&b, "], \"faults\": [");
    json_faults(&b, &c->diags);
    buf_printf(&b, "]}\n");
    fputs(b.data, stdout);
}

static int check(const struct options *o) {
    struct arena arena = {NULL};
    struct check c = {.arena = &arena, .diags = {.arena = &arena}, .o = o};
    bool done = try_all(&c) && !c.diags.errors;
    if (o->json)
        print_json(&c);
    else
        print_text(&c);
    fflush(stdout);
    diag_print(&c.diags, stderr);
    arena_free(&arena);
    return done ? 0 : 1;
}

static bool parse_option(struct options *o, int opt) {
    switch (opt) {
    case OPT_MODEL:
        o->model = optarg;
        return true;
    case OPT_EP:
        return option_int("--ep", optarg, 1, 1024, &o->ranks);
    case OPT_SLOTS:
        return option_int("--slots", optarg, 1, 1 << 20, &o->slots);
    case OPT_JSON:
        return o->json = true;
    default:
        return false;
    }
}

int cmd_policy(int argc, char **argv) {
    static const struct option options[] = {
        {"model", required_argument, NULL, OPT_MODEL}, {"ep", required_argument, NULL, OPT_EP},
        {"slots", required_argument, NULL, OPT_SLOTS}, {"json", no_argument, NULL, OPT_JSON},
        {"help", no_argument, NULL, OPT_HELP},         {NULL, 0, NULL, 0}};
    struct options o = {NULL};
    int opt;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (opt == OPT_HELP)
            return say_usage(usage, true);
        else if (!parse_option(&o, opt))
            return 2;
    if (argc - optind != 2 || strcmp(argv[optind], "check"))
        return say_usage(usage, false);
    if (!o.model && (o.ranks || o.slots)) {
        say_error("--ep and --slots are about --model");
        return 2;
    }
    o.file = argv[optind + 1];
    return check(&o);
}
