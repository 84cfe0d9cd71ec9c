/* moec run: one layer of a bundle on random or given activations. */
#include "device.h"
#include "trial.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: moec run BUNDLE [options]\n"
    "Runs one MoE layer and checks sampled tokens against the reference.\n"
    "\n"
    "  --device host|cuda   where; default: a GPU if one is there, else the host\n"
    "  --layer N            the model's own layer number; default: the first MoE layer\n"
    "  --ranks N            ranks in this process, on the one device; default, and the only\n"
    "                       number a bundle takes: those that it is planned for\n"
    "  --tokens N           random tokens, over all ranks; default 64\n"
    "  --weights DIR|FILE   a checkpoint (safetensors); default: random weights\n"
    "  --input F:TENSOR     tensor [tokens, hidden], fp32 or bf16, of a safetensors file\n"
    "  --output F           writes out fp32 [tokens, hidden], topk_idx int32 and topk_weight\n"
    "                       fp32 [tokens, k] to a safetensors file\n"
    "  --seed S             for random weights and activations; default 1\n"
    "  --json               the result as JSON\n"
    "Exit status: 0 done, 1 failed or the check failed, 2 wrong usage.\n";

enum { MAX_TOKENS = 1 << 22 };

struct options {
    const char *bundle, *device, *weights, *input, *output;
    int layer, tokens, seed, ranks;
    bool json;
};

struct run {
    const struct options *o;
    struct session s;
    int ranks;
    moert_layer *layer[MOE_MAX_RANKS];
    moert_tool_file *input;
    struct moert_tool_tensor x; /* data NULL: random */
    struct trial trial; /* of all ranks' tokens; with several ranks it lives on the first */
    struct trial part[MOE_MAX_RANKS]; /* of several ranks each */
    int rank_tokens[MOE_MAX_RANKS];
    struct trial_error error;
    int number; /* of the layer */
    double us;
};

static bool input_is_usable(const struct options *o) {
    const char *colon = o->input ? strrchr(o->input, ':') : NULL;
    if (!o->input)
        return true;
    if (!colon || colon == o->input || !colon[1])
        return say_error("--input: expected FILE:TENSOR, not '%s'", o->input);
    return o->tokens < 0 ||
           say_error("--input brings its own number of tokens: leave out --tokens");
}

static bool parse(int argc, char **argv, struct options *o, int *code) {
    enum { DEVICE = 256, LAYER, TOKENS, WEIGHTS, INPUT, OUTPUT, SEED, JSON, RANKS };
    static const struct option longs[] = {{"device", 1, 0, DEVICE},
                                          {"layer", 1, 0, LAYER},
                                          {"tokens", 1, 0, TOKENS},
                                          {"weights", 1, 0, WEIGHTS},
                                          {"input", 1, 0, INPUT},
                                          {"output", 1, 0, OUTPUT},
                                          {"seed", 1, 0, SEED},
                                          {"json", 0, 0, JSON},
                                          {"ranks", 1, 0, RANKS},
                                          {"help", 0, 0, 'h'},
                                          {0}};
    int c;
    bool ok = true;
    *o = (struct options){.layer = -1, .tokens = -1, .seed = 1};
    while (ok && (c = getopt_long(argc, argv, "h", longs, NULL)) != -1)
        switch (c) {
        case DEVICE:
            ok = option_device(optarg, &o->device);
            break;
        case LAYER:
            ok = option_int("--layer", optarg, 0, 1 << 20, &o->layer);
            break;
        case TOKENS:
            ok = option_int("--tokens", optarg, 0, MAX_TOKENS, &o->tokens);
            break;
        case RANKS:
            ok = option_int("--ranks", optarg, 1, MOE_MAX_RANKS, &o->ranks);
            break;
        case WEIGHTS:
            o->weights = optarg;
            break;
        case INPUT:
            o->input = optarg;
            break;
        case OUTPUT:
            o->output = optarg;
            break;
        case SEED:
            ok = option_int("--seed", optarg, 0, 0x7fffffff, &o->seed);
            break;
        case JSON:
            o->json = true;
            break;
        case 'h':
            *code = say_usage(usage, true);
            return false;
        default:
            *code = say_usage(usage, false);
            return false;
        }
    *code = 2;
    if (!ok)
        return false;
    if (optind + 1 != argc)
        return say_usage(usage, false), false;
    o->bundle = argv[optind];
    return input_is_usable(o);
}

/* "[5, 48]" */
static const char *shape_text(const struct moert_tool_tensor *t, char text[200]) {
    int n = snprintf(text, 200, "[");
    for (int i = 0; i < t->rank; i++)
        n += snprintf(text + n, 200 - (size_t)n, "%s%lld", i ? ", " : "",
                      (long long)t->shape[i]);
    snprintf(text + n, 200 - (size_t)n, "]");
    return text;
}

/* Opens F:TENSOR and checks it is [tokens, hidden] of a type the layer takes. */
static bool open_input(struct run *r, int hidden) {
    const char *colon = strrchr(r->o->input, ':');
    char *path = strndup(r->o->input, (size_t)(colon - r->o->input)), shape[200];
    if (!path)
        return say_error("out of memory");
    bool ok = session_ok(moert_tool_open(path, &r->input), path) &&
              session_ok(moert_tool_find(r->input, colon + 1, &r->x), path);
    free(path);
    if (!ok)
        return false;
    if (strcmp(r->x.dtype, "F32") && strcmp(r->x.dtype, "BF16"))
        return say_error("%s: type %s, expected F32 or BF16", r->o->input, r->x.dtype);
    if (r->x.rank != 2 || r->x.shape[1] != hidden)
        return say_error("%s: shape %s, expected [tokens, %d]", r->o->input,
                         shape_text(&r->x, shape), hidden);
    return r->x.shape[0] <= MAX_TOKENS || say_error("%s: %lld tokens, at most %d", r->o->input,
                                                    (long long)r->x.shape[0], MAX_TOKENS);
}

/* The input's values as fp32. They must be numbers: a NaN chooses no expert. */
static bool copy_input(struct run *r, int hidden) {
    size_t n = (size_t)r->x.shape[0] * (size_t)hidden;
    const unsigned short *half = r->x.data;
    for (size_t i = 0; i < n; i++) {
        unsigned u;
        if (r->trial.io.x_dtype == MOERT_FP32)
            memcpy(&u, (const char *)r->x.data + 4 * i, 4);
        else
            u = (unsigned)half[i] << 16;
        if ((u & 0x7f800000u) == 0x7f800000u)
            return say_error("%s: token %zu, element %zu is not finite", r->o->input,
                             i / (size_t)hidden, i % (size_t)hidden);
        memcpy(r->trial.x + i, &u, 4);
    }
    return true;
}

static moert_result forward(void *user, moert_stream s) {
    struct run *r = user;
    moert_io io[MOE_MAX_RANKS];
    if (r->ranks == 1)
        return moert_forward(r->layer[0], &r->trial.io, s);
    for (int i = 0; i < r->ranks; i++)
        io[i] = r->part[i].io;
    return moert_world_forward(r->s.world, r->layer, io, s);
}

/* Every rank's tokens, consecutive ones of the trial's, to and from its device. */
static bool upload(struct run *r) {
    size_t h = (size_t)r->trial.shape->hidden, first = 0;
    for (int i = 0; r->ranks > 1 && i < r->ranks; first += (size_t)r->rank_tokens[i++]) {
        memcpy(r->part[i].x, r->trial.x + first * h, (size_t)r->rank_tokens[i] * h * 4);
        if (!session_ok(trial_upload(&r->part[i]), "upload"))
            return false;
    }
    return r->ranks > 1 || session_ok(trial_upload(&r->trial), "upload");
}

static bool download(struct run *r) {
    struct trial *t = &r->trial;
    size_t h = (size_t)t->shape->hidden, k = (size_t)t->shape->topk, first = 0;
    for (int i = 0; r->ranks > 1 && i < r->ranks; first += (size_t)r->rank_tokens[i++]) {
        const struct trial *p = &r->part[i];
        size_t n = (size_t)r->rank_tokens[i];
        if (!session_ok(trial_download(&r->part[i]), "download"))
            return false;
        memcpy(t->out + first * h, p->out, n * h * 4);
        memcpy(t->idx + first * k, p->idx, n * k * 4);
        memcpy(t->weight + first * k, p->weight, n * k * 4);
    }
    return r->ranks > 1 || session_ok(trial_download(t), "download");
}

static int compare_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median of a few forwards on a GPU, one on the host. */
static bool timed_forward(struct run *r) {
    double us[5];
    int n = r->s.cuda ? 5 : 1;
    moert_result result = r->s.cuda ? forward(r, NULL) : MOERT_OK;
    for (int i = 0; i < n && !result; i++)
        result = moert_tool_time(r->s.context, NULL, forward, r, &us[i]);
    if (!session_ok(result, "forward"))
        return false;
    qsort(us, (size_t)n, sizeof *us, compare_double);
    r->us = us[n / 2];
    return true;
}

static bool write_output(struct run *r) {
    int64_t t = r->trial.tokens, h = r->trial.shape->hidden, k = r->trial.shape->topk;
    struct moert_tool_tensor out[] = {
        {"out", "F32", 2, {t, h}, r->trial.out, (size_t)(4 * t * h)},
        {"topk_idx", "I32", 2, {t, k}, r->trial.idx, (size_t)(4 * t * k)},
        {"topk_weight", "F32", 2, {t, k}, r->trial.weight, (size_t)(4 * t * k)},
    };
    return session_ok(moert_tool_save(r->o->output, out, 3), r->o->output);
}

/* Random weights come from their formula; a checkpoint's are read back from the device. */
static bool check(struct run *r) {
    const struct moe_plan_class *shape = r->trial.shape;
    struct ref_layer ref;
    struct ref_random *random = NULL;
    struct trial_held *held = NULL;
    if (r->o->weights)
        held = trial_held_open(r->layer[0], shape, &ref);
    else
        random = ref_random_layer(shape, (unsigned)r->o->seed, r->number, &ref);
    bool ok = held || random;
    if (ok) {
        int sample[16];
        int n = trial_sample(r->trial.tokens, trial_affordable(shape), sample);
        if (shape->static_table >= 0)
            ref.static_experts = moert_tool_table(r->s.bundle, shape->static_table);
        ok = trial_compare(&r->trial, &ref, TRIAL_ROUTED, sample, n, &r->error);
    }
    trial_held_free(held);
    ref_random_free(random);
    return ok || say_error("reference: out of memory");
}

static void print_json(const struct run *r) {
    struct arena a = {0};
    struct buf b = {.arena = &a};
    buf_printf(&b, "{\"bundle\":");
    buf_json_string(&b, r->o->bundle);
    buf_printf(&b, ",\"device\":");
    buf_json_string(&b, r->s.device.name);
    buf_printf(&b, ",\"target\":\"%s\",\"layer\":%d,\"ranks\":%d,\"tokens\":%d,\"us\":%.3f,",
               target_names[r->s.device.target], r->number, r->ranks, r->trial.tokens, r->us);
    buf_printf(&b, "\"check\":{\"tokens\":%d,", r->error.tokens);
    trial_json(&r->error, &b);
    buf_printf(&b, "}}");
    puts(b.data);
    arena_free(&a);
}

static void print_text(const struct run *r) {
    const struct moe_plan_class *c = r->trial.shape;
    char text[160];
    printf("layer %d: hidden %d, intermediate %d, %d experts, top-%d, %s, %s\n", r->number,
           c->hidden, c->inter, c->experts, c->topk, router_names[c->router],
           activation_names[c->activation]);
    printf("device:  %s (%s)\n", r->s.device.name, target_names[r->s.device.target]);
    if (r->ranks > 1)
        printf("ranks:   %d, in this process\n", r->ranks);
    printf("weights: %s\n", r->o->weights ? r->o->weights : "random");
    printf("forward: %d tokens in %.1f us\n", r->trial.tokens, r->us);
    trial_describe(&r->error, text, sizeof text);
    printf("check:   %s: %s\n", text, trial_passes(&r->error) ? "passed" : "FAILED");
    if (r->o->output)
        printf("wrote:   %s\n", r->o->output);
}

/* What each of several ranks needs for its share of the tokens. */
static bool open_parts(struct run *r) {
    int64_t tokens = r->trial.tokens;
    for (int i = 0; r->ranks > 1 && i < r->ranks; i++) {
        r->rank_tokens[i] = (int)(tokens * (i + 1) / r->ranks) - (int)(tokens * i / r->ranks);
        if (!session_ok(trial_open(&r->part[i], r->s.rank[i], r->layer[i], r->trial.shape,
                                   r->rank_tokens[i], r->trial.io.x_dtype, MOERT_FP32),
                        "buffers"))
            return false;
        r->part[i].io.rank_tokens = r->rank_tokens;
    }
    return true;
}

static bool open_layers(struct run *r) {
    for (int i = 0; i < r->ranks; i++) {
        r->layer[i] = session_layer(&r->s, i, r->number, r->o->weights, (unsigned)r->o->seed);
        if (!r->layer[i])
            return false;
    }
    return true;
}

static bool prepare(struct run *r) {
    const struct options *o = r->o;
    if (!session_open(&r->s, o->bundle, o->device, true))
        return false;
    r->number = o->layer >= 0 ? o->layer : moert_bundle_layer(r->s.bundle, 0);
    const struct moe_plan_class *c = moert_tool_class(r->s.bundle, r->number);
    if (!session_has_layer(&r->s, r->number))
        return false;
    r->ranks = c->ranks;
    if (o->ranks && o->ranks != c->ranks)
        return say_error("--ranks %d: the bundle is planned for %d (build it with --ep %d)",
                         o->ranks, c->ranks, o->ranks);
    if (o->weights && r->ranks > 1)
        return say_error("--weights: not yet with several ranks; leave it out");
    if (o->input && !open_input(r, c->hidden))
        return false;
    if (!open_layers(r))
        return false;
    int tokens = o->input ? (int)r->x.shape[0] : o->tokens >= 0 ? o->tokens : 64;
    moert_dtype dtype = r->x.data && !strcmp(r->x.dtype, "F32") ? MOERT_FP32 : MOERT_BF16;
    if (!session_ok(
            trial_open(&r->trial, r->s.context, r->layer[0], c, tokens, dtype, MOERT_FP32),
            "buffers") ||
        !open_parts(r))
        return false;
    if (o->input && !copy_input(r, c->hidden))
        return false;
    if (!o->input)
        trial_random_x(&r->trial, (unsigned)o->seed, r->number);
    return upload(r);
}

int cmd_run(int argc, char **argv) {
    struct options o;
    int code;
    if (!parse(argc, argv, &o, &code))
        return code;
    struct run r = {.o = &o};
    bool ok = prepare(&r) && timed_forward(&r) && download(&r) && check(&r) &&
              (!o.output || write_output(&r));
    if (ok) {
        (o.json ? print_json : print_text)(&r);
        ok = trial_passes(&r.error);
    }
    if (r.trial.context)
        trial_close(&r.trial);
    for (int i = 0; i < MOE_MAX_RANKS; i++) {
        if (r.part[i].context)
            trial_close(&r.part[i]);
        moert_layer_destroy(r.layer[i]);
    }
    moert_tool_close(r.input);
    session_close(&r.s);
    return ok ? 0 : 1;
}
