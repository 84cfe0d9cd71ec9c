/* moec build: a deployment, a model or a config.json into a bundle. */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "moec.h"

static const char usage[] =
    "usage: moec build FILE [OPTION...]\n"
    "\n"
    "Compiles FILE into a bundle. FILE is a deployment, a TensorRT-LLM options file, a model "
    "file\n"
    "or a Hugging Face config.json.\n"
    "\n"
    "  -o, --out DIR        the bundle's directory (default: ./NAME.moe); a bundle there is\n"
    "                       replaced in one step\n"
    "      --model FILE     the model, in place of the deployment's\n"
    "      --ep N           ranks, in place of the cluster's\n"
    "      --target A,B     sm_80 sm_89 sm_90a sm_100a sm_103a sm_120a host\n"
    "      --policy POLICY  placement policy: a shipped one's name or a Lua file\n"
    "      --set KEY=VALUE  a key of the deployment, dotted: moe_config.max_num_tokens=4096\n"
    "  -j, --jobs N         threads that compile (default: all cores)\n"
    "      --unbake A,B     constants of plan.cuh to keep in memory, for measuring what "
    "baking\n"
    "                       them into the code gains\n"
    "      --json           the summary as JSON\n"
    "      --help\n";

struct arguments {
    const char *file;
    struct overrides overrides;
    struct build_options build;
    bool json;
};

enum {
    OPT_MODEL = 256,
    OPT_EP,
    OPT_TARGET,
    OPT_POLICY,
    OPT_SET,
    OPT_UNBAKE,
    OPT_JSON,
    OPT_HELP
};

static const struct option options[] = {
    {"out", required_argument, NULL, 'o'},
    {"model", required_argument, NULL, OPT_MODEL},
    {"ep", required_argument, NULL, OPT_EP},
    {"target", required_argument, NULL, OPT_TARGET},
    {"policy", required_argument, NULL, OPT_POLICY},
    {"set", required_argument, NULL, OPT_SET},
    {"jobs", required_argument, NULL, 'j'},
    {"unbake", required_argument, NULL, OPT_UNBAKE},
    {"json", no_argument, NULL, OPT_JSON},
    {"help", no_argument, NULL, OPT_HELP},
    {NULL, 0, NULL, 0},
};

/* ---- arguments ---- */

static int wrong(const char *text, const char *what) {
    fprintf(stderr, "moec build: error: %s%s\nmoec build --help says more\n", text, what);
    return 2;
}

static bool positive(const char *text, int *out) {
    char *end;
    long n = strtol(text, &end, 10);
    *out = (int)n;
    return *text && !*end && n >= 1 && n <= 1 << 20;
}

/* Splits A,B in place into a NULL-terminated list of known constants. Returns the unknown one. */
static const char *split_unbake(struct arena *a, char *text, const char *const **out) {
    int n = 0, known = 0;
    const char **names = arena_array(a, const char *, strlen(text) + 2);
    while (plan_constants[known])
        known++;
    for (char *name = strtok(text, ","); name; name = strtok(NULL, ",")) {
        int i = 0;
        while (i < known && strcmp(plan_constants[i], name))
            i++;
        if (i == known)
            return name;
        names[n++] = name;
    }
    *out = names;
    return NULL;
}

static int wrong_constant(const char *name) {
    int known = 0;
    while (plan_constants[known])
        known++;
    const char *near = nearest(name, plan_constants, known);
    fprintf(stderr, "moec build: error: --unbake: plan.cuh has no constant '%s'", name);
    if (near)
        fprintf(stderr, "; did you mean '%s'?", near);
    fprintf(stderr, "\n");
    return 2;
}

/* One option into args; -1, or the exit code that ends the command. */
static int take(struct arena *a, int opt, struct arguments *args) {
    const char *bad;
    switch (opt) {
    case 'o':
        args->build.out = optarg;
        return *optarg ? -1 : wrong("-o wants a directory", "");
    case 'j':
        return positive(optarg, &args->build.jobs) ? -1
                                                   : wrong("-j wants a number, not ", optarg);
    case OPT_MODEL:
        args->overrides.model = optarg;
        return -1;
    case OPT_EP:
        return positive(optarg, &args->overrides.ep)
                   ? -1
                   : wrong("--ep wants a number, not ", optarg);
    case OPT_TARGET:
        args->overrides.targets = optarg;
        return -1;
    case OPT_POLICY:
        args->overrides.policy = optarg;
        return -1;
    case OPT_SET:
        args->overrides.set[args->overrides.num_set++] = optarg;
        return -1;
    case OPT_UNBAKE:
        bad = split_unbake(a, arena_strdup(a, optarg), &args->build.unbake);
        return bad ? wrong_constant(bad) : -1;
    case OPT_JSON:
        args->json = true;
        return -1;
    case OPT_HELP:
        fputs(usage, stdout);
        return 0;
    default:
        return 2; /* getopt_long has said why */
    }
}

static int parse(struct arena *a, int argc, char **argv, struct arguments *args) {
    int opt;
    args->build.jobs = core_count();
    args->overrides.set = arena_array(a, const char *, argc);
    optind = 0; /* from the start, whatever was parsed before */
    while ((opt = getopt_long(argc, argv, "o:j:", options, NULL)) != -1) {
        int code = take(a, opt, args);
        if (code >= 0)
            return code;
    }
    if (argc - optind != 1)
        return wrong(argc == optind ? "no FILE" : "one FILE at a time, not also ",
                     argc == optind ? "" : argv[optind + 1]);
    args->file = argv[optind];
    return -1;
}

/* ---- output ---- */

static void progress(int done, int n, void *user) {
    enum { WIDTH = 32 };
    static const char full[] = "################################";
    int filled = done * WIDTH / n;
    (void)user;
    fprintf(stderr, "\rcompiling [%.*s%*s] %d/%d%s", filled, full, WIDTH - filled, "", done, n,
            done == n ? "\r\033[K" : "");
}

static void print_summary(const struct plan *p, const struct build_report *r, double seconds) {
    printf("%s: %s, %u layers in %u class%s, %d ranks x %d slots\n", r->out,
           p->dep->model->name, p->count[MOE_SECTION_LAYER], p->count[MOE_SECTION_CLASS],
           p->count[MOE_SECTION_CLASS] == 1 ? "" : "es", p->classes[0].ranks,
           p->classes[0].slots_per_rank);
    printf("targets:");
    for (uint32_t i = 0; i < p->count[MOE_SECTION_TARGET]; i++)
        printf(" %s", target_names[p->targets[i].target]);
    printf("\n%d kernels compiled, %d from the cache, in %.2f s; %.1f MB in %.2f s\n",
           r->kernels - r->cached, r->cached, r->compile_seconds, (double)r->bytes / 1e6,
           seconds);
}

static void print_json(struct arena *a, const struct plan *p, const struct build_report *r,
                       double seconds) {
    struct buf b = {.arena = a};
    buf_printf(&b, "{\"bundle\": ");
    buf_json_string(&b, r->out);
    buf_printf(&b, ", \"model\": ");
    buf_json_string(&b, p->dep->model->name);
    buf_printf(&b, ", \"layers\": %u, \"classes\": %u, \"targets\": [",
               p->count[MOE_SECTION_LAYER], p->count[MOE_SECTION_CLASS]);
    for (uint32_t i = 0; i < p->count[MOE_SECTION_TARGET]; i++)
        buf_printf(&b, "%s\"%s\"", i ? ", " : "", target_names[p->targets[i].target]);
    buf_printf(&b,
               "], \"kernels\": %d, \"compiled\": %d, \"cached\": %d, "
               "\"compile_seconds\": %.3f, \"seconds\": %.3f, \"bytes\": %lld}\n",
               r->kernels, r->kernels - r->cached, r->cached, r->compile_seconds, seconds,
               r->bytes);
    fputs(b.data, stdout);
}

/* ---- the command ---- */

/* Prints what there is to say so far: warnings come before the wait. */
static void say(struct diags *d) {
    diag_print(d, stderr);
    *d = (struct diags){.arena = d->arena};
}

static bool build(struct arena *a, const struct arguments *args) {
    double start = now_seconds();
    struct diags diags = {.arena = a};
    struct build_report report = {0};
    const struct deployment *dep = deployment_read(a, &diags, args->file, &args->overrides);
    say(&diags);
    if (!dep)
        return false;
    struct plan *p = plan_make(a, &diags, dep, args->build.jobs);
    say(&diags);
    if (!p)
        return false;
    bool ok = bundle_build(a, &diags, p, &args->build, &report);
    double seconds = now_seconds() - start;
    say(&diags);
    if (ok && args->json)
        print_json(a, p, &report, seconds);
    else if (ok)
        print_summary(p, &report, seconds);
    return ok;
}

int cmd_build(int argc, char **argv) {
    struct arena arena = {NULL};
    struct arguments args = {0};
    int code = parse(&arena, argc, argv, &args);
    if (code < 0) {
        if (isatty(STDERR_FILENO))
            args.build.progress = progress;
        code = build(&arena, &args) ? 0 : 1;
    }
    arena_free(&arena);
    return code;
}
