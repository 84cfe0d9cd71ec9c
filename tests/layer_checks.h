/* What every layer must do on every device: shared by the host's tests and the GPU's. A check
 * returns false and says why in env->why. */
#ifndef LAYER_CHECKS_H
#define LAYER_CHECKS_H

#include "../compiler/moec.h"
#include "../compiler/trial.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Small models that between them have every router, every activation and the awkward sizes: odd
 * multiples of 16, a remainder of 2880 over the tiles, 1 to 1024 experts, top-1 to top-32. */
struct layer_case {
    const char *name;
    int max_tokens; /* of one pass; more is chunked */
    int hidden, inter, experts, topk;
    const char *rest; /* of the model file */
};
static const struct layer_case layer_cases[] = {
    {"softmax", 177, 272, 80, 60, 8,
     "router: {method: softmax_topk, norm_topk_prob: true}\nactivation: swiglu\n"},
    {"mixtral", 192, 144, 112, 8, 2,
     "router: {method: softmax_topk, norm_topk_prob: true, logits_dtype: bfloat16}\n"
     "activation: swiglu\n"},
    {"gptoss", 100, 2880, 48, 16, 4,
     "router: {method: topk_softmax, bias: true}\n"
     "activation: {name: swiglu_oai, alpha: 1.702, limit: 0.9}\nweights: {bias: true}\n"},
    {"deepseek", 177, 272, 80, 64, 6,
     "router: {method: deepseek_v3, n_group: 8, topk_group: 4, norm_topk_prob: true,\n"
     "  routed_scaling_factor: 2.5, correction_bias: true}\n"
     "shared_experts: {intermediate_size: 96}\n"},
    {"maskzero", 177, 80, 48, 32, 8,
     "router: {method: deepseek_v3, n_group: 4, topk_group: 2, norm_topk_prob: false,\n"
     "  correction_bias: true, masked_groups: zero}\n"},
    {"deepseek2", 64, 144, 48, 64, 6,
     "router: {method: deepseek_v3, scoring: softmax, norm_topk_prob: false,\n"
     "  routed_scaling_factor: 16.0}\nshared_experts: {intermediate_size: 112}\n"},
    {"deepseek2groups", 64, 144, 48, 40, 6,
     "router: {method: deepseek_v3, scoring: softmax, norm_topk_prob: false, n_group: 8,\n"
     "  topk_group: 3, group_score: best, routed_scaling_factor: 16.0}\n"
     "shared_experts: {intermediate_size: 48}\n"},
    {"llama4", 177, 272, 112, 16, 1,
     "router: {method: llama4}\nshared_experts: {intermediate_size: 80}\n"},
    {"minimax", 177, 208, 48, 96, 8, "router: {method: minimax2, correction_bias: true}\n"},
    {"phimoe", 177, 144, 80, 16, 2, "router: {method: sparse_mixer, jitter_eps: 0.2}\n"},
    {"static", 177, 80, 48, 24, 3, "router: {method: static, experts: [17, 2, 11]}\n"},
    {"balanced", 192, 80, 48, 20, 3, "router: {method: balanced}\n"},
    {"nemotron", 177, 80, 48, 512, 22,
     "router: {method: deepseek_v3, norm_topk_prob: true, correction_bias: true}\n"
     "activation: relu2\nshared_experts: {intermediate_size: 16}\n"},
    {"oneexpert", 192, 112, 144, 1, 1,
     "router: {method: softmax_topk, norm_topk_prob: false}\nactivation: geglu\n"},
    {"thousand", 70, 48, 16, 1024, 32,
     "router: {method: softmax_topk, norm_topk_prob: false}\n"
     "activation: {name: geglu, approximate: tanh}\n"},
    {"qwennext", 177, 144, 48, 100, 10,
     "router: {method: softmax_topk, norm_topk_prob: true}\n"
     "shared_experts: {intermediate_size: 48, gate: true}\nweights: {bias: true}\n"},
    {"many", 1100, 48, 16, 72, 8,
     "router: {method: softmax_topk, norm_topk_prob: true}\nactivation: swiglu\n"},
    {"fp8block", 177, 272, 80, 64, 6,
     "router: {method: deepseek_v3, n_group: 8, topk_group: 4, norm_topk_prob: true,\n"
     "  routed_scaling_factor: 2.5, correction_bias: true}\n"
     "shared_experts: {intermediate_size: 96}\n"
     "weights: {format: fp8_block, block: [128, 128]}\n"},
    {"fp8wide", 192, 144, 400, 8, 2,
     "router: {method: softmax_topk, norm_topk_prob: true}\n"
     "shared_experts: {intermediate_size: 272, gate: true}\n"
     "weights: {format: fp8_block, block: [128, 128], bias: true}\n"},
    {"fp8tensor", 100, 2880, 48, 16, 4,
     "router: {method: topk_softmax, bias: true}\n"
     "activation: {name: swiglu_oai, alpha: 1.702, limit: 0.9}\n"
     "weights: {format: fp8_tensor, bias: true}\n"},
    {"fp8llama", 177, 272, 112, 16, 1,
     "router: {method: llama4}\nshared_experts: {intermediate_size: 80}\n"
     "weights: {format: fp8_tensor}\n"},
    {"fp8relu8", 192, 272, 144, 8, 2,
     "router: {method: softmax_topk, norm_topk_prob: true}\nactivation: relu2\n"
     "weights: {format: fp8_block, block: [128, 128]}\n"},
    {"fp8relu", 177, 80, 304, 512, 22,
     "router: {method: deepseek_v3, norm_topk_prob: true, correction_bias: true}\n"
     "activation: relu2\nshared_experts: {intermediate_size: 16}\n"
     "weights: {format: fp8_block, block: [128, 128]}\n"},
};
enum { NUM_LAYER_CASES = sizeof layer_cases / sizeof *layer_cases };

struct env {
    char why[512];
    moert_bundle *bundle;
    moert_context *context;
    moert_layer *layer;
    const struct moe_plan_class *shape;
    int number; /* of the layer */
    struct ref_random *random;
    struct ref_layer ref;
};

static const unsigned long long weights_seed = 7;

static bool why(struct env *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool why(struct env *e, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(e->why, sizeof e->why, fmt, args);
    va_end(args);
    return false;
}
static bool good(struct env *e, moert_result r, const char *what) {
    return r == MOERT_OK || why(e, "%s: %s", what, moert_last_error());
}

/* ---- bundles ---- */

/* Compiles FILE into a bundle; messages go to stderr. */
static bool compile_file(const char *file, const char *targets, int max_tokens,
                         const char *out) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    char set[64];
    snprintf(set, sizeof set, "moe_config.max_num_tokens=%d", max_tokens);
    const char *sets[] = {set};
    struct overrides o = {.targets = targets, .set = sets, .num_set = 1};
    struct build_options options = {.jobs = 2, .out = out};
    struct build_report report;
    struct deployment *dep = deployment_read(&a, &d, file, &o);
    struct plan *plan = dep ? plan_make(&a, &d, dep, 1) : NULL;
    bool ok = plan && bundle_build(&a, &d, plan, &options, &report);
    diag_print(&d, stderr);
    arena_free(&a);
    return ok;
}

static bool compile_case(const struct layer_case *c, const char *targets, const char *dir,
                         char *out, size_t size) {
    char file[1024], text[1024];
    snprintf(file, sizeof file, "%s/%s.yaml", dir, c->name);
    snprintf(out, size, "%s/%s.moe", dir, c->name);
    int n = snprintf(text, sizeof text,
                     "name: %s\nnum_hidden_layers: 3\nmoe_layers: [2]\nhidden_size: %d\n"
                     "moe_intermediate_size: %d\nnum_experts: %d\nnum_experts_per_tok: %d\n%s",
                     c->name, c->hidden, c->inter, c->experts, c->topk, c->rest);
    return !dir_make(dir) && !file_write(file, text, (size_t)n) &&
           compile_file(file, targets, c->max_tokens, out);
}

static bool env_open(struct env *e, const char *bundle, moert_device device, int layer) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    *e = (struct env){.number = layer};
    cfg.device = device;
    cfg.host_threads = 1;
    if (!good(e, moert_bundle_open(bundle, &e->bundle), bundle) ||
        !good(e, moert_context_create(e->bundle, &cfg, &e->context), "context"))
        return false;
    if (layer < 0)
        e->number = moert_bundle_layer(e->bundle, 0);
    e->shape = moert_tool_class(e->bundle, e->number);
    if (!good(e, moert_layer_create(e->context, e->number, &e->layer), "layer") ||
        !good(e, moert_layer_random(e->layer, weights_seed), "random weights"))
        return false;
    e->random = ref_random_layer(e->shape, weights_seed, e->number, &e->ref);
    if (!e->random)
        return why(e, "out of memory");
    if (e->shape->static_table >= 0)
        e->ref.static_experts = moert_tool_table(e->bundle, e->shape->static_table);
    return true;
}
static void env_close(struct env *e) {
    ref_random_free(e->random);
    moert_layer_destroy(e->layer);
    moert_context_destroy(e->context);
    moert_bundle_close(e->bundle);
}

/* ---- one forward ---- */

static bool everything(int tokens, int **sample) {
    *sample = malloc(sizeof(int) * ((size_t)tokens + 1));
    for (int i = 0; *sample && i < tokens; i++)
        (*sample)[i] = i;
    return *sample != NULL;
}

typedef moert_result step_fn(moert_layer *l, const moert_io *io, moert_stream s);

static bool run_steps(struct env *e, struct trial *t, step_fn *const *steps, int n) {
    if (!good(e, trial_upload(t), "upload"))
        return false;
    for (int i = 0; i < n; i++)
        if (!good(e, steps[i](t->layer, &t->io, NULL), "forward"))
            return false;
    if (!good(e, moert_tool_sync(e->context, NULL), "sync") ||
        !good(e, trial_download(t), "download"))
        return false;
    return !trial_overran(t) || why(e, "T=%d: rows beyond the batch were written", t->tokens);
}
static bool run_forward(struct env *e, struct trial *t) {
    return run_steps(e, t, (step_fn *const[]){moert_forward}, 1);
}

static bool agrees(struct env *e, const struct trial *t, enum trial_choice choice,
                   const int *sample, int n, const char *what) {
    struct trial_error r;
    char text[200];
    if (!trial_compare(t, &e->ref, choice, sample, n, &r))
        return why(e, "reference: out of memory");
    if (trial_passes(&r) && r.near_ties == 0)
        return true;
    trial_describe(&r, text, sizeof text);
    return why(e, "%s, T=%d: %s", what, t->tokens, text);
}

static bool agrees_everywhere(struct env *e, const struct trial *t, enum trial_choice choice,
                              const char *what) {
    int *sample;
    bool ok = everything(t->tokens, &sample) && agrees(e, t, choice, sample, t->tokens, what);
    free(sample);
    return ok;
}

static bool open_trial(struct env *e, struct trial *t, int tokens, moert_dtype x,
                       moert_dtype out) {
    return good(e, trial_open(t, e->context, e->layer, e->shape, tokens, x, out), "buffers");
}

/* Random x, its near ties redrawn: none of them is left to chance. */
static bool draw(struct env *e, struct trial *t, unsigned seed, const int *sample, int n) {
    trial_random_x(t, seed, e->number);
    trial_settle(t, &e->ref, seed, sample, n);
    for (int i = 0; i < n; i++) {
        double margin, *logits = malloc(sizeof(double) * (size_t)e->shape->experts);
        ref_logits(&e->ref, t->x + (size_t)sample[i] * (size_t)e->shape->hidden, 1, logits);
        ref_margin(&e->ref, logits, 1, &margin);
        free(logits);
        if (margin < TRIAL_MARGIN)
            return why(e, "token %d: no draw without a near tie", sample[i]);
    }
    return true;
}

/* ---- checks ---- */

/* A batch by the layer's own router, compared at n sampled tokens (0: all). */
static bool check_batch(struct env *e, int tokens, moert_dtype x, moert_dtype out, int n) {
    struct trial t;
    int *sample;
    if (!everything(tokens, &sample) || !open_trial(e, &t, tokens, x, out))
        return false;
    n = n > 0 ? trial_sample(tokens, n, sample) : tokens;
    bool ok = draw(e, &t, 11 + (unsigned)tokens, sample, n) && run_forward(e, &t) &&
              agrees(e, &t, TRIAL_ROUTED, sample, n, "batch");
    trial_close(&t);
    free(sample);
    return ok;
}

/* A token's logits of one kind: full of ties, or saturated. attempt redraws them. */
static void make_logits(struct trial *t, int token, bool saturated, unsigned attempt) {
    static const float far[] = {-90, -40, -20, 20, 25, 40};
    int experts = t->shape->experts;
    unsigned long long seed = moe_hash(attempt * 1000003ull + (unsigned)token);
    for (int i = 0; i < experts; i++) {
        float v = (float)((int)(moe_random_value(seed, (unsigned)i) * 4)) / 4;
        if (saturated)
            v = far[moe_hash(seed + (unsigned)i) % 6];
        t->logits[(size_t)token * (size_t)experts + (size_t)i] = v;
    }
}

static bool settled_logits(struct env *e, struct trial *t, int token) {
    size_t experts = (size_t)e->shape->experts;
    double margin = 0, *logits = malloc(sizeof(double) * experts);
    for (unsigned attempt = 0; logits && margin < TRIAL_MARGIN && attempt < 1000; attempt++) {
        make_logits(t, token, token % 3 == 2, attempt);
        for (size_t i = 0; i < experts; i++)
            logits[i] = t->logits[(size_t)token * experts + i];
        ref_margin(&e->ref, logits, 1, &margin);
    }
    free(logits);
    return margin >= TRIAL_MARGIN || why(e, "token %d: no logits without a near tie", token);
}

/* The caller's logits, full of exact ties, which go to the lowest id. */
static bool check_logits(struct env *e, moert_dtype dtype) {
    struct trial t;
    bool ok = open_trial(e, &t, 64, MOERT_BF16, MOERT_FP32) &&
              good(e, trial_use_logits(&t, dtype), "buffers");
    if (ok)
        trial_random_x(&t, 3, e->number);
    for (int i = 0; ok && i < t.tokens; i++)
        ok = settled_logits(e, &t, i);
    ok = ok && run_forward(e, &t) && agrees_everywhere(e, &t, TRIAL_ROUTED, "caller's logits");
    trial_close(&t);
    return ok;
}

enum given { GIVEN_MIXED, GIVEN_ONE_EXPERT, GIVEN_NONE };

/* The caller's own top-k. Mixed: some entries have no expert (-1). */
static void fill_given(struct trial *t, enum given kind) {
    int k = t->shape->topk, experts = t->shape->experts;
    for (int i = 0; i < t->tokens * k; i++) {
        int e = (int)(moe_hash(99 + (unsigned)i) % (unsigned)experts);
        if (kind == GIVEN_ONE_EXPERT)
            e = i % k == 0 ? experts - 1 : -1;
        if (kind == GIVEN_NONE || (kind == GIVEN_MIXED && i % 5 == 3))
            e = -1;
        t->idx[i] = e;
        t->weight[i] = 0.25f + (float)(i % 7) / 8;
    }
}

static bool check_given(struct env *e, int tokens, enum given kind) {
    struct trial t;
    if (!open_trial(e, &t, tokens, MOERT_FP32, MOERT_FP32))
        return false;
    trial_random_x(&t, 5, e->number);
    fill_given(&t, kind);
    bool ok = run_steps(e, &t, (step_fn *const[]){moert_experts, moert_combine}, 2) &&
              agrees_everywhere(e, &t, TRIAL_GIVEN, "caller's top-k");
    trial_close(&t);
    return ok;
}

/* ---- rows and tiles ---- */

/* What a plain loop makes of the entries' experts, of which slot s holds the s-th. */
struct tables {
    int *offsets, *row_entry, *row_of;
    struct moe_tile *tiles;
};

static bool same_tiles(struct env *e, const struct tables *got, const int *offsets) {
    const struct moe_tile *t = got->tiles + 1;
    int n = got->tiles[0].slot, at = 0, most = 0;
    for (int i = 0; i < n; i++)
        most = t[i].rows > most ? t[i].rows : most;
    for (int s = 0; s < e->shape->slots_per_rank; s++) {
        int first = at;
        for (int row = offsets[s]; row < offsets[s + 1]; row += t[at++].rows)
            if (at >= n || t[at].slot != s || t[at].row != row || t[at].first != first ||
                t[at].rows < 1 || t[at].rows > offsets[s + 1] - row ||
                (t[at].rows < most && row + t[at].rows != offsets[s + 1]))
                return why(e, "tile %d, of slot %d", at, s);
        for (int i = first; i < at; i++)
            if (t[i].count != at - first)
                return why(e, "tile %d of a slot of %d, not %d", i, at - first, t[i].count);
    }
    return at == n || why(e, "%d tiles, not %d", n, at);
}

static bool same_tables(struct env *e, const struct trial *t, const struct tables *got) {
    const int entries = t->tokens * t->shape->topk, slots = t->shape->slots_per_rank;
    int row = 0;
    for (int s = 0; s < slots; s++) {
        if (got->offsets[s] != row)
            return why(e, "slot %d begins at row %d, not %d", s, got->offsets[s], row);
        for (int i = 0; i < entries; i++) {
            if (t->idx[i] != s)
                continue;
            if (got->row_of[i] != row || got->row_entry[row] != i)
                return why(e, "entry %d is in row %d, not %d", i, got->row_of[i], row);
            row++;
        }
    }
    for (int i = 0; i < entries; i++)
        if (t->idx[i] < 0 && got->row_of[i] != -1)
            return why(e, "entry %d without an expert has row %d", i, got->row_of[i]);
    return (got->offsets[slots] == row ||
            why(e, "%d rows, not %d", got->offsets[slots], row)) &&
           same_tiles(e, got, got->offsets);
}

/* What moe_slots leaves behind for a batch of the caller's own top-k. */
static bool check_tables(struct env *e, int tokens, enum given kind) {
    struct trial t;
    struct moe_tile first = {0};
    const size_t entries = (size_t)(tokens * e->shape->topk),
                 slots = (size_t)e->shape->slots_per_rank, ints = entries * sizeof(int),
                 tile = sizeof first;
    struct tables got = {malloc((slots + 1) * sizeof(int)), malloc(ints), malloc(ints),
                         malloc((1 + entries) * tile)};
    if (!open_trial(e, &t, tokens, MOERT_BF16, MOERT_FP32))
        return false;
    fill_given(&t, kind);
    bool ok =
        run_steps(e, &t, (step_fn *const[]){moert_experts}, 1) &&
        good(e,
             moert_tool_workspace(e->context, MOE_WS_OFFSETS, got.offsets,
                                  (slots + 1) * sizeof(int)),
             "offsets") &&
        good(e, moert_tool_workspace(e->context, MOE_WS_ROW_ENTRY, got.row_entry, ints),
             "rows") &&
        good(e, moert_tool_workspace(e->context, MOE_WS_ROW_OF, got.row_of, ints), "rows") &&
        good(e, moert_tool_workspace(e->context, MOE_WS_TILES, &first, tile), "tiles") &&
        (first.slot <= (int)entries || why(e, "%d tiles", first.slot)) &&
        good(e,
             moert_tool_workspace(e->context, MOE_WS_TILES, got.tiles,
                                  (1 + (size_t)first.slot) * tile),
             "tiles") &&
        same_tables(e, &t, &got);
    free(got.offsets), free(got.row_entry), free(got.row_of), free(got.tiles);
    trial_close(&t);
    return ok;
}

static bool same_results(const struct trial *t, const float *out, const int32_t *idx) {
    size_t n = (size_t)t->tokens;
    return !memcmp(t->out, out, 4 * n * (size_t)t->shape->hidden) &&
           !memcmp(t->idx, idx, 4 * n * (size_t)t->shape->topk);
}

/* Steps alone, and runs again and again, give the same bits. */
static bool check_repeats(struct env *e, int tokens, int runs) {
    struct trial t;
    if (!open_trial(e, &t, tokens, MOERT_BF16, MOERT_BF16))
        return false;
    size_t n = (size_t)tokens;
    float *out = malloc(4 * n * (size_t)e->shape->hidden);
    int32_t *idx = malloc(4 * n * (size_t)e->shape->topk);
    trial_random_x(&t, 21, e->number);
    bool ok = out && idx && run_forward(e, &t);
    if (ok) {
        memcpy(out, t.out, 4 * n * (size_t)e->shape->hidden);
        memcpy(idx, t.idx, 4 * n * (size_t)e->shape->topk);
        ok = run_steps(e, &t, (step_fn *const[]){moert_route, moert_experts, moert_combine},
                       3) &&
             (same_results(&t, out, idx) || why(e, "steps alone differ from forward"));
    }
    for (int i = 1; ok && i < runs; i++)
        ok = run_forward(e, &t) && (same_results(&t, out, idx) || why(e, "run %d differs", i));
    free(out);
    free(idx);
    trial_close(&t);
    return ok;
}

/* The ids of a token of NaN: legal, distinct, and the reference's. */
static bool nan_is_routed(struct env *e, const struct trial *nan) {
    double *logits = malloc(sizeof(double) * (size_t)e->shape->experts);
    int idx[32];
    float weight[32];
    if (!logits)
        return why(e, "out of memory");
    ref_logits(&e->ref, nan->x, 1, logits);
    ref_route(&e->ref, logits, 1, idx, weight);
    free(logits);
    return !memcmp(idx, nan->idx, sizeof(int) * (size_t)e->shape->topk) ||
           why(e, "NaN goes to experts %d, ..., %d, not %d, ..., %d", nan->idx[0],
               nan->idx[e->shape->topk - 1], idx[0], idx[e->shape->topk - 1]);
}

/* What a batch of NaN leaves in the workspace must not reach the next one. */
static bool check_nan(struct env *e) {
    struct trial nan, t;
    int tokens = e->shape->max_tokens;
    if (!open_trial(e, &nan, tokens, MOERT_BF16, MOERT_BF16))
        return false;
    for (size_t i = 0; i < (size_t)tokens * (size_t)e->shape->hidden; i++)
        nan.x[i] = NAN;
    bool ok = run_forward(e, &nan) && nan_is_routed(e, &nan);
    trial_close(&nan);
    if (!ok || !open_trial(e, &t, 7, MOERT_BF16, MOERT_FP32))
        return false;
    int sample[7];
    int n = trial_sample(7, 7, sample);
    ok = draw(e, &t, 31, sample, n) && run_forward(e, &t) &&
         agrees(e, &t, TRIAL_ROUTED, sample, n, "after NaN");
    trial_close(&t);
    return ok;
}

/* A token of NaN, or with an infinity, is alone in it: its experts exist, and the others' results
 * keep their bits. */
static bool check_bad_token(struct env *e, float bad) {
    enum { TOKENS = 9, BAD = 4 };
    struct trial t;
    size_t h = (size_t)e->shape->hidden, k = (size_t)e->shape->topk;
    if (!open_trial(e, &t, TOKENS, MOERT_BF16, MOERT_FP32))
        return false;
    float *out = malloc(4 * TOKENS * h);
    trial_random_x(&t, 41, e->number);
    bool ok = out && run_forward(e, &t);
    if (ok) {
        memcpy(out, t.out, 4 * TOKENS * h);
        for (size_t i = 0; i < h; i++)
            t.x[BAD * h + i] = isnan(bad) || i == 5 ? bad : t.x[BAD * h + i];
        ok = run_forward(e, &t);
    }
    for (size_t i = 0; ok && i < TOKENS; i++)
        ok = i == BAD || !memcmp(t.out + i * h, out + i * h, 4 * h) ||
             why(e, "token %d changed with %g in token %d", (int)i, bad, BAD);
    for (size_t j = 0; ok && j < k; j++)
        ok = (unsigned)t.idx[BAD * k + j] < (unsigned)e->shape->experts ||
             why(e, "a token with %g went to expert %d", bad, t.idx[BAD * k + j]);
    free(out);
    trial_close(&t);
    return ok;
}

static bool same_weights(const struct moe_plan_class *c, const struct ref_expert *a,
                         const struct ref_expert *b, int inter) {
    size_t bytes = sizeof(float) * (size_t)inter * (size_t)c->hidden;
    return (!a->gate || !memcmp(a->gate, b->gate, bytes)) && !memcmp(a->up, b->up, bytes) &&
           !memcmp(a->down, b->down, bytes);
}

/* Random weights are the formula's to the last bit, whatever the device that made them. */
static bool check_weights(struct env *e) {
    struct ref_layer held;
    const struct moe_plan_class *c = e->shape;
    struct trial_held *h = trial_held_open(e->layer, c, &held);
    if (!h)
        return why(e, "weights: %s", moert_last_error());
    bool ok = true;
    for (int i = 0; ok && i<c->experts; i += c->experts> 3 ? c->experts / 3 : 1) {
        struct ref_expert want, got;
        ok = (e->ref.expert(e->ref.user, i, &want) && held.expert(held.user, i, &got) &&
              same_weights(c, &want, &got, c->inter)) ||
             why(e, "expert %d's random weights are not the formula's", i);
    }
    ok = ok &&
         (!c->shared_inter || same_weights(c, &e->ref.shared, &held.shared, c->shared_inter) ||
          why(e, "the shared expert's random weights are not the formula's"));
    trial_held_free(h);
    return ok;
}

/* What fp8 kernels see of x is the reference's to the last bit: no division or rounding of the
 * device's own. */
static bool check_quantised(struct env *e) {
    enum { TOKENS = 7 };
    struct trial t;
    size_t h = (size_t)e->shape->hidden, blocks = (h + 127) / 128;
    if (e->shape->record_format != MOE_FORMAT_FP8_BLOCK)
        return true;
    if (!open_trial(e, &t, TOKENS, MOERT_FP32, MOERT_FP32))
        return false;
    unsigned char *x8 = malloc(TOKENS * h);
    float *scale = malloc(4 * TOKENS * blocks);
    trial_random_x(&t, 61, e->number);
    for (size_t i = 0; i < TOKENS * h; i++) /* small ones beside large ones */
        t.x[i] *= i % 3 ? 1 : 0x1p-9f;
    bool ok =
        x8 && scale && run_forward(e, &t) &&
        good(e, moert_tool_workspace(e->context, MOE_WS_X8, x8, TOKENS * h), "x8") &&
        good(e, moert_tool_workspace(e->context, MOE_WS_XS, scale, 4 * TOKENS * blocks), "xs");
    for (int i = 0; ok && i < TOKENS; i++)
        ref_quantise(t.x + (size_t)i * h, (int)h);
    for (size_t i = 0; ok && i < TOKENS * h; i++) {
        float got = ref_of_e4m3(x8[i]) * scale[i / h * blocks + i % h / 128];
        ok = got == t.x[i] ||
             why(e, "x[%zu][%zu] is quantised to %.9g, not %.9g", i / h, i % h, got, t.x[i]);
    }
    free(x8);
    free(scale);
    trial_close(&t);
    return ok;
}

/* Batches whose entries moe_count counts. */
static bool check_many(struct env *e) {
    const int most = e->shape->max_tokens;
    return !slots_counted(e->shape, most) ||
           (check_batch(e, most, MOERT_BF16, MOERT_FP32, 100) && check_repeats(e, most, 2) &&
            check_tables(e, most, GIVEN_MIXED) && check_tables(e, most, GIVEN_ONE_EXPERT) &&
            check_tables(e, most, GIVEN_NONE) && check_tables(e, 1024, GIVEN_MIXED) &&
            check_tables(e, 641, GIVEN_MIXED));
}

/* Everything above on one layer; runs is how often bits are compared. */
static bool check_layer(struct env *e, int runs) {
    static const struct {
        int tokens;
        moert_dtype x, out;
    } batch[] = {{0, MOERT_BF16, MOERT_BF16},
                 {1, MOERT_BF16, MOERT_FP32},
                 {7, MOERT_FP32, MOERT_BF16},
                 {64, MOERT_BF16, MOERT_BF16},
                 {177, MOERT_FP32, MOERT_FP32}};
    for (size_t i = 0; i < sizeof batch / sizeof *batch; i++)
        if (!check_batch(e, batch[i].tokens, batch[i].x, batch[i].out, 0))
            return false;
    return check_many(e) && check_weights(e) && check_quantised(e) &&
           check_logits(e, MOERT_FP32) && check_logits(e, MOERT_BF16) &&
           check_given(e, 33, GIVEN_MIXED) && check_given(e, 64, GIVEN_ONE_EXPERT) &&
           check_given(e, 5, GIVEN_NONE) && check_repeats(e, 33, runs) && check_nan(e) &&
           check_bad_token(e, NAN) && check_bad_token(e, INFINITY);
}

#endif
