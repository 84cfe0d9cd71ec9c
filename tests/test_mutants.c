/* Faults planted in the templates, one at a time: a small layer on the CPU must go red for each
 * of them, by wrong numbers, by NaN, by results that differ from run to run, by a fault that the
 * host target detects, or by a crash. The unchanged source is green under the same check. */
#include "kernels.h"

#include "../compiler/reference.h"

#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <sys/wait.h>

/* ---- the small layers ---- */

#define CASES(X) \
    X(deepseek, 144, 48, 16, 4, \
      "router: {method: deepseek_v3, n_group: 4, topk_group: 2, norm_topk_prob: true,\n" \
      "  routed_scaling_factor: 2.5, correction_bias: true}\n" \
      "shared_experts: {intermediate_size: 80, gate: true}\n") \
    X(gptoss, 80, 48, 40, 4, \
      "router: {method: topk_softmax, bias: true}\n" \
      "activation: {name: swiglu_oai, alpha: 1.702, limit: 0.9}\nweights: {bias: true}\n") \
    X(llama4, 80, 48, 8, 1, \
      "router: {method: llama4}\nactivation: swiglu\nshared_experts: {intermediate_size: " \
      "48}\n") \
    X(mixtral, 80, 112, 8, 2, \
      "router: {method: softmax_topk, norm_topk_prob: false}\nactivation: relu2\n") \
    X(fp8, 272, 144, 8, 2, \
      "router: {method: softmax_topk, norm_topk_prob: true}\n" \
      "shared_experts: {intermediate_size: 176}\nweights: {format: fp8_tensor, bias: true}\n") \
    X(fp8relu, 144, 272, 4, 1, \
      "router: {method: softmax_topk, norm_topk_prob: true}\nactivation: relu2\n" \
      "weights: {format: fp8_block, block: [128, 128]}\n") \
    X(many, 16, 16, 40, 8, \
      "router: {method: softmax_topk, norm_topk_prob: true}\nactivation: relu2\n")

#define X(name, ...) CASE_##name,
enum layer_case { CASES(X) NUM_CASES };
#undef X
static const struct {
    const char *name;
    int hidden, inter, experts, topk;
    const char *rest;
} cases[] = {
#define X(name, hidden, inter, experts, topk, rest) {#name, hidden, inter, experts, topk, rest},
    CASES(X)
#undef X
};
enum { MAX_TOKENS = 70, MANY_TOKENS = 1100, SEED = 11 }; /* so many: of CASE_many */
/* Tokens of each check: one tile of every shape that the buckets choose, with and without a
 * remainder. And the most that the case has. */
static const int token_counts[] = {3, 13, 70};

/* ---- one layer on the CPU ---- */

struct layer {
    struct arena arena;
    struct plan *plan;
    const struct moe_plan_class *c;
    struct buf source;
    struct kernels kernels;
    struct ref_random *random;
    struct ref_layer ref;
    struct moe_args args;
    char why[512];
};

static bool no(struct layer *l, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool no(struct layer *l, const char *fmt, ...) {
    va_list list;
    va_start(list, fmt);
    vsnprintf(l->why, sizeof l->why, fmt, list);
    va_end(list);
    return false;
}

/* The case's plan and its emitted source. */
static bool layer_plan(struct layer *l, enum layer_case which) {
    struct diags d = {.arena = &l->arena};
    char path[128], text[1024];
    snprintf(path, sizeof path, "build/mutants/%s.yaml", cases[which].name);
    int n = snprintf(text, sizeof text,
                     "model:\n  name: %s\n  num_hidden_layers: 1\n  moe_layers: all\n"
                     "  hidden_size: %d\n  moe_intermediate_size: %d\n  num_experts: %d\n"
                     "  num_experts_per_tok: %d\n",
                     cases[which].name, cases[which].hidden, cases[which].inter,
                     cases[which].experts, cases[which].topk);
    const char *line = cases[which].rest;
    while (*line) { /* the model is a map inside the deployment */
        int len = (int)strcspn(line, "\n") + 1;
        n += snprintf(text + n, sizeof text - (size_t)n, "  %.*s", len, line);
        line += len;
    }
    n += snprintf(text + n, sizeof text - (size_t)n,
                  "target: host\nmoe_config: {max_num_tokens: %d}\n",
                  which == CASE_many ? MANY_TOKENS : MAX_TOKENS);
    struct overrides o = {0};
    if (dir_make("build/mutants") || file_write(path, text, (size_t)n))
        return no(l, "%s: cannot write", path);
    struct deployment *dep = deployment_read(&l->arena, &d, path, &o);
    l->plan = dep ? plan_make(&l->arena, &d, dep, 1) : NULL;
    if (!l->plan) {
        diag_print(&d, stderr);
        return no(l, "%s: no plan", path);
    }
    l->c = l->plan->classes;
    l->source.arena = &l->arena;
    emit_source(l->plan, 0, NULL, &l->source);
    return true;
}

static void *filled(struct layer *l, size_t bytes, int byte) {
    return memset(arena_alloc(&l->arena, bytes), byte, bytes);
}

static unsigned short bf16(float v) { /* of a value that is not NaN */
    unsigned u;
    memcpy(&u, &v, 4);
    return (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float rounded(float v) {
    unsigned u = (unsigned)bf16(v) << 16;
    memcpy(&v, &u, 4);
    return v;
}

/* The e4m3 number nearest to v, the even one of two, found by trying all. */
static unsigned char e4m3(float v) {
    int best = 0;
    for (int b = 1; b < 255; b++) {
        double now = fabs((double)ref_of_e4m3((unsigned char)b) - (double)v);
        double then = fabs((double)ref_of_e4m3((unsigned char)best) - (double)v);
        if (now < then || (now == then && best % 2)) /* NaN is never nearer */
            best = b;
    }
    return (unsigned char)best;
}

/* The same of an fp8 weight and its scales. */
static void draw_fp8(void *weight, void *scales, int tensor, size_t n, size_t num_scales,
                     double scale) {
    unsigned long long seed = moe_tensor_seed(SEED, 0, tensor);
    for (size_t i = 0; i < n; i++)
        ((unsigned char *)weight)[i] = e4m3(moe_random_value(seed, i) * 128);
    for (size_t i = 0; i < num_scales; i++)
        ((float *)scales)[i] = moe_random_scale(moe_scale_seed(seed), i) * (float)scale;
}

/* Fills n elements with the tensor that the reference draws under the same number. */
static void draw(void *out, bool fp32, int tensor, size_t n, double scale) {
    unsigned long long seed = moe_tensor_seed(SEED, 0, tensor);
    for (size_t i = 0; i < n; i++) {
        float v = moe_random_value(seed, i) * (float)scale;
        if (fp32)
            ((float *)out)[i] = v;
        else
            ((unsigned short *)out)[i] = bf16(v);
    }
}

static size_t blocks(size_t n) {
    return (n + 127) / 128;
}

/* Both weights of a record; offset: of w1, w2, s1, s2. */
static void draw_weights(const struct moe_plan_class *c, char *record, const int64_t offset[4],
                         int first, int second, size_t inter) {
    const size_t h = (size_t)c->hidden, n = inter * h, scales = blocks(inter) * blocks(h);
    const size_t gated = c->activation == MOE_ACT_RELU2 ? 1 : 2;
    const double by_h = 1 / sqrt((double)h), by_i = 1 / sqrt((double)inter);
    if (c->record_format == MOE_FORMAT_BF16) {
        draw(record + offset[0], false, first, gated * n, by_h);
        draw(record + offset[1], false, second, n, by_i);
        return;
    }
    draw_fp8(record + offset[0], record + offset[2], first, gated * n, gated * scales, by_h);
    draw_fp8(record + offset[1], record + offset[3], second, n, scales, by_i);
}

/* Slot j lives in record S-1-j, so that a kernel which forgets the indirection is seen. */
static void layer_weights(struct layer *l) {
    const struct moe_plan_class *c = l->c;
    const size_t h = (size_t)c->hidden, inter = (size_t)c->inter, si = (size_t)c->shared_inter;
    const size_t gated = c->activation == MOE_ACT_RELU2 ? 1 : 2;
    const int64_t at[] = {c->w1_offset, c->w2_offset, c->s1_offset, c->s2_offset};
    const int64_t shared_at[] = {c->shared_w1_offset, c->shared_w2_offset, c->shared_s1_offset,
                                 c->shared_s2_offset};
    const int slots = c->slots_per_rank;
    char *pool = filled(l, (size_t)slots * (size_t)c->slot_bytes, 0xff);
    int *phys = arena_array(&l->arena, int, slots),
        *slot_of = arena_array(&l->arena, int, slots);
    for (int e = 0; e < slots; e++) {
        char *record = pool + (slots - 1 - e) * c->slot_bytes;
        int tensor = MOE_TENSOR_EXPERT + 4 * e;
        phys[e] = slots - 1 - e;
        slot_of[e] = e;
        draw_weights(c, record, at, tensor, tensor + 1, inter);
        if (c->has_bias) {
            draw(record + c->b1_offset, true, tensor + 2, gated * inter, 0.05);
            draw(record + c->b2_offset, true, tensor + 3, h, 0.05);
        }
    }
    if (si) {
        char *shared = filled(l, (size_t)c->shared_bytes, 0xff);
        draw_weights(c, shared, shared_at, MOE_TENSOR_SHARED_W1, MOE_TENSOR_SHARED_W2, si);
        l->args.shared = shared;
    }
    l->args.params = moe_params_of(c);
    l->args.pool = pool;
    l->args.phys_of_slot = phys;
    l->args.slot_of_expert = slot_of;
    l->args.router_weight = l->ref.router;
    l->args.router_bias = l->ref.router_bias;
    l->args.correction_bias = l->ref.correction_bias;
    l->args.shared_gate = l->ref.shared_gate;
    for (int i = 0; i < c->num_buffers; i++) {
        const struct moe_plan_buffer *b = &l->plan->buffers[c->first_buffer + i];
        l->args.ws[b->ws] = filled(l, (size_t)b->bytes, b->zero ? 0 : 0xff);
    }
}

static unsigned div_up(int n, int by) {
    return (unsigned)((n + by - 1) / by);
}

static bool layer_launch(struct layer *l, const struct moe_plan_launch *at) {
    const struct moe_plan_kernel *k = &l->plan->kernels[at->kernel];
    const int t = l->args.num_tokens;
    unsigned grid[3] = {1, (unsigned)at->p[1], (unsigned)at->p[2]};
    if (at->grid == MOE_GRID_TOKENS)
        grid[0] = div_up(t, at->p[0]);
    else if (at->grid == MOE_GRID_ENTRIES)
        grid[0] = div_up(t * l->c->topk, at->p[0]);
    else if (at->grid == MOE_GRID_FIXED)
        grid[0] = (unsigned)at->p[0];
    else
        grid[0] = at->p[1] && at->p[1] < 4 ? (unsigned)at->p[1] : 4, grid[1] = grid[2] = 1;
    return !l->kernels.launch(plan_string(l->plan, k->expression), grid, k->block, k->smem,
                              &l->args, 2, l->why, sizeof l->why);
}

/* The stages in this set, in the launch list's order. */
static bool layer_run(struct layer *l, unsigned stages) {
    const struct moe_plan_target *target = l->plan->targets;
    const struct moe_plan_bucket *b = &l->plan->buckets[target->first_bucket];
    while (b->max_tokens < l->args.num_tokens)
        b++;
    for (int i = 0; i < b->num_launches; i++) {
        const struct moe_plan_launch *at = &l->plan->launches[b->first_launch + i];
        if (!(stages >> at->stage & 1) ||
            (at->condition == MOE_COND_IF_X_FP32 && !(l->args.flags & MOE_X_FP32)))
            continue;
        if (!layer_launch(l, at))
            return false;
    }
    return true;
}

/* ---- the check ---- */

static bool same_routing(struct layer *l, const int *idx, const float *weight,
                         const char *what) {
    const struct moe_args *a = &l->args;
    const double scale = fmax(1, l->c->scale);
    for (int i = 0; i < a->num_tokens * l->c->topk; i++) {
        if (a->topk_idx[i] != idx[i])
            return no(l, "%s: entry %d goes to expert %d, not %d", what, i, a->topk_idx[i],
                      idx[i]);
        if (!(fabs((double)a->topk_weight[i] - (double)weight[i]) <= 1e-6 * scale))
            return no(l, "%s: entry %d weighs %.8f, not %.8f", what, i, a->topk_weight[i],
                      weight[i]);
    }
    return true;
}

/* Rows of slot 0 first, then slot 1, ..., each in ascending entry order; slot j holds expert j. */
static bool same_rows(struct layer *l) {
    const struct moe_args *a = &l->args;
    const int *offsets = a->ws[MOE_WS_OFFSETS], *row_entry = a->ws[MOE_WS_ROW_ENTRY],
              *row_of = a->ws[MOE_WS_ROW_OF];
    int row = 0;
    for (int slot = 0; slot < l->c->slots_per_rank; slot++) {
        if (offsets[slot] != row)
            return no(l, "slot %d begins at row %d, not %d", slot, offsets[slot], row);
        for (int i = 0; i < a->num_tokens * l->c->topk; i++) {
            if (a->topk_idx[i] != slot)
                continue;
            if (row_of[i] != row || row_entry[row] != i)
                return no(l, "entry %d is in row %d, not %d", i, row_of[i], row);
            row++;
        }
    }
    return true;
}

/* Logits in steps of 1/4 tie often. */
static bool check_ties(struct layer *l, int *idx, float *weight, double *logits) {
    const int n = l->args.num_tokens * l->c->experts;
    float *given = arena_array(&l->arena, float, n);
    for (int i = 0; i < n; i++) {
        given[i] = (float)(moe_hash((unsigned long long)i + 99) % 16) / 4 - 2;
        logits[i] = (double)given[i];
    }
    l->args.logits_in = given;
    bool ran = layer_run(l, 1u << MOE_STAGE_ROUTE_LOGITS);
    l->args.logits_in = NULL;
    ref_route(&l->ref, logits, l->args.num_tokens, idx, weight);
    return ran && same_routing(l, idx, weight, "given logits");
}

/* Runs the layer twice and compares both with the reference and with each other. */
static bool check_tokens(struct layer *l, int tokens) {
    const struct moe_plan_class *c = l->c;
    const size_t n = (size_t)tokens * (size_t)c->hidden, entries = (size_t)(tokens * c->topk);
    const bool fp32 = tokens % 2;
    float *x = arena_array(&l->arena, float, n), *first = arena_array(&l->arena, float, n);
    unsigned short *x16 = arena_array(&l->arena, unsigned short, n);
    double *logits = arena_array(&l->arena, double, tokens * c->experts);
    double *expected = arena_array(&l->arena, double, n);
    int *idx = arena_array(&l->arena, int, entries);
    float *weight = arena_array(&l->arena, float, entries);
    draw(x, true, MOE_TENSOR_X, n, 1);
    for (size_t i = 0; i < n; i++) {
        x[i] = rounded(x[i]);
        x16[i] = bf16(x[i]);
    }
    struct moe_args *a = &l->args;
    a->num_tokens = tokens;
    a->x = fp32 ? (void *)x : (void *)x16;
    a->x16 = fp32 ? a->ws[MOE_WS_X16] : x16;
    a->flags = (fp32 ? MOE_X_FP32 : 0) | MOE_OUT_FP32 | MOE_ROUTER_FP32;
    a->topk_idx = arena_array(&l->arena, int, entries);
    a->topk_weight = arena_array(&l->arena, float, entries);
    a->out = arena_array(&l->arena, float, n);
    if (!check_ties(l, idx, weight, logits))
        return false;
    ref_logits(&l->ref, x, tokens, logits);
    ref_route(&l->ref, logits, tokens, idx, weight);
    ref_experts(&l->ref, x, tokens, idx, weight, expected);
    const unsigned forward = 1u << MOE_STAGE_ROUTE | 1u << MOE_STAGE_PREPARE |
                             1u << MOE_STAGE_EXPERTS | 1u << MOE_STAGE_COMBINE;
    for (int run = 0; run < 2; run++) {
        memset(a->topk_idx, 0xff, entries * sizeof(int));
        memset(a->topk_weight, 0xff, entries * sizeof(float));
        memset(a->out, 0xff, n * sizeof(float));
        if (!layer_run(l, forward) || !same_routing(l, idx, weight, "own logits") ||
            !same_rows(l))
            return false;
        double error = ref_rel_l2(a->out, expected, (long long)n);
        if (!(error <= 4e-3))
            return no(l, "%d tokens: relative L2 %.2e", tokens, error);
        if (run && memcmp(first, a->out, n * sizeof *first) != 0)
            return no(l, "%d tokens: a second run differs", tokens);
        memcpy(first, a->out, n * sizeof *first);
    }
    return true;
}

static bool check_layer(struct layer *l) {
    l->random = ref_random_layer(l->c, SEED, 0, &l->ref);
    layer_weights(l);
    for (size_t i = 0; i < sizeof token_counts / sizeof *token_counts; i++)
        if (!check_tokens(l, token_counts[i]))
            return false;
    return l->c->max_tokens == MAX_TOKENS || check_tokens(l, l->c->max_tokens);
}

/* ---- the faults ---- */

struct mutant {
    enum layer_case on;
    const char *what;
    const char *file;           /* of templates/ */
    const char *text, *instead; /* text occurs once in the file */
};
static const struct mutant mutants[] = {
    {CASE_deepseek, "the pipeline's barrier dropped", "gemm.cuh",
     "cp_async_wait<STAGES - 2>();\n        __syncthreads();", "cp_async_wait<STAGES - 2>();"},
    {CASE_deepseek, "the wait for the copies one group short", "gemm.cuh",
     "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"},
    {CASE_deepseek, "the wait for the copies dropped", "gemm.cuh",
     "cp_async_wait<STAGES - 2>();", ""},
    {CASE_deepseek, "gate and up swapped", "gemm.cuh", "params, c[0], c[2])",
     "params, c[2], c[0])"},
    {CASE_deepseek, "the second token's up taken from the first", "gemm.cuh",
     "params, c[1], c[3])", "params, c[1], c[2])"},
    {CASE_deepseek, "wrong stride of weight rows", "gemm.cuh",
     "static_cast<long long>(load_m) * p.row_chunks() + tid % 8",
     "static_cast<long long>(load_m) * (p.row_chunks() - 1) + tid % 8"},
    {CASE_deepseek, "wrong stride of a stage", "gemm.cuh",
     "smem_base() + load_stage * STAGE_BYTES",
     "smem_base() + load_stage * (STAGE_BYTES - 128)"},
    {CASE_deepseek, "a stage too many", "gemm.cuh", "load_stage = load_stage + 1 == STAGES ? 0",
     "load_stage = load_stage == STAGES ? 0"},
    {CASE_deepseek, "the reader's stage wraps early", "gemm.cuh",
     "            stage = stage + 1 == STAGES ?", "            stage = stage + 2 == STAGES ?"},
    {CASE_deepseek, "the K tail is not masked", "gemm.cuh",
     "p.row_chunks() % 8 == 0 || load_step", "true || load_step"},
    {CASE_deepseek, "rows beyond the tile are stored", "gemm.cuh",
     "if (token < rows_left && at < columns)", "if (at < columns)"},
    {CASE_deepseek, "columns beyond the width are stored", "gemm.cuh",
     "if (token < rows_left && at < columns)", "if (token < rows_left)"},
    {CASE_deepseek, "two columns swapped on the way out", "gemm.cuh", "odd ? v0 : v1, 4)",
     "odd ? v1 : v0, 4)"},
    {CASE_deepseek, "tokens' chunks are read unpermuted", "gemm.cuh",
     "((2 * kk + b_k) ^ (b_row & 7)) * 16", "(2 * kk + b_k) * 16"},
    {CASE_deepseek, "fragments overwritten while in use", "gemm.cuh",
     "read(stage, (kk + 1) % 4, (kk + 1) % 2)", "read(stage, (kk + 1) % 4, kk % 2)"},
    {CASE_deepseek, "a slot's record taken by its number", "gemm.cuh", "a.phys_of_slot[slot]",
     "slot"},
    {CASE_mixtral, "the entry taken for its token", "gemm.cuh", "ROW_ENTRY])[row] / kTopK;",
     "ROW_ENTRY])[row] % kTopK;"},
    {CASE_deepseek, "every tile of a slot is its first", "gemm.cuh",
     "list[any.first + local % any.count]", "list[any.first]"},
    {CASE_deepseek, "the last work item left out", "gemm.cuh", "at < items; at += gridDim.x",
     "at + 1 < items; at += gridDim.x"},
    {CASE_deepseek, "a result row's stride is the wrong width", "gemm.cuh",
     "const long long stride = p.columns();", "const long long stride = kHidden;"},
    {CASE_llama4, "a stale scale", "gemm.cuh",
     "scale1 = token + 1 < left ? p.row_scale(row + token + 1) : 0.0f;", "scale1 = scale0;"},
    {CASE_llama4, "the weight multiplies both sides", "combine.cuh",
     "kInputWeight || a.flags & MOE_SUMMED ? 1.0f : weight[j]", "weight[j]"},
    {CASE_gptoss, "half of the bias dropped", "gemm.cuh", "c[2] += high, c[3] += high;", ""},
    {CASE_gptoss, "the up rows get the gate rows' bias", "gemm.cuh", "bias[m + 8 + lane / 4]",
     "bias[m + lane / 4]"},
    {CASE_gptoss, "the gate is not clamped", "gemm.cuh", "fminf(gate, p.act_limit)", "gate"},
    {CASE_gptoss, "swiglu_oai's 1 left out", "gemm.cuh", "(u + 1.0f)", "u"},
    {CASE_mixtral, "relu2 without its square", "gemm.cuh", "c[v] = r * r;", "c[v] = r;"},
    {CASE_gptoss, "a tie goes to the highest id", "router.cuh",
     "other == best && other_index < index", "other == best && other_index > index"},
    {CASE_gptoss, "a tie inside a lane goes to the highest id", "router.cuh",
     "if (free && u > best)", "if (free && u >= best)"},
    {CASE_mixtral, "experts that do not exist are chosen", "router.cuh",
     "bool free = lane + 32 * i < count && ", "bool free = "},
    {CASE_gptoss, "the router's bias dropped", "router.cuh",
     "logit[i] += a.router_bias[lane + 32 * i];", ""},
    {CASE_deepseek, "the last block does not reset its counter", "router.cuh", "*arrived = 0;",
     "(void)0;"},
    {CASE_deepseek, "the block before the last routes", "router.cuh",
     "gridDim.y * gridDim.z) - 1;", "gridDim.y * gridDim.z) - 2;"},
    {CASE_deepseek, "a K split left out", "router.cuh", "for (int s = 0; s < S::kSplit; s++)",
     "for (int s = 1; s < S::kSplit; s++)"},
    {CASE_deepseek, "the router's barrier dropped", "router.cuh",
     "store(buffer);\n        __syncthreads();", "store(buffer);"},
    {CASE_deepseek, "one buffer where two are needed", "router.cuh",
     "const int buffer = slice & 1;", "const int buffer = 0;"},
    {CASE_deepseek, "the correction bias enters the weight", "router.cuh",
     "choice[i] += a.correction_bias[lane + 32 * i];",
     "logit[i] = choice[i] += a.correction_bias[lane + 32 * i];"},
    {CASE_deepseek, "the correction bias dropped", "router.cuh",
     "choice[i] += a.correction_bias[lane + 32 * i];", ";"},
    {CASE_deepseek, "weights are not divided by their sum", "router.cuh",
     "w /= warp_sum(mine ? w : 0.0f) + 1e-20f;", ";"},
    {CASE_deepseek, "groups are not masked", "router.cuh", "if (!(keep >> i & 1))",
     "if (false)"},
    {CASE_deepseek, "a group's score is its best alone", "router.cuh",
     "group[i] = p.group_best ? first : first + second;", "group[i] = first;"},
    {CASE_deepseek, "weights in the wrong order", "router.cuh",
     "__shfl_sync(kFullMask, mine, j)", "__shfl_sync(kFullMask, mine, kTopK - 1 - j)"},
    {CASE_gptoss, "a dropped barrier after the scan", "slots.cuh",
     "scan_slots<BN>(slots, rows, tiles);\n    __syncthreads();",
     "scan_slots<BN>(slots, rows, tiles);"},
    {CASE_deepseek, "a warp before it left out", "slots.cuh", "left = warps - 16 * i - 4 * j",
     "left = warps - 1 - 16 * i - 4 * j"},
    {CASE_many, "the last sixteen warps left out", "slots.cuh",
     "by_warp[slot * (WARPS / 16) + i]", "by_warp[slot * (WARPS / 16)]"},
    {CASE_deepseek, "warps' counts are not zeroed", "slots.cuh",
     "by_warp[i] = make_uint4(0, 0, 0, 0);", ";"},
    {CASE_deepseek, "rows off by one", "slots.cuh", "place[slot] + before;",
     "place[slot] + before + 1;"},
    {CASE_many, "a block's own part among those before it", "slots.cuh",
     "part + j < own ? n[j] : 0", "part + j <= own ? n[j] : 0"},
    {CASE_many, "a row of counts left out", "slots.cuh", "part + j < parts ? rows",
     "part + j + 1 < parts ? rows"},
    {CASE_many, "rows of counts after the first few left out", "slots.cuh",
     "item < items; item += blockDim.x / 32", "item < groups; item += blockDim.x / 32"},
    {CASE_many, "slots after the first 32 left out", "slots.cuh",
     "const int s = item % groups * 32 + threadIdx.x % 32", "const int s = threadIdx.x % 32"},
    {CASE_many, "some entries of a part are not counted", "slots.cuh",
     "count_entries<MOE_SLOTS_PART / 256>(\n        a, begin,",
     "count_entries<MOE_SLOTS_PART / 256>(\n        a, begin + 1,"},
    {CASE_many, "a dropped barrier before counts are written", "slots.cuh",
     "counts, counts);\n    __syncthreads();", "counts, counts);"},
    {CASE_deepseek, "counters are not zeroed", "slots.cuh", "rows[s] = place[s] = 0;",
     "rows[s] = 0;"},
    {CASE_deepseek, "a tile runs into the next slot", "slots.cuh",
     "min(BN, rows[low + 1] - t.row)", "BN"},
    {CASE_deepseek, "the last tile of a slot left out", "slots.cuh", "m = (n + BN - 1) / BN",
     "m = n / BN"},
    {CASE_deepseek, "lanes of one slot in one row", "slots.cuh",
     "__popc(same & ((1u << lane) - 1))", "__popc(same) - 1"},
    {CASE_deepseek, "weights and rows of combine in opposite orders", "combine.cuh",
     "int row = row_of[j]", "int row = row_of[kTopK - 1 - j]"},
    {CASE_deepseek, "one weight for all experts", "combine.cuh",
     "MOE_SUMMED ? 1.0f : weight[j]", "MOE_SUMMED ? 1.0f : weight[0]"},
    {CASE_deepseek, "the shared expert's gate dropped", "combine.cuh", "kHidden + c, gate)",
     "kHidden + c, 1.0f)"},
    {CASE_deepseek, "the shared expert dropped", "combine.cuh", "if (kSharedInter)",
     "if (false)"},
    {CASE_deepseek, "two elements swapped", "combine.cuh", "bf16_lo(u.z), v[4]",
     "bf16_hi(u.z), v[4]"},
    {CASE_fp8, "an fp8 scale of gate and up the same", "gemm.cuh",
     "weight_scale[0] + (pairs ? k_steps : 0)", "weight_scale[0]"},
    {CASE_fp8, "fp8 scales of the next rows' block", "gemm.cuh",
     "p.columns() - 1) / MOE_SCALE_BLOCK", "p.columns() - 1) / (MOE_SCALE_BLOCK / 2)"},
    {CASE_fp8, "every row in the first block's fp8 scales", "gemm.cuh",
     "(pairs ? 2 * block : block) * k_steps", "0"},
    {CASE_fp8relu, "relu2's fp8 scales taken for pairs", "gemm.cuh",
     "(pairs ? 2 * block : block) * k_steps", "2 * block * k_steps"},
    {CASE_fp8, "an fp8 block's scale of the step before", "gemm.cuh", "weight_scale[0][step]",
     "weight_scale[0][step ? step - 1 : 0]"},
    {CASE_fp8, "a token's fp8 scale is its neighbour's", "gemm.cuh",
     "const int r = n + 8 * j + v;", "const int r = n + 8 * j;"},
    {CASE_fp8, "an fp8 token's scale of another block", "gemm.cuh", "token_scale[j][v] + step]",
     "token_scale[j][v]]"},
    {CASE_fp8, "fp8 sums enter the total unscaled", "gemm.cuh",
     "weight_by[v / 2] * token_by[j][v % 2]", "weight_by[v / 2]"},
    {CASE_fp8, "fp8 scales of the wrong accumulators", "gemm.cuh",
     "weight_by[v / 2] * token_by[j][v % 2]", "weight_by[v % 2] * token_by[j][v / 2]"},
    {CASE_fp8, "fp8 sums run on over the blocks", "gemm.cuh",
     "                float part[MI][NI][4] = {};\n",
     "                static thread_local float "
     "part[MI][NI][4];\n"},
    {CASE_fp8, "x is quantised over two blocks", "quant.cuh",
     "lane * 4;\n        const long long at", "lane * 4 % 64;\n        const long long at"},
    {CASE_fp8, "a row's ragged end is read", "quant.cuh",
     "load4(from, at, fp32, col < width, v)", "load4(from, at, fp32, true, v)"},
    {CASE_fp8, "the largest number of half a block", "quant.cuh",
     "__shfl_xor_sync(0xffffffffu, top, d)", "__shfl_xor_sync(0xffffffffu, top, d & 15)"},
    {CASE_fp8, "negative numbers are not large", "quant.cuh",
     "__float_as_uint(v) & 0x7fffffffu", "__float_as_uint(v > 0.0f ? v : 0.0f)"},
    {CASE_fp8, "numbers beyond e4m3's largest", "quant.cuh",
     "__uint_as_float(top) / MOE_E4M3_MAX", "__uint_as_float(top) / 512.0f"},
    {CASE_fp8, "e4m3 rounded down", "prim.cuh", "(a + 0x7ffffu + (a >> 20 & 1)) >> 20",
     "a >> 20"},
    {CASE_fp8, "hidden activations in bf16", "gemm.cuh",
     "const bool wide = !Second && p.fp8();", "const bool wide = false;"},
    {CASE_deepseek, "fp32 activations converted with the wrong stride", "combine.cuh",
     "load8(a.x, i * 8, true, true, v)", "load8(a.x, i * 4, true, true, v)"},
};
enum { NUM_MUTANTS = sizeof mutants / sizeof *mutants };

/* Where `text` is in a source, or NULL unless it is there exactly once. */
static char *only(char *source, const char *text) {
    char *at = strstr(source, text);
    return at && !strstr(at + 1, text) ? at : NULL;
}

enum verdict { GREEN, RED, BROKEN };

/* A sanitizer that the tests run under reports a mutant's faults apart from the tests' own. */
void __sanitizer_set_report_path(const char *path) __attribute__((weak));

/* In a process of its own: m's layer with m's fault, or without one when m has no text. */
static enum verdict judge(const struct mutant *m, int number) {
    static struct layer l;
    char path[128];
    enum verdict v = BROKEN;
    if (layer_plan(&l, m->on)) {
        char *text = l.source.data, *at = m->text ? only(text, m->text) : text;
        snprintf(path, sizeof path, "build/mutants/%d.cu", number);
        FILE *f = at ? fopen(path, "w") : NULL;
        if (m->text && __sanitizer_set_report_path)
            __sanitizer_set_report_path("build/mutants/report");
        if (!at)
            no(&l, "its text is not in the emitted source exactly once");
        if (f) {
            fprintf(f, "%.*s%s%s", (int)(at - text), text, m->text ? m->instead : "",
                    at + (m->text ? strlen(m->text) : 0));
            fclose(f);
            if (!kernels_open(&l.kernels, path, "-O1"))
                no(&l, "%s", l.kernels.why);
            else
                v = check_layer(&l) ? GREEN : RED;
        }
    }
    printf("%s: %s%s%s\n", m->what,
           v == GREEN ? "green"
           : v == RED ? "red"
                      : "broken",
           *l.why ? ": " : "", l.why);
    fflush(stdout);
    return v;
}

/* Two at a time; a crash and five minutes without an end are red, too. */
static void judge_all(const struct mutant *list, int n, enum verdict *verdicts) {
    pid_t pids[2] = {0};
    int at[2] = {0};
    fflush(NULL);
    for (int next = 0, running = 0; next < n || running;) {
        if (next < n && running < 2) {
            int place = pids[0] ? 1 : 0;
            at[place] = next++;
            pids[place] = fork();
            cr_assert_geq(pids[place], 0);
            if (!pids[place]) {
                for (int s = 1; s < 32; s++)
                    signal(s, SIG_DFL);
                alarm(300);
                _exit((int)judge(&list[at[place]], at[place] + (list == mutants ? 0 : 900)));
            }
            running++;
            continue;
        }
        int status;
        pid_t done = wait(&status);
        int place = done == pids[1] ? 1 : 0;
        verdicts[at[place]] = WIFSIGNALED(status)       ? RED
                              : WEXITSTATUS(status) > 2 ? RED /* a sanitizer's report */
                                                        : (enum verdict)WEXITSTATUS(status);
        pids[place] = 0;
        running--;
    }
}

TestSuite(mutants, .timeout = 1800);

Test(mutants, the_source_itself_is_green) {
    struct mutant list[NUM_CASES];
    enum verdict verdicts[NUM_CASES];
    for (int i = 0; i < NUM_CASES; i++)
        list[i] = (struct mutant){.on = (enum layer_case)i, .what = cases[i].name};
    judge_all(list, NUM_CASES, verdicts);
    for (int i = 0; i < NUM_CASES; i++)
        cr_expect_eq(verdicts[i], GREEN, "%s is not green", cases[i].name);
}

Test(mutants, every_fault_is_red) {
    static enum verdict verdicts[NUM_MUTANTS];
    judge_all(mutants, NUM_MUTANTS, verdicts);
    for (int i = 0; i < NUM_MUTANTS; i++)
        cr_expect_eq(verdicts[i], RED, "%s: %s", mutants[i].what,
                     verdicts[i] == GREEN ? "nothing noticed it" : "was not tried");
}

Test(mutants, each_text_is_in_its_file_once) {
    cr_assert_geq(NUM_MUTANTS, 20);
    for (int i = 0; i < NUM_MUTANTS; i++) {
        struct arena a = {0};
        char *text;
        size_t len;
        char *path = arena_printf(&a, "templates/%s", mutants[i].file);
        cr_assert_eq(file_read(&a, path, 1 << 20, &text, &len), 0, "%s", path);
        cr_expect(only(text, mutants[i].text), "%s: not once in %s", mutants[i].what, path);
        arena_free(&a);
    }
}
