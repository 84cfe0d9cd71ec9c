/* moec plan: where the experts are, and nothing else, in moec's forms and in those of others. */
#include "device.h"

#include <errno.h>
#include <getopt.h>
#include <string.h>

static const char usage[] =
    "Usage: moec plan FILE [options]\n"
    "Places the experts of FILE, a deployment, a model file or a config.json, and prints where "
    "they\n"
    "are; nothing is compiled.\n"
    "\n"
    "  --format F     yaml (default), json, trtllm (moe_load_balancer.yaml), sglang\n"
    "                 (initial expert location) or vllm (expert map)\n"
    "  -o, --out FILE in place of standard output\n"
    "  --start FILE   start from this placement, in any of these formats, instead of from "
    "nothing\n"
    "  --moves N      slots a layer that may change, from --start or from the given "
    "assignments\n"
    "  --model M, --ep N, --policy P, --set KEY=VALUE   as for moec build\n"
    "  -j, --jobs N   threads (default: all cores); the result does not depend on it\n"
    "Exit status: 0 done, 1 failed, 2 wrong usage.\n";

enum { MAX_SET = 32 };

#define FORMATS(X) X(yaml) X(json) X(trtllm) X(sglang) X(vllm)

#define X(name) FORMAT_##name,
enum format { FORMATS(X) FORMAT_COUNT };
#undef X
static const char *const format_spelling[] = {
#define X(name) #name,
    FORMATS(X)
#undef X
};

struct options {
    const char *path, *out;
    enum format format;
    int jobs;
    struct overrides overrides;
    const char *set[MAX_SET];
};

/* ---- arguments ---- */

static bool take_format(const char *text, enum format *out) {
    for (int i = 0; i < FORMAT_COUNT; i++)
        if (!strcmp(text, format_spelling[i])) {
            *out = (enum format)i;
            return true;
        }
    const char *near = nearest(text, format_spelling, FORMAT_COUNT);
    return near ? say_error("--format: no format '%s'; did you mean '%s'?", text, near)
                : say_error("--format: no format '%s'", text);
}

enum { OPT_FORMAT = 256, OPT_START, OPT_MOVES, OPT_MODEL, OPT_EP, OPT_POLICY, OPT_SET };

/* One option with a value into o. */
static bool take(int opt, struct options *o) {
    switch (opt) {
    case 'o':
        o->out = optarg;
        return *optarg || say_error("-o wants a file");
    case 'j':
        return option_int("-j", optarg, 1, 1 << 10, &o->jobs);
    case OPT_FORMAT:
        return take_format(optarg, &o->format);
    case OPT_START:
        o->overrides.start = optarg;
        return true;
    case OPT_MOVES:
        o->overrides.improve = true;
        return option_int("--moves", optarg, 0, 1 << 20, &o->overrides.moves);
    case OPT_MODEL:
        o->overrides.model = optarg;
        return true;
    case OPT_EP:
        return option_int("--ep", optarg, 1, 1 << 16, &o->overrides.ep);
    case OPT_POLICY:
        o->overrides.policy = optarg;
        return true;
    case OPT_SET:
        if (o->overrides.num_set == MAX_SET)
            return say_error("--set: at most %d", MAX_SET);
        o->set[o->overrides.num_set++] = optarg;
        return true;
    default:
        say_usage(usage, false);
        return false;
    }
}

/* False with *code when the command ends here. */
static bool parse(int argc, char **argv, struct options *o, int *code) {
    static const struct option longs[] = {{"format", 1, 0, OPT_FORMAT},
                                          {"out", 1, 0, 'o'},
                                          {"start", 1, 0, OPT_START},
                                          {"moves", 1, 0, OPT_MOVES},
                                          {"model", 1, 0, OPT_MODEL},
                                          {"ep", 1, 0, OPT_EP},
                                          {"policy", 1, 0, OPT_POLICY},
                                          {"set", 1, 0, OPT_SET},
                                          {"jobs", 1, 0, 'j'},
                                          {"help", 0, 0, 'h'},
                                          {0}};
    int opt;
    *o = (struct options){.jobs = core_count()};
    o->overrides.set = o->set;
    *code = 2;
    while ((opt = getopt_long(argc, argv, "ho:j:", longs, NULL)) != -1) {
        if (opt == 'h') {
            *code = say_usage(usage, true);
            return false;
        }
        if (!take(opt, o))
            return false;
    }
    if (optind + 1 != argc) {
        say_usage(usage, false);
        return false;
    }
    o->path = argv[optind];
    return true;
}

/* ---- printing ---- */

static const int *slots_of(const struct placement *p, int layer) {
    return p->expert_of_slot + layer * p->ranks * p->slots_per_rank;
}

static void add_ints(struct buf *out, const int *v, int n, const char *comma) {
    for (int i = 0; i < n; i++)
        buf_printf(out, "%s%d", i ? comma : "", v[i]);
}

/* %.9g: enough to tell shares apart, and the same text on every machine. */
static void add_shares(struct buf *out, const double *v, int n, const char *comma) {
    for (int i = 0; i < n; i++)
        buf_printf(out, "%s%.9g", i ? comma : "", v[i]);
}

static void print_json(const struct model *m, const struct placement *p, struct buf *out) {
    int total = p->ranks * p->slots_per_rank;
    buf_printf(out, "{\"model\":");
    buf_json_string(out, m->name);
    buf_printf(out, ",\"ranks\":%d,\"slots_per_rank\":%d,\"layers\":[", p->ranks,
               p->slots_per_rank);
    for (int i = 0; i < p->num_layers; i++) {
        buf_printf(out, "%s{\"layer\":%d,\"expert_of_slot\":[", i ? "," : "", p->layers[i]);
        add_ints(out, slots_of(p, i), total, ",");
        buf_printf(out, "],\"share_of_slot\":[");
        add_shares(out, p->share_of_slot + i * total, total, ",");
        buf_printf(out, "],\"imbalance\":%.9g,\"imbalance_even\":%.9g,\"bound\":%.9g}",
                   p->imbalance[i], p->imbalance_even[i], p->bound[i]);
    }
    buf_printf(out, "]}\n");
}

/* The same as JSON has it, a line per rank. */
static void print_yaml(const struct model *m, const struct placement *p, struct buf *out) {
    int n = p->slots_per_rank, total = p->ranks * n;
    buf_printf(out, "model: ");
    buf_json_string(out, m->name);
    buf_printf(out, "\nranks: %d\nslots_per_rank: %d\nlayers:\n", p->ranks, n);
    for (int i = 0; i < p->num_layers; i++) {
        buf_printf(out,
                   "- layer: %d\n  imbalance: %.9g\n  imbalance_even: %.9g\n  bound: %.9g\n"
                   "  expert_of_slot: [\n",
                   p->layers[i], p->imbalance[i], p->imbalance_even[i], p->bound[i]);
        for (int r = 0; r < p->ranks; r++) {
            buf_printf(out, "    ");
            add_ints(out, slots_of(p, i) + r * n, n, ", ");
            buf_printf(out, ", # rank %d\n", r);
        }
        buf_printf(out, "  ]\n  share_of_slot: [\n");
        for (int r = 0; r < p->ranks; r++) {
            buf_printf(out, "    ");
            add_shares(out, p->share_of_slot + i * total + r * n, n, ", ");
            buf_printf(out, ", # rank %d\n", r);
        }
        buf_printf(out, "  ]\n");
    }
}

/* ---- other tools' forms ---- */

/* No other tool knows a slot without an expert. */
static bool is_full(const struct deployment *dep, const struct placement *p, struct diags *d,
                    const char *format) {
    int total = p->ranks * p->slots_per_rank;
    for (int i = 0; i < p->num_layers; i++)
        for (int s = 0; s < total; s++)
            if (slots_of(p, i)[s] < 0) {
                diag_error(d, (struct loc){0},
                           "%s: slot %d of layer %d is empty, which format %s cannot say; "
                           "num_slots: %d fills every slot",
                           dep->path, s, p->layers[i], format, total);
                return false;
            }
    return true;
}

/* Layers of the decoder; a draft model's MTP layers have no place in the other two forms. */
static int decoder_layers(const struct deployment *dep, const struct placement *p,
                          struct diags *d, const char *format) {
    const struct model *m = dep->model;
    int n = p->num_layers;
    while (n && p->layers[n - 1] >= m->num_hidden_layers)
        n--;
    if (n < p->num_layers)
        diag_add(d, DIAG_NOTE, (struct loc){0}, "%s: format %s has no MTP layers: left out: %s",
                 dep->path, format, layer_ranges(d->arena, p->layers + n, p->num_layers - n));
    return n;
}

static void print_trtllm(const struct deployment *dep, const struct placement *p,
                         struct buf *out) {
    int total = p->ranks * p->slots_per_rank;
    buf_printf(out, "num_slots: %d\nlayer_updates_per_iter: %d\ninitial_global_assignments:\n",
               total, dep->layer_updates_per_iter);
    for (int i = 0; i < p->num_layers; i++) {
        buf_printf(out, "  %d: [", p->layers[i]);
        add_ints(out, slots_of(p, i), total, ", ");
        buf_printf(out, "]\n");
    }
}

/* A row for every decoder layer; those without experts have the experts in order, as SGLang itself
 * gives them. */
static void print_sglang(const struct deployment *dep, const struct placement *p, int n,
                         struct buf *out) {
    int total = p->ranks * p->slots_per_rank, at = 0;
    int *trivial = arena_array(out->arena, int, total);
    for (int s = 0; s < total; s++)
        trivial[s] = s % p->experts;
    buf_printf(out, "{\"physical_to_logical_map\":[");
    for (int layer = 0; layer < dep->model->num_hidden_layers; layer++) {
        bool moe = at < n && p->layers[at] == layer;
        buf_printf(out, "%s[", layer ? "," : "");
        add_ints(out, moe ? slots_of(p, at++) : trivial, total, ",");
        buf_printf(out, "]");
    }
    buf_printf(out, "]}\n");
}

/* layer_id counts the MoE layers from 0. */
static void print_vllm(const struct placement *p, int n, struct buf *out) {
    buf_printf(out, "{\"moe_layer_count\":%d,\"layer_list\":[", n);
    for (int i = 0; i < n; i++) {
        buf_printf(out, "%s{\"layer_id\":%d,\"device_count\":%d,\"device_list\":[",
                   i ? "," : "", i, p->ranks);
        for (int r = 0; r < p->ranks; r++) {
            buf_printf(out, "%s{\"device_id\":%d,\"device_expert\":[", r ? "," : "", r);
            add_ints(out, slots_of(p, i) + r * p->slots_per_rank, p->slots_per_rank, ",");
            buf_printf(out, "]}");
        }
        buf_printf(out, "]}");
    }
    buf_printf(out, "]}\n");
}

static bool print(const struct deployment *dep, const struct placement *p, enum format format,
                  struct diags *d, struct buf *out) {
    const char *name = format_spelling[format];
    bool own = format == FORMAT_yaml || format == FORMAT_json;
    if (!own && !is_full(dep, p, d, name))
        return false;
    int n = own || format == FORMAT_trtllm ? 0 : decoder_layers(dep, p, d, name);
    switch (format) {
    case FORMAT_yaml:
        print_yaml(dep->model, p, out);
        break;
    case FORMAT_json:
        print_json(dep->model, p, out);
        break;
    case FORMAT_trtllm:
        print_trtllm(dep, p, out);
        break;
    case FORMAT_sglang:
        print_sglang(dep, p, n, out);
        break;
    case FORMAT_vllm:
        print_vllm(p, n, out);
        break;
    case FORMAT_COUNT:
        break;
    }
    return true;
}

/* ---- the command ---- */

static bool write_out(const struct options *o, const struct buf *text) {
    if (!o->out) {
        fwrite(text->data, 1, text->len, stdout);
        return !fflush(stdout) || say_error("standard output: %s", strerror(errno));
    }
    int err = file_write(o->out, text->data, text->len);
    return !err || say_error("%s: %s", o->out, strerror(err));
}

int cmd_plan(int argc, char **argv) {
    struct options o;
    struct arena arena = {NULL};
    struct diags diags = {.arena = &arena};
    struct buf text = {.arena = &arena};
    int code;
    optind = 0; /* from the start, whatever was parsed before */
    if (!parse(argc, argv, &o, &code))
        return code;
    const struct deployment *dep = deployment_read(&arena, &diags, o.path, &o.overrides);
    const struct plan *p = dep ? plan_make(&arena, &diags, dep, o.jobs) : NULL;
    bool ok = p && print(dep, p->placement, o.format, &diags, &text);
    diag_print(&diags, stderr);
    ok = ok && write_out(&o, &text);
    arena_free(&arena);
    return ok ? 0 : 1;
}
