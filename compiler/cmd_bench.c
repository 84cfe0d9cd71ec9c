/* moec bench: times of a bundle's layers against the floor the hardware sets.
 *
 * Every figure is the median of replays of one CUDA graph that holds a call per routing: several
 * routings, mildly skewed, each on its own activations and, where the weights are few, on its own
 * copy of the layer, so that nothing is found in the second-level cache. */
#include "device.h"
#include "trial.h"

#include <ctype.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: moec bench BUNDLE [options]\n"
    "Times the experts part (routed input to combined output) and the whole forward of one "
    "layer\n"
    "of each class, with random weights and data, beside the floor: the larger of bytes moved\n"
    "over bandwidth and of FLOP over the matrix rate, for the experts actually hit.\n"
    "\n"
    "  --device host|cuda   default: a GPU if one is there; on the host times only\n"
    "  --layer N            this layer only\n"
    "  --tokens LIST        default 1,8,32,128,512,2048,8192 up to the plan's max_num_tokens\n"
    "  --stages             time of every stage too\n"
    "  --rotate N           routings in turn, 1 to 16; default 4\n"
    "  --skew S             lognormal sigma of the experts' popularity; default 0.5\n"
    "  --tbps X             memory bandwidth for the floor, TB/s; default: measured here\n"
    "  --tflops X           matrix rate for the floor, TFLOP/s; default: the GPU table's\n"
    "  --seed S             default 1\n"
    "  --json               the result as JSON\n"
    "Exit status: 0 done, 1 failed, 2 wrong usage.\n";

enum { MAX_TOKENS = 32, MAX_ROTATE = 16, MAX_COPIES = 64, REPLAYS = 12 };
static const size_t beyond_cache = 120u << 20;

/* Stages that are timed alone. */
static const enum moe_stage timed_stages[] = {MOE_STAGE_ROUTE, MOE_STAGE_PREPARE,
                                              MOE_STAGE_EXPERTS, MOE_STAGE_COMBINE};
enum { NUM_STAGES = sizeof timed_stages / sizeof *timed_stages };

struct options {
    const char *bundle, *device;
    int layer, seed, rotate;
    int tokens[MAX_TOKENS], num_tokens;
    double skew, tbps, tflops;
    bool json, stages;
};

struct bench {
    const struct options *o;
    struct session s;
    moert_stream stream;
    double tbps, tflops; /* 0: not known, no floor */
    int rows;            /* printed */
    /* the layer under test */
    int number, copies;
    const struct moe_plan_class *shape;
    moert_layer *layer[MAX_COPIES];
    struct trial trial[MAX_ROTATE];
    enum moe_stage stage;
};

/* What was found for one batch size; microseconds, negative: not measured. */
struct row {
    int tokens;
    double experts, forward, stage[NUM_STAGES];
    double hit, floor;                 /* of the given routing */
    double forward_hit, forward_floor; /* of the router's own */
};

enum { DEVICE = 256, LAYER, TOKENS, STAGES, ROTATE, SKEW, TBPS, TFLOPS, SEED, JSON };

static bool take_option(int c, struct options *o) {
    switch (c) {
    case DEVICE:
        return option_device(optarg, &o->device);
    case LAYER:
        return option_int("--layer", optarg, 0, 1 << 20, &o->layer);
    case TOKENS:
        return option_list("--tokens", optarg, 1, o->tokens, MAX_TOKENS, &o->num_tokens);
    case STAGES:
        return o->stages = true;
    case ROTATE:
        return option_int("--rotate", optarg, 1, MAX_ROTATE, &o->rotate);
    case SKEW:
        return option_double("--skew", optarg, 0, 10, &o->skew);
    case TBPS:
        return option_double("--tbps", optarg, 1e-3, 1e3, &o->tbps);
    case TFLOPS:
        return option_double("--tflops", optarg, 1e-3, 1e6, &o->tflops);
    case SEED:
        return option_int("--seed", optarg, 0, 0x7fffffff, &o->seed);
    default:
        return o->json = true;
    }
}

static bool parse(int argc, char **argv, struct options *o, int *code) {
    static const struct option longs[] = {
        {"device", 1, 0, DEVICE}, {"layer", 1, 0, LAYER},   {"tokens", 1, 0, TOKENS},
        {"stages", 0, 0, STAGES}, {"rotate", 1, 0, ROTATE}, {"skew", 1, 0, SKEW},
        {"tbps", 1, 0, TBPS},     {"tflops", 1, 0, TFLOPS}, {"seed", 1, 0, SEED},
        {"json", 0, 0, JSON},     {"help", 0, 0, 'h'},      {0}};
    int c;
    *o = (struct options){.layer = -1, .seed = 1, .rotate = 4, .skew = 0.5};
    *code = 2;
    while ((c = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
        if (c == 'h' || c == '?') {
            *code = say_usage(usage, c == 'h');
            return false;
        }
        if (!take_option(c, o))
            return false;
    }
    if (optind + 1 != argc)
        return say_usage(usage, false) == 0;
    o->bundle = argv[optind];
    return true;
}

/* ---- ceilings ---- */

static int compare_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct copy {
    moert_context *context;
    void *from, *to;
    size_t bytes;
};
static moert_result run_copy(void *user, moert_stream s) {
    const struct copy *c = user;
    return moert_tool_copy(c->context, c->to, c->from, c->bytes, s);
}

/* A device copy moves every byte twice; reads alone, which is what a layer does, go about 4 %
 * faster (4.40 against 4.24 TB/s on an H200). */
static bool measure_bandwidth(struct bench *b) {
    struct copy c = {.context = b->s.context, .bytes = 1u << 30};
    double us[REPLAYS + 1];
    moert_result r = moert_tool_alloc(c.context, c.bytes, &c.from);
    if (!r)
        r = moert_tool_alloc(c.context, c.bytes, &c.to);
    for (int i = 0; i <= REPLAYS && !r; i++)
        r = moert_tool_time(c.context, b->stream, run_copy, &c, &us[i]);
    if (c.from)
        moert_tool_free(c.context, c.from);
    if (c.to)
        moert_tool_free(c.context, c.to);
    if (!session_ok(r, "bandwidth"))
        return false;
    qsort(us + 1, REPLAYS, sizeof *us, compare_double);
    b->tbps = 2.0 * (double)c.bytes / us[1 + REPLAYS / 2] / 1e6 * 1.04;
    return true;
}

/* Rate of the GPU whose name in the table is a word of the device's; 0 when none is. */
static double table_tflops(const char *device, bool fp8) {
    struct arena a = {0};
    double tflops = 0;
    char *copy = arena_strdup(&a, device), *save = NULL;
    for (char *w = strtok_r(copy, " -", &save); w && !tflops; w = strtok_r(NULL, " -", &save)) {
        struct diags d = {.arena = &a};
        for (char *p = w; *p; p++)
            *p = isalnum((unsigned char)*p) ? (char)tolower((unsigned char)*p) : '_';
        const char *text = arena_printf(&a, "gpu: %s\n", w);
        struct node *n = yaml_parse(&a, &d, "device", text, strlen(text));
        struct cluster *c = n ? cluster_read(&a, &d, n) : NULL;
        if (c)
            tflops = cluster_tflops(c, fp8);
    }
    arena_free(&a);
    return tflops;
}

static bool find_ceilings(struct bench *b) {
    b->tbps = b->o->tbps;
    const struct moe_plan_class *c = /* a bundle has one format */
        moert_tool_class(b->s.bundle, moert_bundle_layer(b->s.bundle, 0));
    b->tflops = b->o->tflops;
    if (b->tflops <= 0)
        b->tflops = table_tflops(b->s.device.name, moe_is_fp8(c));
    if (b->tflops <= 0)
        return say_error("no GPU of the table is called '%s': give --tflops", b->s.device.name);
    return b->tbps > 0 || measure_bandwidth(b);
}

/* ---- routings ---- */

static double uniform(unsigned long long h) {
    return ((double)(h >> 11) + 0.5) * 0x1p-53;
}

/* Gumbel top-k over lognormal popularity; weights are the softmax of the k scores. */
static void skewed_routing(struct trial *t, double sigma, unsigned long long seed) {
    int e = t->shape->experts, k = t->shape->topk;
    double *popularity = malloc(sizeof(double) * 2 * (size_t)e), *score = popularity + e;
    if (!popularity)
        abort();
    for (int i = 0; i < e; i++)
        popularity[i] = sigma * moe_random_value(moe_hash(seed), (unsigned)i);
    for (int n = 0; n < t->tokens; n++) {
        double sum = 0, top = 0;
        for (int i = 0; i < e; i++)
            score[i] = popularity[i] -
                       log(-log(uniform(
                           moe_hash(seed ^ moe_hash((unsigned long long)n * e + i + 1)))));
        for (int j = 0; j < k; j++) {
            int best = 0;
            for (int i = 1; i < e; i++)
                if (score[i] > score[best])
                    best = i;
            top = j ? top : score[best];
            t->idx[n * k + j] = best;
            sum += t->weight[n * k + j] = (float)exp(score[best] - top);
            score[best] = -INFINITY;
        }
        for (int j = 0; j < k; j++)
            t->weight[n * k + j] /= (float)sum;
    }
    free(popularity);
}

static int experts_hit(const struct trial *t) {
    bool *hit = calloc((size_t)t->shape->experts, sizeof *hit);
    int n = 0;
    for (int i = 0; hit && i < t->tokens * t->shape->topk; i++) {
        int e = t->idx[i];
        if (e >= 0 && e < t->shape->experts && !hit[e])
            hit[e] = true, n++;
    }
    free(hit);
    return n;
}

/* Microseconds below which no kernel can be: weights of the experts hit and activations in and
 * out once, or the products. */
static double floor_us(const struct bench *b, int tokens, double hit, bool router) {
    const struct moe_plan_class *c = b->shape;
    double h = c->hidden, t = tokens, mats = c->activation == MOE_ACT_RELU2 ? 2 : 3;
    double params = mats * h * c->inter, shared = mats * h * c->shared_inter;
    double bytes = (moe_is_fp8(c) ? 1 : 2) * (hit * params + shared) + t * h * 4;
    double flop = 2 * t * (c->topk * params + shared);
    if (router) {
        bytes += 4.0 * c->experts * h;
        flop += 2 * t * c->experts * h;
    }
    return fmax(bytes / b->tbps, flop / b->tflops) / 1e6;
}

/* ---- timing ---- */

static moert_result call_experts(void *user, moert_stream s) {
    struct bench *b = user;
    moert_result r = MOERT_OK;
    for (int i = 0; i < b->o->rotate && !r; i++) {
        moert_layer *l = b->layer[i % b->copies];
        r = moert_experts_combine(l, &b->trial[i].io, s);
    }
    return r;
}
static moert_result call_forward(void *user, moert_stream s) {
    struct bench *b = user;
    moert_result r = MOERT_OK;
    for (int i = 0; i < b->o->rotate && !r; i++)
        r = moert_forward(b->layer[i % b->copies], &b->trial[i].io, s);
    return r;
}
static moert_result call_stage(void *user, moert_stream s) {
    struct bench *b = user;
    moert_result r = MOERT_OK;
    for (int i = 0; i < b->o->rotate && !r; i++)
        r = moert_tool_stage(b->layer[i % b->copies], &b->trial[i].io, b->stage, s);
    return r;
}

struct replay {
    moert_context *context;
    moert_graph *graph;
};
static moert_result run_replay(void *user, moert_stream s) {
    struct replay *r = user;
    return moert_tool_replay(r->context, r->graph, s);
}

typedef moert_result call_fn(void *user, moert_stream s);

/* Microseconds of one of the calls that fn makes, one per routing. */
static bool time_calls(struct bench *b, call_fn *fn, double *us) {
    double all[REPLAYS];
    struct replay g = {.context = b->s.context};
    moert_result r = fn(b, b->stream); /* loads what is loaded on first use */
    if (!r && b->s.cuda)
        r = moert_tool_capture(g.context, b->stream, fn, b, &g.graph);
    for (int i = 0; i < 3 && !r && b->s.cuda; i++)
        r = moert_tool_replay(g.context, g.graph, b->stream);
    int n = b->s.cuda ? REPLAYS : 3;
    for (int i = 0; i < n && !r; i++)
        r = b->s.cuda ? moert_tool_time(g.context, b->stream, run_replay, &g, &all[i])
                      : moert_tool_time(g.context, b->stream, fn, b, &all[i]);
    if (g.graph)
        moert_tool_graph_free(g.context, g.graph);
    if (!session_ok(r, "timing"))
        return false;
    qsort(all, (size_t)n, sizeof *all, compare_double);
    *us = all[n / 2] / b->o->rotate;
    return true;
}

static bool open_trials(struct bench *b, int tokens) {
    bool ok = true;
    for (int i = 0; i < b->o->rotate && ok; i++) {
        struct trial *t = &b->trial[i];
        unsigned long long seed = moe_hash((unsigned)b->o->seed * 1000ull + (unsigned)i);
        ok = session_ok(trial_open(t, b->s.context, b->layer[i % b->copies], b->shape, tokens,
                                   MOERT_BF16, MOERT_BF16),
                        "buffers");
        if (!ok)
            break;
        trial_random_x(t, seed, b->number);
        skewed_routing(t, b->o->skew, seed);
        ok = session_ok(trial_upload(t), "upload");
    }
    return ok;
}

static void close_trials(struct bench *b) {
    for (int i = 0; i < b->o->rotate; i++)
        if (b->trial[i].context)
            trial_close(&b->trial[i]);
}

static double mean_hit(const struct bench *b) {
    double sum = 0;
    for (int i = 0; i < b->o->rotate; i++)
        sum += experts_hit(&b->trial[i]);
    return sum / b->o->rotate;
}

static bool time_stages(struct bench *b, struct row *r) {
    for (int i = 0; i < NUM_STAGES; i++) {
        b->stage = timed_stages[i];
        if (!time_calls(b, call_stage, &r->stage[i]))
            return false;
    }
    return true;
}

/* The experts part comes first: the forward writes its own choices over the given ones. */
static bool measure(struct bench *b, struct row *r) {
    r->hit = mean_hit(b);
    if (r->tokens <= b->shape->max_tokens) {
        if (!time_calls(b, call_experts, &r->experts))
            return false;
        if (b->o->stages && !time_stages(b, r))
            return false;
    }
    if (!time_calls(b, call_forward, &r->forward))
        return false;
    for (int i = 0; i < b->o->rotate; i++)
        if (!session_ok(trial_download(&b->trial[i]), "download"))
            return false;
    r->forward_hit = mean_hit(b);
    if (b->tbps > 0) {
        r->floor = floor_us(b, r->tokens, r->hit, false);
        r->forward_floor = floor_us(b, r->tokens, r->forward_hit, true);
    }
    return true;
}

/* ---- output ---- */

static void print_cell(double us, double floor) {
    if (us < 0)
        printf("  %9s", "-");
    else
        printf("  %9.1f", us);
    if (floor <= 0)
        return;
    if (us < 0)
        printf("  %9.1f  %5s", floor, "-");
    else
        printf("  %9.1f  %5.2f", floor, us / floor);
}

static void print_head(const struct bench *b) {
    bool floors = b->tbps > 0;
    const struct moe_plan_class *c = b->shape;
    printf(
        "\nlayer %d: hidden %d, intermediate %d, %d experts, top-%d, shared %d; us per call\n",
        b->number, c->hidden, c->inter, c->experts, c->topk, c->shared_inter);
    printf("%7s  %7s  %9s%s  %9s%s", "tokens", "hit", "experts",
           floors ? "      floor  ratio" : "", "forward", floors ? "      floor  ratio" : "");
    for (int i = 0; b->o->stages && i < NUM_STAGES; i++)
        printf("  %12s", stage_names[timed_stages[i]]);
    putchar('\n');
}

static void print_row(const struct bench *b, const struct row *r) {
    printf("%7d  %7.1f", r->tokens, r->hit);
    print_cell(r->experts, r->floor);
    print_cell(r->forward, r->forward_floor);
    for (int i = 0; b->o->stages && i < NUM_STAGES; i++)
        r->stage[i] < 0 ? printf("  %12s", "-") : printf("  %12.1f", r->stage[i]);
    putchar('\n');
    fflush(stdout);
}

static void json_number(const char *name, double v) {
    v < 0 ? printf(",\"%s\":null", name) : printf(",\"%s\":%.3f", name, v);
}

static void print_row_json(struct bench *b, const struct row *r) {
    printf("%s\n{\"layer\":%d,\"tokens\":%d,\"experts_hit\":%.2f", b->rows ? "," : "",
           b->number, r->tokens, r->hit);
    json_number("experts_us", r->experts);
    json_number("experts_floor_us", b->tbps > 0 ? r->floor : -1);
    json_number("forward_us", r->forward);
    json_number("forward_floor_us", b->tbps > 0 ? r->forward_floor : -1);
    printf(",\"forward_experts_hit\":%.2f", r->forward_hit);
    for (int i = 0; b->o->stages && i < NUM_STAGES; i++)
        json_number(stage_names[timed_stages[i]], r->stage[i]);
    putchar('}');
    fflush(stdout);
}

static void print_device(const struct bench *b) {
    if (b->o->json) {
        struct arena a = {0};
        struct buf name = {.arena = &a};
        buf_json_string(&name, b->s.device.name);
        printf("{\"device\":%s,\"target\":\"%s\"", name.data, target_names[b->s.device.target]);
        json_number("tbps", b->tbps > 0 ? b->tbps : -1);
        json_number("tflops", b->tbps > 0 ? b->tflops : -1);
        printf(",\"rows\":[");
        arena_free(&a);
    } else if (b->s.cuda) {
        printf("device: %s (%s); floor from %.2f TB/s%s and %.0f TFLOP/s%s\n", b->s.device.name,
               target_names[b->s.device.target], b->tbps,
               b->o->tbps > 0 ? "" : " (copy measured here x 1.04)", b->tflops,
               b->o->tflops > 0 ? "" : " (GPU table)");
    } else {
        printf("device: %s, the host: times only, no floor\n", b->s.device.name);
    }
}

/* ---- layers ---- */

static bool open_copies(struct bench *b) {
    moert_layer_info info = MOERT_LAYER_INFO_INIT;
    if (!session_ok(moert_bundle_layer_info(b->s.bundle, b->number, &info), "layer"))
        return false;
    size_t need = b->s.cuda && info.weight_bytes ? beyond_cache / info.weight_bytes + 1 : 1;
    int copies = need > MAX_COPIES ? MAX_COPIES : (int)need;
    if (copies > b->o->rotate)
        copies = b->o->rotate;
    for (b->copies = 0; b->copies < copies; b->copies++) {
        b->layer[b->copies] =
            session_layer(&b->s, 0, b->number, NULL, (unsigned)(b->o->seed + b->copies));
        if (!b->layer[b->copies])
            return false;
    }
    return true;
}

static bool bench_batch(struct bench *b, int tokens) {
    struct row r = {.tokens = tokens, .experts = -1, .forward = -1};
    for (int i = 0; i < NUM_STAGES; i++)
        r.stage[i] = -1;
    bool ok = open_trials(b, tokens) && measure(b, &r);
    close_trials(b);
    if (ok)
        b->o->json ? print_row_json(b, &r) : print_row(b, &r);
    b->rows += ok;
    return ok;
}

static bool bench_layer(struct bench *b, int layer) {
    static const int usual[] = {1, 8, 32, 128, 512, 2048, 8192};
    b->number = layer;
    b->shape = moert_tool_class(b->s.bundle, layer);
    bool ok = open_copies(b);
    if (ok && !b->o->json)
        print_head(b);
    for (int i = 0; ok && i < b->o->num_tokens; i++)
        ok = bench_batch(b, b->o->tokens[i]);
    for (size_t i = 0; ok && !b->o->num_tokens && i < sizeof usual / sizeof *usual; i++)
        if (usual[i] <= b->shape->max_tokens && (b->s.cuda || usual[i] <= 8))
            ok = bench_batch(b, usual[i]);
    for (int i = 0; i < b->copies; i++)
        moert_layer_destroy(b->layer[i]);
    b->copies = 0;
    return ok;
}

static bool bench_layers(struct bench *b) {
    int n = moert_bundle_num_layers(b->s.bundle), found = 0;
    for (int i = 0; i < n; i++) {
        int layer = moert_bundle_layer(b->s.bundle, i);
        if (b->o->layer >= 0 ? layer != b->o->layer : !session_first_of_class(&b->s, i))
            continue;
        found++;
        if (!bench_layer(b, layer))
            return false;
    }
    return found || session_has_layer(&b->s, b->o->layer);
}

int cmd_bench(int argc, char **argv) {
    struct options o;
    int code;
    if (!parse(argc, argv, &o, &code))
        return code;
    struct bench b = {.o = &o};
    if (!session_open(&b.s, o.bundle, o.device, false))
        return 1;
    bool ok = !b.s.cuda || (session_ok(moert_tool_stream(b.s.context, &b.stream), "stream") &&
                            find_ceilings(&b));
    bool headed = ok;
    if (headed)
        print_device(&b);
    ok = ok && bench_layers(&b);
    if (o.json && headed)
        puts("]}");
    if (b.stream)
        moert_tool_stream_free(b.s.context, b.stream);
    session_close(&b.s);
    return ok ? 0 : 1;
}
