/* moec verify: a bundle's integrity, then every layer class against the reference. */
#include "device.h"
#include "trial.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: moec verify BUNDLE [options]\n"
    "Checks every file against the manifest and the plan's structure, then runs one layer of\n"
    "each class with random weights and compares sampled tokens with the reference: expert "
    "ids\n"
    "exact, weights to 1e-6, relative L2 of the output at most 4e-3; in fp8, against a "
    "reference\n"
    "that quantises as the kernels do, a difference 1 - 2xy/(x^2 + y^2) of at most 1e-4.\n"
    "\n"
    "  --device host|cuda   where; default: a GPU if one is there, else the host\n"
    "  --layer N            this layer only\n"
    "  --tokens LIST        batch sizes, as 1,7,64; default: what the device affords\n"
    "  --seed S             default 1\n"
    "  --integrity          stop after the files\n"
    "  --json               the result as JSON\n"
    "Exit status: 0 all passed, 1 something did not, 2 wrong usage.\n";

enum { MAX_TOKENS = 16 };

struct options {
    const char *bundle, *device;
    int layer, seed;
    int tokens[MAX_TOKENS], num_tokens;
    bool json, integrity;
};

struct verify {
    const struct options *o;
    struct session s;
    struct buf json;
    int checked, failed;
};

static bool parse(int argc, char **argv, struct options *o, int *code) {
    enum { DEVICE = 256, LAYER, TOKENS, SEED, INTEGRITY, JSON };
    static const struct option longs[] = {{"device", 1, 0, DEVICE},
                                          {"layer", 1, 0, LAYER},
                                          {"tokens", 1, 0, TOKENS},
                                          {"seed", 1, 0, SEED},
                                          {"integrity", 0, 0, INTEGRITY},
                                          {"json", 0, 0, JSON},
                                          {"help", 0, 0, 'h'},
                                          {0}};
    int c;
    bool ok = true;
    *o = (struct options){.layer = -1, .seed = 1};
    *code = 2;
    while (ok && (c = getopt_long(argc, argv, "h", longs, NULL)) != -1)
        switch (c) {
        case DEVICE:
            ok = option_device(optarg, &o->device);
            break;
        case LAYER:
            ok = option_int("--layer", optarg, 0, 1 << 20, &o->layer);
            break;
        case TOKENS:
            ok = option_list("--tokens", optarg, 0, o->tokens, MAX_TOKENS, &o->num_tokens);
            break;
        case SEED:
            ok = option_int("--seed", optarg, 0, 0x7fffffff, &o->seed);
            break;
        case INTEGRITY:
            o->integrity = true;
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
        o->bundle = argv[optind];
    return ok;
}

static void default_tokens(struct options *o, bool cuda, int max_tokens) {
    static const int host[] = {1, 7, 16}, gpu[] = {1, 7, 64, 177, 2048};
    const int *list = cuda ? gpu : host;
    int n = cuda ? 5 : 3;
    for (int i = 0; i < n; i++)
        if (i == 0 || list[i] <= max_tokens)
            o->tokens[o->num_tokens++] = list[i];
}

static void report(struct verify *v, int layer, int tokens, const struct trial_error *e) {
    char text[160];
    bool passed = trial_passes(e);
    v->failed += !passed;
    buf_printf(&v->json, "%s{\"layer\":%d,\"tokens\":%d,\"compared\":%d,",
               v->checked++ ? "," : "", layer, tokens, e->tokens);
    trial_json(e, &v->json);
    buf_printf(&v->json, "}");
    trial_describe(e, text, sizeof text);
    if (!v->o->json)
        printf("layer %d, batch of %d: compared %s: %s\n", layer, tokens, text,
               passed ? "passed" : "FAILED");
}

/* One batch size; false when it could not be run at all. */
static bool check_batch(struct verify *v, moert_layer *l, int layer, int tokens,
                        const struct ref_layer *ref) {
    const struct moe_plan_class *c = moert_tool_class(v->s.bundle, layer);
    struct trial t;
    struct trial_error e;
    int sample[16], n = trial_sample(tokens, trial_affordable(c), sample);
    if (!session_ok(trial_open(&t, v->s.context, l, c, tokens, MOERT_BF16, MOERT_BF16),
                    "buffers"))
        return false;
    trial_random_x(&t, (unsigned)v->o->seed, layer);
    trial_settle(&t, ref, (unsigned)v->o->seed, sample, n);
    bool ok = session_ok(trial_upload(&t), "upload") &&
              session_ok(moert_forward(l, &t.io, NULL), "forward") &&
              session_ok(moert_tool_sync(v->s.context, NULL), "forward") &&
              session_ok(trial_download(&t), "download");
    if (ok && trial_overran(&t))
        ok = say_error("layer %d: rows beyond the batch were written", layer);
    if (ok)
        ok = trial_compare(&t, ref, TRIAL_ROUTED, sample, n, &e) ||
             say_error("reference: out of memory");
    if (ok)
        report(v, layer, tokens, &e);
    trial_close(&t);
    return ok;
}

static bool check_layer(struct verify *v, int layer) {
    const struct moe_plan_class *c = moert_tool_class(v->s.bundle, layer);
    struct options o = *v->o;
    struct ref_layer ref;
    if (!o.num_tokens)
        default_tokens(&o, v->s.cuda, c->max_tokens);
    moert_layer *l = session_layer(&v->s, 0, layer, NULL, (unsigned)o.seed);
    if (!l)
        return false;
    struct ref_random *random = ref_random_layer(c, (unsigned)o.seed, layer, &ref);
    bool ok = random || say_error("reference: out of memory");
    if (ok && c->static_table >= 0)
        ref.static_experts = moert_tool_table(v->s.bundle, c->static_table);
    for (int i = 0; i < o.num_tokens && ok; i++)
        ok = check_batch(v, l, layer, o.tokens[i], &ref);
    ref_random_free(random);
    moert_layer_destroy(l);
    return ok;
}

/* The first layer of every class, or the one asked for. */
static bool check_classes(struct verify *v) {
    int n = moert_bundle_num_layers(v->s.bundle), found = 0;
    for (int i = 0; i < n; i++) {
        int layer = moert_bundle_layer(v->s.bundle, i);
        if (v->o->layer >= 0 ? layer != v->o->layer : !session_first_of_class(&v->s, i))
            continue;
        found++;
        if (!check_layer(v, layer))
            return false;
    }
    return found || session_has_layer(&v->s, v->o->layer);
}

/* Up to the device's name, which is null when nothing ran. */
static void json_head(struct arena *a, const struct options *o, const char *device,
                      bool passed) {
    struct buf head = {.arena = a};
    buf_printf(&head, "{\"bundle\":");
    buf_json_string(&head, o->bundle);
    buf_printf(&head, ",\"integrity\":true,\"device\":");
    if (device)
        buf_json_string(&head, device);
    printf("%s%s,\"passed\":%s,\"checks\":[", head.data, device ? "" : "null",
           passed ? "true" : "false");
}

static bool check_integrity(struct arena *a, const struct options *o) {
    moert_bundle *b = NULL;
    if (!session_ok(moert_bundle_open(o->bundle, &b), o->bundle))
        return false;
    if (!o->json)
        printf("%s: every file is as the manifest says\n", o->bundle);
    else if (o->integrity) {
        json_head(a, o, NULL, true);
        puts("]}");
    }
    moert_bundle_close(b);
    return true;
}

static bool check_numerics(struct verify *v) {
    if (!session_open(&v->s, v->o->bundle, v->o->device, false))
        return false;
    if (!v->o->json)
        printf("device: %s (%s)\n", v->s.device.name, target_names[v->s.device.target]);
    bool ok = check_classes(v);
    if (ok && v->o->json) {
        json_head(v->json.arena, v->o, v->s.device.name, !v->failed);
        printf("%s]}\n", v->json.data);
    }
    session_close(&v->s);
    return ok && !v->failed;
}

int cmd_verify(int argc, char **argv) {
    struct options o;
    struct arena a = {0};
    int code;
    if (!parse(argc, argv, &o, &code))
        return code;
    struct verify v = {.o = &o, .json = {.arena = &a}};
    bool ok = check_integrity(&a, &o) && (o.integrity || check_numerics(&v));
    arena_free(&a);
    return ok ? 0 : 1;
}
