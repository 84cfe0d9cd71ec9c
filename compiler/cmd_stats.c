/* moec stats: recorded loads shown, merged, converted, made up. */
#include <getopt.h>
#include <limits.h>
#include <string.h>

#include "device.h"
#include "loads.h"

static const char usage[] =
    "usage: moec stats show INPUT... [option...]\n"
    "       moec stats merge INPUT... -o FILE [option...]\n"
    "       moec stats convert INPUT -o FILE --to csv|json|sglang|trtllm [option...]\n"
    "       moec stats synth -o FILE|DIR [option...]\n"
    "\n"
    "An INPUT is a TensorRT-LLM statistics folder, SGLang's recorder JSON, a CSV (a line per "
    "MoE\n"
    "layer, a count per expert) or moec's own JSON; moec-plan(5) describes them.\n"
    "\n"
    "show, merge, convert:\n"
    "  --model FILE          check against this model, and number the layers as it does\n"
    "  --iter-start N, --iter-stop N   iterations from N, up to and without N\n"
    "  --recorded-with FILE  the load balancer file that was on: counts are of its slots\n"
    "show:\n"
    "  --ep N                over N ranks; default: those of a TensorRT-LLM folder\n"
    "  --placement FILE      on this load balancer file or JSON of moec plan\n"
    "  --every N             every N iterations are judged alone, then averaged\n"
    "  --per-expert          single slots and the hottest experts, too\n"
    "  --cooccurrence        experts that tokens choose together, from "
    "rank{r}_raw.safetensors\n"
    "  --pairs N             how many pairs of each layer; default 5\n"
    "  --json                the result as JSON\n"
    "merge:\n"
    "  -o, --out FILE        moec's own JSON\n"
    "  --weights W,W,...     multiply the INPUTs' counts; default: their own weights, or 1\n"
    "convert:\n"
    "  -o, --out FILE        a folder for trtllm\n"
    "  --to FORMAT           csv, json (moec's own), sglang or trtllm\n"
    "  --every N             every N iterations stay apart (sglang and trtllm)\n"
    "  --top-k K             experts per token, for trtllm; default: the model's or recorded\n"
    "synth:\n"
    "  -o, --out FILE|DIR    moec's own JSON; with --windows a folder of them\n"
    "  --model FILE          or --experts E --layers L [--top-k K]\n"
    "  --kind KIND           zipf, lognormal (default), drift or mixture\n"
    "  --skew X              zipf: exponent, default 0.5; else sigma of the log, default 0.65\n"
    "  --tokens N            in each window; default 1048576\n"
    "  --windows W           default 1\n"
    "  --seed S              default 1\n";

enum { MAX_RANKS = 4096 };
enum { SHOW = 1, MERGE = 2, CONVERT = 4, SYNTH = 8, READ = SHOW | MERGE | CONVERT };
static const char *const verbs[] = {"show", "merge", "convert", "synth"};

/* name, takes a value, of which verbs, letter */
#define OPTIONS(X) \
    X(model, "model", 1, READ | SYNTH) \
    X(iter_start, "iter-start", 1, READ) \
    X(iter_stop, "iter-stop", 1, READ) \
    X(recorded_with, "recorded-with", 1, READ) \
    X(ep, "ep", 1, SHOW) \
    X(placement, "placement", 1, SHOW) \
    X(every, "every", 1, SHOW | CONVERT) \
    X(per_expert, "per-expert", 0, SHOW) \
    X(cooccurrence, "cooccurrence", 0, SHOW) \
    X(pairs, "pairs", 1, SHOW) \
    X(json, "json", 0, SHOW) \
    X(out, "out", 1, MERGE | CONVERT | SYNTH) \
    X(weights, "weights", 1, MERGE) \
    X(to, "to", 1, CONVERT) \
    X(top_k, "top-k", 1, CONVERT | SYNTH) \
    X(experts, "experts", 1, SYNTH) \
    X(layers, "layers", 1, SYNTH) \
    X(kind, "kind", 1, SYNTH) \
    X(skew, "skew", 1, SYNTH) \
    X(tokens, "tokens", 1, SYNTH) \
    X(windows, "windows", 1, SYNTH) \
    X(seed, "seed", 1, SYNTH)

enum option_id {
#define X(name, ...) OPTION_##name,
    OPTIONS(X)
#undef X
        OPTION_COUNT
};
static const struct {
    const char *name;
    int value, verbs;
} option_table[] = {
#define X(id, name, value, verbs) {name, value, verbs},
    OPTIONS(X)
#undef X
};

struct command {
    int verb;
    const char *text[OPTION_COUNT]; /* as given; NULL: not */
    const char *const *inputs;
    int num_inputs;
    struct arena *arena;
    struct diags *diags;
    const struct model *model;
    struct loads_options read;
    struct slots recorded_with;
    int top_k;
};

/* ---- command line ---- */

static bool wrong_usage(const char *what, const char *arg) {
    fprintf(stderr, "moec stats: %s%s\n%s", what, arg, usage);
    return false;
}

/* Puts the options into text. False after a message, or with *code 0 for help. */
static bool parse_options(struct command *c, int argc, char **argv, int *code) {
    struct option longs[OPTION_COUNT + 2] = {{"help", 0, 0, 'h'}};
    for (int i = 0; i < OPTION_COUNT; i++)
        longs[i + 1] = (struct option){option_table[i].name, option_table[i].value, 0, 256 + i};
    for (int id; (id = getopt_long(argc, argv, "ho:", longs, NULL)) != -1;) {
        if (id == 'h') {
            *code = say_usage(usage, true);
            return false;
        }
        if (id == '?') {
            say_usage(usage, false);
            return false;
        }
        id = id == 'o' ? OPTION_out : id - 256;
        if (!(option_table[id].verbs & 1 << c->verb))
            return say_error("moec stats %s has no option --%s", verbs[c->verb],
                             option_table[id].name);
        c->text[id] = optarg ? optarg : "";
    }
    c->inputs = (const char *const *)argv + optind;
    c->num_inputs = argc - optind;
    return true;
}

static bool given(const struct command *c, enum option_id id) {
    return c->text[id];
}

/* The option's number, or *out as it is. */
static bool number(const struct command *c, enum option_id id, int min, int max, int *out) {
    return !c->text[id] || option_int(arena_printf(c->arena, "--%s", option_table[id].name),
                                      c->text[id], min, max, out);
}

static bool choice(const struct command *c, enum option_id id, const char *const *names, int n,
                   int *out) {
    struct buf all = {.arena = c->arena};
    for (int i = 0; i < n; i++) {
        if (!strcmp(c->text[id], names[i])) {
            *out = i;
            return true;
        }
        buf_printf(&all, "%s%s", i ? i + 1 < n ? ", " : " or " : "", names[i]);
    }
    return say_error("--%s: expected %s, not '%s'", option_table[id].name, all.data,
                     c->text[id]);
}

/* ---- what all verbs read ---- */

static bool read_model(struct command *c) {
    if (!given(c, OPTION_model))
        return true;
    c->model = model_read(c->arena, c->diags, c->text[OPTION_model]);
    return c->model;
}

static bool read_recorded_with(struct command *c) {
    struct slots *s = &c->recorded_with;
    if (!given(c, OPTION_recorded_with))
        return true;
    if (!slots_read(c->arena, c->diags, c->text[OPTION_recorded_with], s))
        return false;
    if (s->updates) {
        diag_error(c->diags, s->loc,
                   "layer_updates_per_iter is %d: slots changed their experts while recording, "
                   "so that the counts cannot be told apart",
                   s->updates);
        return false;
    }
    c->read.assignments = s->assignments;
    c->read.num_assignments = s->num_assignments;
    c->read.num_slots = s->num_slots;
    return true;
}

static struct loads *read_loads(struct command *c) {
    if (!read_model(c) || !read_recorded_with(c))
        return NULL;
    return loads_read(c->arena, c->diags, c->inputs, NULL, c->num_inputs, c->model, &c->read);
}

/* ---- verbs: exit code 0, 1 or 2 ---- */

static int run_show(struct command *c) {
    struct slots placement;
    struct show_options o = {.read = &c->read,
                             .pairs = 5,
                             .per_expert = given(c, OPTION_per_expert),
                             .json = given(c, OPTION_json)};
    if (!number(c, OPTION_ep, 1, MAX_RANKS, &o.ep) ||
        !number(c, OPTION_pairs, 1, INT_MAX, &o.pairs))
        return 2;
    if (!given(c, OPTION_cooccurrence))
        o.pairs = 0;
    const struct loads *l = read_loads(c);
    if (!l)
        return 1;
    o.model = c->model;
    if (given(c, OPTION_placement)) {
        if (!slots_read(c->arena, c->diags, c->text[OPTION_placement], &placement))
            return 1;
        o.placement = &placement;
    }
    return !stats_show(c->arena, c->diags, l, c->inputs, &o);
}

/* --weights: one for each input; -1 where its own weight counts. */
static bool read_weights(struct command *c, double *weight) {
    int n = 0;
    for (int i = 0; i < c->num_inputs; i++)
        weight[i] = -1;
    if (!given(c, OPTION_weights))
        return true;
    char *rest = arena_strdup(c->arena, c->text[OPTION_weights]);
    for (char *word; (word = strsep(&rest, ",")); n++)
        if (n < c->num_inputs && !option_double("--weights", word, 0, 1e6, &weight[n]))
            return false;
    return n == c->num_inputs ||
           say_error("--weights: %d numbers for %d inputs", n, c->num_inputs);
}

static int run_merge(struct command *c) {
    double *weight = arena_array(c->arena, double, c->num_inputs);
    if (!read_weights(c, weight))
        return 2;
    struct loads *l = read_loads(c);
    if (!l)
        return 1;
    size_t n = (size_t)l->num_layers * (size_t)l->experts;
    double *sum = arena_array(c->arena, double, n);
    for (int w = 0; w < l->num_workloads; w++) {
        double factor = weight[w] < 0 ? l->workloads[w].weight : weight[w];
        for (size_t i = 0; i < n; i++)
            sum[i] += factor * l->workloads[w].count[i];
    }
    for (size_t i = 0; i < n; i++)
        if (sum[i] > LOADS_MAX_COUNT)
            return 1 + say_error("layer %d: more than %g tokens in sum",
                                 l->layers[i / (size_t)l->experts], LOADS_MAX_COUNT);
    l->workloads[0] = (struct workload){.weight = 1, .count = sum};
    l->num_workloads = 1;
    return !loads_write(c->arena, c->diags, l, c->model, LOADS_json, c->text[OPTION_out]);
}

static int run_convert(struct command *c) {
    int to;
    if (!given(c, OPTION_to)) {
        say_error("moec stats convert: --to is missing");
        return 2;
    }
    if (!choice(c, OPTION_to, loads_format_names, LOADS_FORMAT_COUNT, &to))
        return 2;
    struct loads *l = read_loads(c);
    if (!l)
        return 1;
    if (c->top_k && c->model && c->top_k != c->model->num_experts_per_tok)
        return 1 + say_error("--top-k: %s has %d experts per token", c->model->name,
                             c->model->num_experts_per_tok);
    if (c->top_k)
        l->experts_per_token = c->top_k;
    return !loads_write(c->arena, c->diags, l, c->model, (enum loads_format)to,
                        c->text[OPTION_out]);
}

/* The shape of the loads to make, from the model or from options. */
static bool synth_shape(struct command *c, struct synth *s, struct loads *l) {
    const struct model *m = c->model;
    if (m) {
        *l = (struct loads){m->num_moe_layers, m->num_experts, m->num_experts_per_tok,
                            m->moe_layers,     NULL,           0};
    } else {
        l->layers = arena_array(c->arena, int, l->num_layers);
        for (int i = 0; i < l->num_layers; i++)
            l->layers[i] = i;
    }
    s->experts = l->experts;
    s->num_layers = l->num_layers;
    s->top_k = l->experts_per_token;
    return s->top_k <= s->experts ||
           say_error("--top-k: %d of %d experts", s->top_k, s->experts);
}

static bool write_windows(struct command *c, struct loads *l, const double *count,
                          int windows) {
    const char *out = c->text[OPTION_out];
    struct workload w = {.weight = 1};
    l->workloads = &w;
    l->num_workloads = 1;
    if (windows > 1 && !loads_out_dir(c->diags, out))
        return false;
    for (int i = 0; i < windows; i++) {
        const char *path =
            windows == 1 ? out : arena_printf(c->arena, "%s/window-%03d.json", out, i);
        w.count = (double *)count + (size_t)i * (size_t)l->num_layers * (size_t)l->experts;
        if (!loads_write(c->arena, c->diags, l, c->model, LOADS_json, path))
            return false;
    }
    return true;
}

static int run_synth(struct command *c) {
    struct synth s = {.skew = -1, .seed = 1};
    struct loads l = {.experts_per_token = c->top_k};
    int kind = SYNTH_lognormal, tokens = 1 << 20, windows = 1, seed = 1;
    if ((given(c, OPTION_kind) &&
         !choice(c, OPTION_kind, synth_kind_names, SYNTH_KIND_COUNT, &kind)) ||
        (given(c, OPTION_skew) &&
         !option_double("--skew", c->text[OPTION_skew], 0, 8, &s.skew)) ||
        !number(c, OPTION_tokens, 1, INT_MAX, &tokens) ||
        !number(c, OPTION_windows, 1, LOADS_MAX_WINDOWS, &windows) ||
        !number(c, OPTION_seed, 0, INT_MAX, &seed) ||
        !number(c, OPTION_experts, 1, LOADS_MAX_EXPERTS, &l.experts) ||
        !number(c, OPTION_layers, 1, LOADS_MAX_LAYER, &l.num_layers))
        return 2;
    bool shape = given(c, OPTION_experts) && given(c, OPTION_layers);
    if (given(c, OPTION_model) ? l.experts || l.num_layers || c->top_k : !shape) {
        say_error("moec stats synth: give --model, or --experts and --layers");
        return 2;
    }
    if (!l.experts_per_token)
        l.experts_per_token = l.experts && l.experts < 8 ? l.experts : 8;
    if (!read_model(c) || !synth_shape(c, &s, &l))
        return 1;
    s.kind = (enum synth_kind)kind;
    s.tokens = tokens;
    s.seed = (uint64_t)seed;
    double *count =
        arena_array(c->arena, double, (size_t)windows *(size_t)l.num_layers *(size_t)l.experts);
    synth_run(&s, windows, count);
    return !write_windows(c, &l, count, windows);
}

static bool check_arguments(struct command *c) {
    int start = 0, stop = 0, every = 0;
    if (c->verb == 3 ? c->num_inputs : !c->num_inputs)
        return wrong_usage(c->verb == 3 ? "synth takes no input: " : "no input given",
                           c->verb == 3 ? c->inputs[0] : "");
    if (c->verb == 2 && c->num_inputs > 1)
        return wrong_usage("convert takes one input; merge them first: ", c->inputs[1]);
    if (c->verb && !given(c, OPTION_out))
        return wrong_usage("-o is missing", "");
    if (!number(c, OPTION_iter_start, 0, INT_MAX, &start) ||
        !number(c, OPTION_iter_stop, 1, INT_MAX, &stop) ||
        !number(c, OPTION_every, 1, INT_MAX, &every) ||
        !number(c, OPTION_top_k, 1, LOADS_MAX_EXPERTS, &c->top_k))
        return false;
    c->read.iter_start = start;
    c->read.iter_stop = stop;
    c->read.window = every;
    return true;
}

int cmd_stats(int argc, char **argv) {
    static int (*const run[])(struct command * c) = {run_show, run_merge, run_convert,
                                                     run_synth};
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct command c = {.arena = &a, .diags = &d};
    int code = 2, num_verbs = sizeof verbs / sizeof *verbs;
    if (argc < 2)
        return say_usage(usage, false);
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))
        return say_usage(usage, true);
    while (c.verb < num_verbs && strcmp(verbs[c.verb], argv[1]))
        c.verb++;
    if (c.verb == num_verbs) {
        wrong_usage("expected show, merge, convert or synth, not ", argv[1]);
        return 2;
    }
    if (parse_options(&c, argc - 1, argv + 1, &code) && check_arguments(&c)) {
        code = run[c.verb](&c);
        diag_print(&d, stderr);
    }
    arena_free(&a);
    return code;
}
