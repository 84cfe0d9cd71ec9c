/* Which tensors of a checkpoint are a layer, family by family.
 *
 * A layer's tensors share a base, PREFIX "layers." N "." BLOCK ".". The router says which base it
 * is; the tables below then say what may stand behind it. A tensor behind the base that nothing
 * used is an error: a layer is loaded whole or not at all. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* backbone: Nemotron-H */
static const char *const prefixes[] = {
    "model.",          "",         "language_model.model.", "model.language_model.",
    "language_model.", "backbone."};

/* block_sparse_moe: Mixtral, MiniMax-M2, Granite, PhiMoE; feed_forward: Llama-4, Jamba; mixer:
 * Nemotron-H; mlp: all others */
static const char *const blocks[] = {"mlp.", "block_sparse_moe.", "feed_forward.", "mixer."};

/* X(weight, bias): most families; gpt-oss, Llama-4, PhiMoE; HunYuan; Granite */
#define ROUTERS(X) \
    X("gate.weight", "gate.bias") \
    X("router.weight", "router.bias") \
    X("gate.wg.weight", "gate.wg.bias") \
    X("router.layer.weight", "router.layer.bias")

/* DeepSeek, Kimi, GLM; MiniMax-M2; ERNIE as released and as transformers holds it */
static const char *const corrections[] = {
    "gate.e_score_correction_bias", "e_score_correction_bias",
    "moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"};

/* Experts one by one. X(gate, up, down), the second: Mixtral, MiniMax-M2, PhiMoE */
#define SPLIT_EXPERTS(X) \
    X("experts.%d.gate_proj", "experts.%d.up_proj", "experts.%d.down_proj") \
    X("experts.%d.w1", "experts.%d.w3", "experts.%d.w2")

/* Experts in one tensor. X(up, down, whether up holds the gates too)
 * As transformers 5 holds them [E][2I][H], gate rows first, and [E][H][I]; Llama-4 and Qwen3-VL
 * the same transposed; gpt-oss transposed, gate and up in turns, told by its biases. Then
 * Granite. Then Nemotron-H, [E][I][H]. */
#define FUSED_EXPERTS(X) \
    X("experts.gate_up_proj", "experts.down_proj", true) \
    X("input_linear.weight", "output_linear.weight", true) \
    X("experts.up_proj", "experts.down_proj", false)

/* DeepSeek, Kimi, GLM, ERNIE; Qwen, Llama-4; HunYuan */
static const char *const shared_experts[] = {"shared_experts.", "shared_expert.",
                                             "shared_mlp."};

/* Present in fp8 checkpoints for kernels with one fixed scale for all activations: here those are
 * bf16, or quantised with scales of their own (moec-plan(5)). */
static const char *const ignored[] = {".input_scale", ".input_scale_inv"};

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
enum { NAME_BYTES = 512 };

struct loader {
    const struct moe_plan_class *c;
    int layer;
    struct rt_checkpoint *ck;
    char layer_base[128]; /* "model.layers.3." */
    char base[160];       /* "model.layers.3.mlp." */
    const char *router_bias;
    bool *used; /* by index of the checkpoint's names */
    struct rt_source *out;
};

/* ---- single tensors ---- */

/* Index of base + name, or -1. */
static int find(const struct loader *l, const char *base, const char *name) {
    char full[NAME_BYTES];
    int n = snprintf(full, sizeof full, "%s%s", base, name);
    return n < (int)sizeof full ? rt_checkpoint_index(l->ck, full) : -1;
}

static bool exists(const struct loader *l, const char *name) {
    return find(l, l->base, name) >= 0;
}

static moert_result get_at(struct loader *l, const char *base, const char *name,
                           struct rt_tensor *t) {
    int i = find(l, base, name);
    if (i < 0)
        return rt_fail(MOERT_NOT_FOUND, "layer %d: the checkpoint has no tensor %s%s", l->layer,
                       base, name);
    l->used[i] = true;
    return rt_checkpoint_get(l->ck, i, t);
}

static void print_shape(char out[128], int rank, const int64_t *shape) {
    int n = snprintf(out, 128, "[");
    for (int i = 0; i < rank; i++)
        n += snprintf(out + n, 128 - (size_t)n, "%s%lld", i ? ", " : "",
                      (long long)(shape[i] % 10000000000));
    snprintf(out + n, 128 - (size_t)n, "]");
}

static moert_result wrong_shape(const struct loader *l, const struct rt_tensor *t, int rank,
                                const int64_t *want) {
    char is[128], should[128];
    print_shape(is, t->rank, t->shape);
    print_shape(should, rank, want);
    return rt_fail(MOERT_INVALID, "layer %d: tensor %s has shape %s, the plan wants %s",
                   l->layer, t->name, is, should);
}

static bool shape_is(const struct rt_tensor *t, int rank, const int64_t *want) {
    return t->rank == rank && !memcmp(t->shape, want, (size_t)rank * sizeof *want);
}

static moert_result wrong_dtype(const struct loader *l, const struct rt_tensor *t,
                                const char *want) {
    return rt_fail(MOERT_UNSUPPORTED, "layer %d: tensor %s has type %s; supported here: %s",
                   l->layer, t->name, t->dtype_name, want);
}

static bool is_plain(enum rt_dtype d) {
    return d == RT_BF16 || d == RT_F16 || d == RT_F32;
}

/* n numbers, behind any leading dimensions of 1. */
static moert_result get_vector(struct loader *l, const char *name, int64_t n,
                               struct rt_matrix *out) {
    struct rt_tensor t;
    RT_TRY(get_at(l, l->base, name, &t));
    bool fits = t.rank >= 1 && t.shape[t.rank - 1] == n;
    for (int i = 0; i + 1 < t.rank; i++)
        fits = fits && t.shape[i] == 1;
    if (!fits)
        return wrong_shape(l, &t, 1, &n);
    if (!is_plain(t.dtype))
        return wrong_dtype(l, &t, "BF16, F16, F32");
    *out = (struct rt_matrix){.data = t.data,
                              .dtype = t.dtype,
                              .rows = 1,
                              .cols = n,
                              .row_stride = n,
                              .col_stride = 1};
    return MOERT_OK;
}

/* ---- fp8: scales beside a weight ---- */

/* Block length that cuts n into so many blocks: 128 where it does, as released, another power of
 * two, or all; 0: none. */
static int64_t block_length(int64_t n, int64_t blocks) {
    if ((n + 127) / 128 == blocks)
        return 128;
    for (int64_t b = 1; b < n; b *= 2)
        if ((n + b - 1) / b == blocks)
            return b;
    return blocks == 1 ? n : 0;
}

/* The scale's last two dimensions are blocks of the weight's rows and columns; fewer dimensions,
 * or ones of 1, mean one block. A leading dimension counts experts, as the weight's does. */
static moert_result attach_scale(struct loader *l, const struct rt_tensor *w,
                                 struct rt_matrix *m) {
    char name[NAME_BYTES];
    struct rt_tensor s;
    snprintf(name, sizeof name, "%s_scale_inv", w->name);
    if (find(l, "", name) < 0)
        snprintf(name, sizeof name, "%s_scale", w->name);
    RT_TRY(get_at(l, "", name, &s));
    if (s.dtype != RT_F32 && s.dtype != RT_BF16 && s.dtype != RT_F16 && s.dtype != RT_F8_E8M0)
        return wrong_dtype(l, &s, "F32, BF16, F16, F8_E8M0");
    int64_t row_blocks = s.rank >= 2 ? s.shape[s.rank - 2] : 1;
    int64_t col_blocks = s.rank >= 1 ? s.shape[s.rank - 1] : 1;
    if (s.rank == 1 && s.shape[0] > 1) {
        row_blocks = s.shape[0]; /* one per row */
        col_blocks = 1;
    }
    m->scale = s.data;
    m->scale_dtype = s.dtype;
    m->block_rows = block_length(m->rows, row_blocks);
    m->block_cols = block_length(m->cols, col_blocks);
    m->scale_stride = col_blocks;
    if (s.rank > 2 || !m->block_rows || !m->block_cols)
        return rt_fail(MOERT_INVALID,
                       "layer %d: scales %s do not divide the weight into blocks", l->layer,
                       s.name);
    return MOERT_OK;
}

/* A weight [rows][cols] of one expert, with its scales when it is fp8. */
static moert_result get_matrix(struct loader *l, const char *base, const char *name,
                               int64_t rows, int64_t cols, struct rt_matrix *out) {
    struct rt_tensor t;
    int64_t want[] = {rows, cols};
    RT_TRY(get_at(l, base, name, &t));
    if (!shape_is(&t, 2, want))
        return wrong_shape(l, &t, 2, want);
    *out = (struct rt_matrix){.data = t.data,
                              .dtype = t.dtype,
                              .rows = rows,
                              .cols = cols,
                              .row_stride = cols,
                              .col_stride = 1};
    if (t.dtype == RT_F8_E4M3)
        return attach_scale(l, &t, out);
    return is_plain(t.dtype) ? MOERT_OK : wrong_dtype(l, &t, "BF16, F16, F32, F8_E4M3");
}

/* ---- experts one by one ---- */

struct names3 {
    const char *gate, *up, *down;
};

static moert_result get_part(struct loader *l, const char *format, int e, int64_t rows,
                             int64_t cols, struct rt_matrix *w, struct rt_matrix *bias) {
    char stem[128], name[160];
    snprintf(stem, sizeof stem, format, e);
    snprintf(name, sizeof name, "%s.weight", stem);
    RT_TRY(get_matrix(l, l->base, name, rows, cols, w));
    if (!l->c->has_bias)
        return MOERT_OK;
    snprintf(name, sizeof name, "%s.bias", stem);
    return get_vector(l, name, rows, bias);
}

static moert_result load_split(struct loader *l, const struct names3 *n) {
    int64_t h = l->c->hidden, i = l->c->inter;
    for (int e = 0; e < l->c->experts; e++) {
        struct rt_expert *x = &l->out->experts[e];
        if (rt_gated(l->c))
            RT_TRY(get_part(l, n->gate, e, i, h, &x->gate, &x->gate_bias));
        RT_TRY(get_part(l, n->up, e, i, h, &x->up, &x->up_bias));
        RT_TRY(get_part(l, n->down, e, h, i, &x->down, &x->down_bias));
    }
    return MOERT_OK;
}

/* ---- experts in one tensor ---- */

/* Expert e's matrix of a [E][rows][cols] tensor (transposed: [E][cols][rows]). */
static struct rt_matrix slice(const struct rt_tensor *t, int e, int64_t rows, int64_t cols,
                              bool transposed) {
    return (struct rt_matrix){
        .data = t->data + e * rows * cols * rt_dtype_bytes(t->dtype),
        .dtype = t->dtype,
        .rows = rows,
        .cols = cols,
        .row_stride = transposed ? 1 : cols,
        .col_stride = transposed ? rows : 1,
    };
}

/* Every step-th row from the first-th: half of a gate-and-up matrix. */
static struct rt_matrix half(struct rt_matrix m, bool up, bool interleaved) {
    int64_t rows = m.rows / 2, first = up ? (interleaved ? 1 : rows) : 0;
    int bytes = m.dtype == RT_U8 ? 1 : rt_dtype_bytes(m.dtype);
    int64_t units = m.dtype == RT_U8 ? m.row_stride / 2 : m.row_stride; /* two fp4 in a byte */
    m.data += first * units * bytes;
    m.rows = rows;
    m.row_stride *= interleaved ? 2 : 1;
    if (m.scale) {
        m.scale += first / m.block_rows * m.scale_stride * rt_dtype_bytes(m.scale_dtype);
        m.scale_stride *= interleaved ? 2 : 1;
    }
    return m;
}

/* The whole tensor's scales are an fp8 family of their own: [E][row blocks][column blocks], or
 * one number per expert. */
static moert_result fused_scale(struct loader *l, const struct rt_tensor *w, bool plain_rows,
                                struct rt_tensor *s) {
    char name[NAME_BYTES];
    s->data = NULL;
    if (w->dtype != RT_F8_E4M3)
        return is_plain(w->dtype) ? MOERT_OK : wrong_dtype(l, w, "BF16, F16, F32, F8_E4M3");
    snprintf(name, sizeof name, "%s_scale_inv", w->name);
    if (find(l, "", name) < 0)
        snprintf(name, sizeof name, "%s_scale", w->name);
    RT_TRY(get_at(l, "", name, s));
    if (s->dtype != RT_F32 && s->dtype != RT_BF16)
        return wrong_dtype(l, s, "F32, BF16");
    if (!plain_rows || s->rank != 3 || s->shape[0] != l->c->experts)
        return rt_fail(MOERT_UNSUPPORTED,
                       "layer %d: scales %s are not [experts][row blocks][column blocks]",
                       l->layer, s->name);
    return MOERT_OK;
}

static moert_result slice_scaled(struct loader *l, const struct rt_tensor *w,
                                 const struct rt_tensor *s, int e, int64_t rows, int64_t cols,
                                 bool transposed, bool pair, struct rt_matrix *out) {
    *out = slice(w, e, rows, cols, transposed);
    if (!s->data)
        return MOERT_OK;
    out->scale = s->data + e * s->shape[1] * s->shape[2] * rt_dtype_bytes(s->dtype);
    out->scale_dtype = s->dtype;
    out->scale_stride = s->shape[2];
    out->block_rows = block_length(rows, s->shape[1]);
    out->block_cols = block_length(cols, s->shape[2]);
    /* No block may hold rows of gate and of up, unless it holds all. */
    bool apart = !pair || out->block_rows == rows ||
                 (out->block_rows && rows / 2 % out->block_rows == 0);
    if (!out->block_rows || !out->block_cols || !apart)
        return rt_fail(MOERT_INVALID,
                       "layer %d: scales %s do not divide the weight into blocks", l->layer,
                       s->name);
    return MOERT_OK;
}

static moert_result get_fused(struct loader *l, const char *name, const int64_t plain[3],
                              bool transposed, bool interleaved, struct rt_tensor *t,
                              struct rt_tensor *scale) {
    int64_t want[] = {plain[0], plain[transposed ? 2 : 1], plain[transposed ? 1 : 2]};
    RT_TRY(get_at(l, l->base, name, t));
    if (!shape_is(t, 3, want))
        return wrong_shape(l, t, 3, want);
    return fused_scale(l, t, !transposed && !interleaved, scale);
}

/* [E][n] biases, as each expert's vector. */
static moert_result get_biases(struct loader *l, const char *name, int64_t n,
                               struct rt_tensor *t) {
    int64_t want[] = {l->c->experts, n};
    RT_TRY(get_at(l, l->base, name, t));
    if (!shape_is(t, 2, want))
        return wrong_shape(l, t, 2, want);
    return is_plain(t->dtype) ? MOERT_OK : wrong_dtype(l, t, "BF16, F16, F32");
}

/* gpt-oss's biases: gate and up in turns. */
static moert_result load_fused_biases(struct loader *l) {
    struct rt_tensor up, down;
    int64_t h = l->c->hidden, i = l->c->inter;
    if (!l->c->has_bias)
        return MOERT_OK;
    RT_TRY(get_biases(l, "experts.gate_up_proj_bias", 2 * i, &up));
    RT_TRY(get_biases(l, "experts.down_proj_bias", h, &down));
    for (int e = 0; e < l->c->experts; e++) {
        struct rt_expert *x = &l->out->experts[e];
        x->gate_bias = slice(&up, e, 1, 2 * i, false);
        x->gate_bias.cols = i;
        x->gate_bias.col_stride = 2;
        x->up_bias = x->gate_bias;
        x->up_bias.data += rt_dtype_bytes(up.dtype);
        x->down_bias = slice(&down, e, 1, h, false);
    }
    return MOERT_OK;
}

/* Whether both tensors are stored with their last two dimensions swapped. The down projection
 * tells, or, when it is square, the other. */
static bool is_transposed(struct loader *l, const char *up, const char *down) {
    struct rt_tensor t;
    int64_t h = l->c->hidden, i = l->c->inter;
    bool square = h == i;
    const int64_t swapped_up[] = {l->c->experts, h, 2 * i},
                  swapped_down[] = {l->c->experts, i, h};
    int at = find(l, l->base, square ? up : down);
    return at >= 0 && rt_checkpoint_get(l->ck, at, &t) == MOERT_OK &&
           shape_is(&t, 3, square ? swapped_up : swapped_down);
}

static moert_result load_fused(struct loader *l, const char *up_name, const char *down_name) {
    struct rt_tensor up, up_scale, down, down_scale;
    bool gated = rt_gated(l->c), transposed = is_transposed(l, up_name, down_name);
    bool interleaved = exists(l, "experts.gate_up_proj_bias");
    int64_t h = l->c->hidden, i = l->c->inter, rows = gated ? 2 * i : i;
    const int64_t up_shape[] = {l->c->experts, rows, h}, down_shape[] = {l->c->experts, h, i};
    RT_TRY(get_fused(l, up_name, up_shape, transposed, interleaved, &up, &up_scale));
    RT_TRY(get_fused(l, down_name, down_shape, transposed, interleaved, &down, &down_scale));
    for (int e = 0; e < l->c->experts; e++) {
        struct rt_expert *x = &l->out->experts[e];
        struct rt_matrix all;
        RT_TRY(slice_scaled(l, &up, &up_scale, e, rows, h, transposed, gated, &all));
        x->up = gated ? half(all, true, interleaved) : all;
        if (gated)
            x->gate = half(all, false, interleaved);
        RT_TRY(slice_scaled(l, &down, &down_scale, e, h, i, transposed, false, &x->down));
    }
    return load_fused_biases(l);
}

/* The tensor holds gates and the plan's activation has none, or the other way about. */
static moert_result wrong_gates(const struct loader *l, const char *name, bool gated) {
    return rt_fail(MOERT_UNSUPPORTED, "layer %d: %s%s holds %s, the plan's activation has %s",
                   l->layer, l->base, name, gated ? "gates" : "no gates",
                   gated ? "none" : "one");
}

/* ---- mxfp4: gpt-oss as released ---- */

/* blocks [E][rows][cols/32][16], two fp4 in a byte, low half first; scales [E][rows][cols/32],
 * powers of two. */
static moert_result get_mxfp4(struct loader *l, const char *stem, int64_t rows, int64_t cols,
                              struct rt_tensor *blocks, struct rt_tensor *scales) {
    char name[128];
    int64_t want[] = {l->c->experts, rows, cols / 32, 16};
    snprintf(name, sizeof name, "%s_blocks", stem);
    RT_TRY(get_at(l, l->base, name, blocks));
    if (cols % 32 || !shape_is(blocks, 4, want))
        return wrong_shape(l, blocks, 4, want);
    if (blocks->dtype != RT_U8)
        return wrong_dtype(l, blocks, "U8");
    snprintf(name, sizeof name, "%s_scales", stem);
    RT_TRY(get_at(l, l->base, name, scales));
    if (!shape_is(scales, 3, want))
        return wrong_shape(l, scales, 3, want);
    return scales->dtype == RT_U8 || scales->dtype == RT_F8_E8M0
               ? MOERT_OK
               : wrong_dtype(l, scales, "U8, F8_E8M0");
}

static struct rt_matrix mxfp4(const struct rt_tensor *blocks, const struct rt_tensor *scales,
                              int e, int64_t rows, int64_t cols) {
    return (struct rt_matrix){
        .data = blocks->data + e * rows * cols / 2,
        .dtype = RT_U8,
        .rows = rows,
        .cols = cols,
        .row_stride = cols,
        .col_stride = 1,
        .scale = scales->data + e * rows * cols / 32,
        .scale_dtype = RT_F8_E8M0,
        .block_rows = 1,
        .block_cols = 32,
        .scale_stride = cols / 32,
    };
}

static moert_result load_mxfp4(struct loader *l) {
    struct rt_tensor up, up_scales, down, down_scales;
    int64_t h = l->c->hidden, i = l->c->inter;
    RT_TRY(get_mxfp4(l, "experts.gate_up_proj", 2 * i, h, &up, &up_scales));
    RT_TRY(get_mxfp4(l, "experts.down_proj", h, i, &down, &down_scales));
    for (int e = 0; e < l->c->experts; e++) {
        struct rt_expert *x = &l->out->experts[e];
        struct rt_matrix both = mxfp4(&up, &up_scales, e, 2 * i, h);
        x->gate = half(both, false, true);
        x->up = half(both, true, true);
        x->down = mxfp4(&down, &down_scales, e, h, i);
    }
    return load_fused_biases(l);
}

/* ---- the layer ---- */

static moert_result load_experts(struct loader *l) {
    char name[128];
    if (exists(l, "experts.gate_up_proj_blocks"))
        return load_mxfp4(l);
#define X(up, down, gated) \
    if (exists(l, up)) \
        return rt_gated(l->c) == gated ? load_fused(l, up, down) : wrong_gates(l, up, gated);
    FUSED_EXPERTS(X)
#undef X
#define X(gate, up, down) \
    snprintf(name, sizeof name, down ".weight", 0); \
    if (exists(l, name)) \
        return load_split(l, &(struct names3){gate, up, down});
    SPLIT_EXPERTS(X)
#undef X
    return rt_fail(MOERT_NOT_FOUND,
                   "layer %d: no experts behind %s: looked for experts.0.down_proj.weight, "
                   "experts.0.w2.weight, experts.gate_up_proj, experts.gate_up_proj_blocks, "
                   "experts.up_proj, input_linear.weight",
                   l->layer, l->base);
}

/* Granite's: one tensor [2*SI][H], beside the block. */
static moert_result load_joint_shared(struct loader *l) {
    struct rt_matrix both;
    int64_t h = l->c->hidden, i = l->c->shared_inter;
    RT_TRY(get_matrix(l, l->layer_base, "shared_mlp.input_linear.weight", 2 * i, h, &both));
    l->out->shared.gate = half(both, false, false);
    l->out->shared.up = half(both, true, false);
    return get_matrix(l, l->layer_base, "shared_mlp.output_linear.weight", h, i,
                      &l->out->shared.down);
}

static moert_result load_shared(struct loader *l) {
    struct rt_expert *x = &l->out->shared;
    int64_t h = l->c->hidden, i = l->c->shared_inter;
    char base[256];
    if (!i)
        return MOERT_OK;
    if (l->c->shared_gate)
        RT_TRY(get_vector(l, "shared_expert_gate.weight", h, &l->out->shared_gate));
    if (rt_gated(l->c) && find(l, l->layer_base, "shared_mlp.input_linear.weight") >= 0)
        return load_joint_shared(l);
    for (int s = 0; s < COUNT(shared_experts); s++) {
        snprintf(base, sizeof base, "%s%s", l->base, shared_experts[s]);
        if (find(l, base, "up_proj.weight") < 0)
            continue;
        if (rt_gated(l->c))
            RT_TRY(get_matrix(l, base, "gate_proj.weight", i, h, &x->gate));
        RT_TRY(get_matrix(l, base, "up_proj.weight", i, h, &x->up));
        return get_matrix(l, base, "down_proj.weight", h, i, &x->down);
    }
    return rt_fail(MOERT_NOT_FOUND,
                   "layer %d: no shared expert behind %s: looked for shared_experts., "
                   "shared_expert., shared_mlp.",
                   l->layer, l->base);
}

static moert_result load_correction(struct loader *l) {
    for (int i = 0; i < COUNT(corrections); i++)
        if (exists(l, corrections[i]))
            return get_vector(l, corrections[i], l->c->experts, &l->out->correction);
    return rt_fail(MOERT_NOT_FOUND,
                   "layer %d: the checkpoint has no tensor %s%s (or as other "
                   "families name it)",
                   l->layer, l->base, corrections[0]);
}

static moert_result load_router(struct loader *l, const char *weight) {
    RT_TRY(get_matrix(l, l->base, weight, l->c->experts, l->c->hidden, &l->out->router));
    if (l->c->has_router_bias)
        RT_TRY(get_vector(l, l->router_bias, l->c->experts, &l->out->router_bias));
    return l->c->has_correction_bias ? load_correction(l) : MOERT_OK;
}

/* Sets the bases by the router's tensor; NULL when there is none. */
static const char *find_router(struct loader *l) {
    for (int p = 0; p < COUNT(prefixes); p++) {
        snprintf(l->layer_base, sizeof l->layer_base, "%slayers.%d.", prefixes[p], l->layer);
        for (int b = 0; b < COUNT(blocks); b++) {
            snprintf(l->base, sizeof l->base, "%s%s", l->layer_base, blocks[b]);
#define X(weight, bias) \
    if (exists(l, weight)) { \
        l->router_bias = bias; \
        return weight; \
    }
            ROUTERS(X)
#undef X
        }
    }
    return NULL;
}

static bool is_ignored(const char *name) {
    size_t len = strlen(name);
    for (int i = 0; i < COUNT(ignored); i++) {
        size_t n = strlen(ignored[i]);
        if (len >= n && !strcmp(name + len - n, ignored[i]))
            return true;
    }
    return false;
}

/* Without elements, as transformers saves a shared expert of no width. */
static bool is_empty(const struct loader *l, int i) {
    struct rt_tensor t;
    bool empty = false;
    if (rt_checkpoint_get(l->ck, i, &t) == MOERT_OK)
        for (int d = 0; d < t.rank; d++)
            empty |= t.shape[d] == 0;
    return empty;
}

static moert_result check_used(const struct loader *l, const char *base) {
    size_t len = strlen(base);
    for (int i = rt_checkpoint_lower(l->ck, base); i < rt_checkpoint_count(l->ck); i++) {
        const char *name = rt_checkpoint_name(l->ck, i);
        if (strncmp(name, base, len))
            break;
        if (!l->used[i] && !is_ignored(name) && !is_empty(l, i))
            return rt_fail(MOERT_INVALID,
                           "layer %d: the checkpoint has %s, for which the plan has no place",
                           l->layer, name);
    }
    return MOERT_OK;
}

/* fp8 records hold one scale for 128 x 128 weights: one that covers fewer has no place. */
static moert_result check_scales(const struct loader *l, const struct rt_expert *x, int e) {
    const struct rt_matrix *m[] = {&x->gate, &x->up, &x->down};
    for (int i = 0; moe_is_fp8(l->c) && i < COUNT(m); i++)
        if (m[i]->data && m[i]->dtype == RT_F8_E4M3 && !rt_scales_fit(m[i]))
            return rt_fail(
                MOERT_UNSUPPORTED,
                "layer %d, %s expert %d: its scales are for blocks of %lld x %lld, the "
                "plan's are for 128 x 128 (a model file with weights: {format: bf16} "
                "multiplies them out)",
                l->layer, e < 0 ? "shared" : "routed", e < 0 ? 0 : e,
                (long long)m[i]->block_rows, (long long)m[i]->block_cols);
    return MOERT_OK;
}

static moert_result check_all_scales(const struct loader *l) {
    for (int e = 0; e < l->c->experts; e++)
        RT_TRY(check_scales(l, &l->out->experts[e], e));
    return check_scales(l, &l->out->shared, -1);
}

static moert_result load_layer(struct loader *l) {
    char beside[160];
    const char *router = find_router(l);
    if (!router)
        return rt_fail(
            MOERT_NOT_FOUND,
            "layer %d: no router in the checkpoint: looked for layers.%d. with mlp., "
            "block_sparse_moe., feed_forward. or mixer. and gate.weight, router.weight, "
            "gate.wg.weight or router.layer.weight, behind model., language_model., "
            "both, backbone. or nothing",
            l->layer, l->layer);
    RT_TRY(load_router(l, router));
    RT_TRY(load_experts(l));
    RT_TRY(load_shared(l));
    RT_TRY(check_all_scales(l));
    RT_TRY(check_used(l, l->base));
    snprintf(beside, sizeof beside, "%sshared_mlp.", l->layer_base);
    return check_used(l, beside);
}

moert_result rt_source_from_checkpoint(const struct moe_plan_class *c, int layer,
                                       struct rt_checkpoint *ck, struct rt_source *out) {
    struct loader l = {.c = c, .layer = layer, .ck = ck, .out = out};
    l.used = calloc((size_t)rt_checkpoint_count(ck) + 1, sizeof *l.used);
    out->experts = calloc((size_t)c->experts, sizeof *out->experts);
    moert_result r = l.used && out->experts
                         ? load_layer(&l)
                         : rt_no_memory((size_t)c->experts * sizeof *out->experts);
    free(l.used);
    return r;
}
