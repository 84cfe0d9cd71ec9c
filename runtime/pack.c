/* Packing (bundle.h). bf16 records: any matrix the checkpoints hold becomes bf16 rows; quantised
 * weights are multiplied out in fp32 and rounded once. fp8 records: e4m3 is taken as it is, all
 * else is quantised block by block. */
#include "internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers ---- */

static float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint16_t bf16_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40); /* NaN stays one */
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* To nearest even; beyond 448, the largest, it is 448. */
static uint8_t e4m3_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint8_t sign = (uint8_t)(u >> 24 & 0x80);
    u &= 0x7fffffff;
    if (u > 0x7f800000)
        return 0x7f;
    f = float_of(u);
    if (f >= MOE_E4M3_MAX)
        return sign | 0x7e;
    if (f < 0x1p-6f) /* subnormal: multiples of 2^-9, to which the sum rounds */
        return (uint8_t)(sign | (int)((f + 0x1.8p14f - 0x1.8p14f) * 0x1p9f));
    return (uint8_t)(sign | (((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120 << 3)));
}

/* Narrow floats: the bits in fp32's places, then the exponent's bias put right by a product, which
 * is exact and serves subnormal numbers too. */
static float fp16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = (uint32_t)(h & 0x7fff) << 13;
    float f = bits >= 0x0f800000 ? float_of(bits | 0x7f800000) : float_of(bits) * 0x1p112f;
    return sign ? -f : f;
}

static float e4m3_to_float(uint8_t b) {
    uint32_t bits = (uint32_t)(b & 0x7f) << 20;
    float f = bits == 0x07f00000 ? float_of(0x7fc00000) : float_of(bits) * 0x1p120f;
    return b & 0x80 ? -f : f;
}

static float e8m0_to_float(uint8_t b) {
    return b == 255 ? float_of(0x7fc00000) : b ? float_of((uint32_t)b << 23) : 0x1p-127f;
}

static const float e2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

int rt_dtype_bytes(enum rt_dtype dtype) {
    static const int bits[] = {
#define X(name, spelling, bits) bits,
        RT_DTYPES(X)
#undef X
    };
    return bits[dtype] / 8;
}

/* Element i of an array of any alignment. */
static float load(const unsigned char *data, enum rt_dtype dtype, int64_t i) {
    uint16_t half;
    float f;
    switch (dtype) {
    case RT_F32:
        memcpy(&f, data + 4 * i, sizeof f);
        return f;
    case RT_BF16:
        memcpy(&half, data + 2 * i, sizeof half);
        return float_of((uint32_t)half << 16);
    case RT_F16:
        memcpy(&half, data + 2 * i, sizeof half);
        return fp16_to_float(half);
    case RT_F8_E4M3:
        return e4m3_to_float(data[i]);
    case RT_F8_E8M0:
        return e8m0_to_float(data[i]);
    case RT_U8:
        return e2m1[data[i / 2] >> (i % 2 * 4) & 15];
    default:
        return float_of(0x7fc00000); /* sources hold no other type */
    }
}

/* ---- rows ---- */

static void scale_row(const struct rt_matrix *m, int64_t row, float *out) {
    int64_t first = row / m->block_rows * m->scale_stride;
    for (int64_t c = 0; c < m->cols; c += m->block_cols) {
        float factor = load(m->scale, m->scale_dtype, first + c / m->block_cols);
        int64_t end = c + m->block_cols < m->cols ? c + m->block_cols : m->cols;
        for (int64_t i = c; i < end; i++)
            out[i] *= factor;
    }
}

void rt_row_fp32(const struct rt_matrix *m, int64_t row, float *out) {
    int64_t at = row * m->row_stride, step = m->col_stride;
    switch (m->dtype) { /* a loop for each type, so that none asks per element */
#define X(type) \
    case type: \
        for (int64_t i = 0; i < m->cols; i++) \
            out[i] = load(m->data, type, at + i * step); \
        break;
        X(RT_F32)
        X(RT_BF16)
        X(RT_F16)
        X(RT_F8_E4M3)
        X(RT_U8)
#undef X
    default:
        memset(out, 0xff, (size_t)m->cols * sizeof *out);
    }
    if (m->scale)
        scale_row(m, row, out);
}

void rt_row_bf16(const struct rt_matrix *m, int64_t row, uint16_t *out, float *scratch) {
    if (m->dtype == RT_BF16 && m->col_stride == 1) {
        memcpy(out, m->data + 2 * row * m->row_stride, (size_t)m->cols * 2);
        return;
    }
    rt_row_fp32(m, row, scratch);
    for (int64_t i = 0; i < m->cols; i++)
        out[i] = bf16_of(scratch[i]);
}

/* ---- records ---- */

/* Row r of w1 in packed order: of gate (first of the pair) or up, and which row of it. */
static bool is_up_row(int64_t r, bool gated, int64_t *row) {
    *row = gated ? r / 16 * 8 + r % 8 : r;
    return !gated || r % 16 >= 8;
}

/* ---- fp8 records ---- */

enum { BLOCK = MOE_SCALE_BLOCK };

static int64_t lesser(int64_t a, int64_t b) {
    return a < b ? a : b;
}

bool rt_scales_fit(const struct rt_matrix *m) {
    return (m->block_rows >= m->rows || m->block_rows % BLOCK == 0) &&
           (m->block_cols >= m->cols || m->block_cols % BLOCK == 0);
}

/* The scales that come with the blocks of BLOCK rows from first. */
static void take_scales(const struct rt_matrix *m, int64_t first, float *scales) {
    int64_t row = first / m->block_rows * m->scale_stride;
    for (int64_t c = 0; c < m->cols; c += BLOCK)
        scales[c / BLOCK] = load(m->scale, m->scale_dtype, row + c / m->block_cols);
}

/* The scales that those blocks' largest numbers ask for. */
static void make_scales(const struct rt_matrix *m, int64_t first, float *scales,
                        float *scratch) {
    for (int64_t c = 0; c < m->cols; c += BLOCK)
        scales[c / BLOCK] = 0;
    for (int64_t r = first; r < lesser(first + BLOCK, m->rows); r++) {
        rt_row_fp32(m, r, scratch);
        for (int64_t i = 0; i < m->cols; i++)
            if (fabsf(scratch[i]) > scales[i / BLOCK])
                scales[i / BLOCK] = fabsf(scratch[i]);
    }
    for (int64_t c = 0; c < m->cols; c += BLOCK)
        scales[c / BLOCK] = fmaxf(scales[c / BLOCK] / MOE_E4M3_MAX, MOE_SCALE_MIN);
}

/* A block with a NaN (every bit but the sign) gets one for its scale: not every tensor core knows
 * it. Eight at a time; rows are whole sixteens. */
static void spread_nan(const uint8_t *row, int64_t cols, float *scales) {
    for (int64_t i = 0; i < cols; i += 8) {
        uint64_t v;
        memcpy(&v, row + i, sizeof v);
        if (((v & 0x7f7f7f7f7f7f7f7f) + 0x0101010101010101) & 0x8080808080808080)
            scales[i / BLOCK] = float_of(0x7fc00000);
    }
}

/* Where a matrix's rows stand in w1: every one, or eight of sixteen. */
enum place { PLAIN, GATE, UP };

static int64_t placed(enum place p, int64_t r) {
    return p == PLAIN ? r : r / 8 * 16 + r % 8 + (p == UP ? 8 : 0);
}

/* stride: scales from one block of rows to the next. */
static void pack_fp8(const struct rt_matrix *m, enum place p, uint8_t *out, float *scales,
                     int64_t stride, float *scratch) {
    bool as_it_is = m->dtype == RT_F8_E4M3;
    for (int64_t r = 0; r < m->rows; r++) {
        uint8_t *to = out + placed(p, r) * m->cols;
        float *s = scales + r / BLOCK * stride;
        if (r % BLOCK == 0)
            as_it_is ? take_scales(m, r, s) : make_scales(m, r, s, scratch);
        if (as_it_is) {
            memcpy(to, m->data + r * m->row_stride, (size_t)m->cols);
        } else {
            rt_row_fp32(m, r, scratch);
            for (int64_t i = 0; i < m->cols; i++)
                to[i] = e4m3_of(scratch[i] / s[i / BLOCK]);
        }
        spread_nan(to, m->cols, s);
    }
}

static void pack_fp8_weights(const struct rt_expert *e, bool gated, char *record,
                             const int64_t offset[4], float *scratch) {
    uint8_t *w1 = (uint8_t *)(record + offset[0]), *w2 = (uint8_t *)(record + offset[1]);
    float *s1 = (float *)(record + offset[2]), *s2 = (float *)(record + offset[3]);
    int64_t blocks = (e->up.cols + BLOCK - 1) / BLOCK, stride = gated ? 2 * blocks : blocks;
    if (gated)
        pack_fp8(&e->gate, GATE, w1, s1, stride, scratch);
    pack_fp8(&e->up, gated ? UP : PLAIN, w1, s1 + stride - blocks, stride, scratch);
    pack_fp8(&e->down, PLAIN, w2, s2, (e->down.cols + BLOCK - 1) / BLOCK, scratch);
}

/* ---- all of a record ---- */

static void pack_w1(const struct rt_expert *e, bool gated, int64_t rows, uint16_t *out,
                    float *scratch) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t row;
        const struct rt_matrix *m = is_up_row(r, gated, &row) ? &e->up : &e->gate;
        rt_row_bf16(m, row, out + r * m->cols, scratch);
    }
}

static void pack_w2(const struct rt_expert *e, uint16_t *out, float *scratch) {
    for (int64_t r = 0; r < e->down.rows; r++)
        rt_row_bf16(&e->down, r, out + r * e->down.cols, scratch);
}

static void pack_b1(const struct rt_expert *e, bool gated, int64_t rows, float *out,
                    float *scratch) {
    for (int pass = gated ? 0 : 1; pass < 2; pass++) {
        rt_row_fp32(pass ? &e->up_bias : &e->gate_bias, 0, scratch);
        for (int64_t r = 0; r < rows; r++) {
            int64_t row;
            if (is_up_row(r, gated, &row) == pass)
                out[r] = scratch[row];
        }
    }
}

/* offset: of w1, w2, s1, s2. */
static void pack_weights(const struct moe_plan_class *c, const struct rt_expert *e,
                         char *record, const int64_t offset[4], int64_t w1_rows,
                         float *scratch) {
    if (moe_is_fp8(c)) {
        pack_fp8_weights(e, rt_gated(c), record, offset, scratch);
        return;
    }
    pack_w1(e, rt_gated(c), w1_rows, (uint16_t *)(record + offset[0]), scratch);
    pack_w2(e, (uint16_t *)(record + offset[1]), scratch);
}

void rt_pack_expert(const struct moe_plan_class *c, const struct rt_expert *e, void *record,
                    float *scratch) {
    struct rt_record r = rt_record_parts(c, c->inter, c->has_bias);
    const int64_t offset[] = {c->w1_offset, c->w2_offset, c->s1_offset, c->s2_offset};
    char *at = record;
    memset(at, 0, (size_t)c->slot_bytes);
    pack_weights(c, e, at, offset, r.w1_rows, scratch);
    if (c->has_bias) {
        pack_b1(e, rt_gated(c), r.w1_rows, (float *)(at + c->b1_offset), scratch);
        rt_row_fp32(&e->down_bias, 0, (float *)(at + c->b2_offset));
    }
}

void rt_pack_shared(const struct moe_plan_class *c, const struct rt_expert *e, void *record,
                    float *scratch) {
    struct rt_record r = rt_record_parts(c, c->shared_inter, false);
    const int64_t offset[] = {c->shared_w1_offset, c->shared_w2_offset, c->shared_s1_offset,
                              c->shared_s2_offset};
    memset(record, 0, (size_t)c->shared_bytes);
    pack_weights(c, e, record, offset, r.w1_rows, scratch);
}

/* ---- a caller's pointers ---- */

/* Takes a tensor that must (or must not) be there. */
static moert_result take(const char *name, const moert_tensor *t, bool wanted, int64_t rows,
                         int64_t cols, struct rt_matrix *out) {
    bool given = t && t->data;
    if (given != wanted)
        return rt_fail(MOERT_INVALID, "moert_weights: %s %s", name,
                       wanted ? "is missing" : "is given, but the layer has none");
    if (!given)
        return MOERT_OK;
    if (t->dtype != MOERT_FP32 && t->dtype != MOERT_BF16)
        return rt_fail(MOERT_INVALID, "moert_weights: %s has dtype %d", name, (int)t->dtype);
    *out = (struct rt_matrix){.data = t->data,
                              .dtype = t->dtype == MOERT_FP32 ? RT_F32 : RT_BF16,
                              .rows = rows,
                              .cols = cols,
                              .row_stride = cols,
                              .col_stride = 1};
    return MOERT_OK;
}

static const moert_tensor *item(const moert_tensor *list, int e) {
    return list ? &list[e] : NULL;
}

static moert_result take_expert(const struct moe_plan_class *c, const moert_weights *w, int e,
                                struct rt_expert *out) {
    bool gated = rt_gated(c), bias = c->has_bias;
    int64_t h = c->hidden, n = c->inter;
    RT_TRY(take("gate", item(w->gate, e), gated, n, h, &out->gate));
    RT_TRY(take("up", item(w->up, e), true, n, h, &out->up));
    RT_TRY(take("down", item(w->down, e), true, h, n, &out->down));
    RT_TRY(take("gate_bias", item(w->gate_bias, e), gated && bias, 1, n, &out->gate_bias));
    RT_TRY(take("up_bias", item(w->up_bias, e), bias, 1, n, &out->up_bias));
    return take("down_bias", item(w->down_bias, e), bias, 1, h, &out->down_bias);
}

static moert_result take_shared(const struct moe_plan_class *c, const moert_weights *w,
                                struct rt_source *out) {
    bool shared = c->shared_inter > 0;
    int64_t h = c->hidden, n = c->shared_inter;
    RT_TRY(take("shared_gate_proj", &w->shared_gate_proj, shared && rt_gated(c), n, h,
                &out->shared.gate));
    RT_TRY(take("shared_up_proj", &w->shared_up_proj, shared, n, h, &out->shared.up));
    RT_TRY(take("shared_down_proj", &w->shared_down_proj, shared, h, n, &out->shared.down));
    return take("shared_expert_gate", &w->shared_expert_gate, c->shared_gate, 1, h,
                &out->shared_gate);
}

moert_result rt_source_from_weights(const struct moe_plan_class *c, const moert_weights *w,
                                    struct rt_source *out) {
    bool learned = c->router != MOE_ROUTER_STATIC && c->router != MOE_ROUTER_BALANCED;
    RT_TRY(take("router", &w->router, learned || w->router.data, c->experts, c->hidden,
                &out->router));
    RT_TRY(take("router_bias", &w->router_bias, c->has_router_bias, 1, c->experts,
                &out->router_bias));
    RT_TRY(take("correction_bias", &w->correction_bias, c->has_correction_bias, 1, c->experts,
                &out->correction));
    RT_TRY(take_shared(c, w, out));
    out->experts = calloc((size_t)c->experts, sizeof *out->experts);
    if (!out->experts)
        return rt_no_memory((size_t)c->experts * sizeof *out->experts);
    for (int e = 0; e < c->experts; e++)
        RT_TRY(take_expert(c, w, e, &out->experts[e]));
    return MOERT_OK;
}
