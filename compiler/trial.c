#include "trial.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PADDING = 64, MARK = 0xA5 }; /* rows beyond T; the byte that marks them in outputs */

static size_t width(moert_dtype d) {
    return d == MOERT_FP32 ? 4 : 2;
}

static size_t rows(const struct trial *t, bool padded) {
    return (size_t)t->tokens + (padded ? PADDING : 0);
}

/* n fp32 values as the device's dtype, and back. */
static void narrow(const float *from, size_t n, moert_dtype d, void *to) {
    if (d == MOERT_FP32) {
        memcpy(to, from, 4 * n);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned u;
        float v = ref_bf16(from[i]);
        memcpy(&u, &v, 4);
        ((unsigned short *)to)[i] = (unsigned short)(u >> 16);
    }
}
static void widen(const void *from, size_t n, moert_dtype d, float *to) {
    if (d == MOERT_FP32) {
        memcpy(to, from, 4 * n);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned u = (unsigned)((const unsigned short *)from)[i] << 16;
        memcpy(to + i, &u, 4);
    }
}

static moert_result device_rows(struct trial *t, size_t row_bytes, void **out) {
    return moert_tool_alloc(t->context, row_bytes * rows(t, true), out);
}

moert_result trial_open(struct trial *t, moert_context *c, moert_layer *l,
                        const struct moe_plan_class *shape, int tokens, moert_dtype x_dtype,
                        moert_dtype out_dtype) {
    size_t h = (size_t)shape->hidden, k = (size_t)shape->topk, n = (size_t)tokens + 1;
    *t = (struct trial){.context = c, .layer = l, .shape = shape, .tokens = tokens};
    t->io = (moert_io)MOERT_IO_INIT;
    t->io.num_tokens = tokens;
    t->io.x_dtype = x_dtype;
    t->io.out_dtype = out_dtype;
    t->x = calloc(n * h, 4);
    t->idx = calloc(n * k, 4);
    t->weight = calloc(n * k, 4);
    t->out = calloc(n * h, 4);
    moert_result r = t->x && t->idx && t->weight && t->out ? MOERT_OK : MOERT_NO_MEMORY;
    if (!r)
        r = device_rows(t, h * width(x_dtype), (void **)&t->io.x);
    if (!r)
        r = device_rows(t, h * width(out_dtype), &t->io.out);
    if (!r)
        r = device_rows(t, k * 4, (void **)&t->io.topk_idx);
    if (!r)
        r = device_rows(t, k * 4, (void **)&t->io.topk_weight);
    if (r)
        trial_close(t);
    return r;
}

void trial_close(struct trial *t) {
    void *device[] = {(void *)t->io.x, t->io.out, (void *)t->io.logits, t->io.topk_idx,
                      t->io.topk_weight};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i])
            moert_tool_free(t->context, device[i]);
    free(t->x);
    free(t->logits);
    free(t->idx);
    free(t->weight);
    free(t->out);
    *t = (struct trial){0};
}

static void random_row(struct trial *t, unsigned long long tensor, int token) {
    size_t h = (size_t)t->shape->hidden;
    float *row = t->x + (size_t)token * h;
    for (size_t i = 0; i < h; i++) {
        float v = moe_random_value(tensor, (size_t)token * h + i);
        row[i] = t->io.x_dtype == MOERT_BF16 ? ref_bf16(v) : v;
    }
}

void trial_random_x(struct trial *t, unsigned long long seed, int layer) {
    for (int i = 0; i < t->tokens; i++)
        random_row(t, moe_tensor_seed(seed, layer, MOE_TENSOR_X), i);
}

static bool near_tie(const struct trial *t, const struct ref_layer *ref, int token,
                     double *logits) {
    double margin;
    ref_logits(ref, t->x + (size_t)token * (size_t)t->shape->hidden, 1, logits);
    ref_margin(ref, logits, 1, &margin);
    return margin < TRIAL_MARGIN;
}

void trial_settle(struct trial *t, const struct ref_layer *ref, unsigned long long seed,
                  const int *sample, int n) {
    double *logits = malloc(sizeof *logits * (size_t)t->shape->experts);
    if (!logits)
        abort();
    for (int i = 0; i < n; i++)
        for (int attempt = 1; near_tie(t, ref, sample[i], logits) && attempt < 10000; attempt++)
            random_row(t, moe_hash(seed + (unsigned)attempt), sample[i]);
    free(logits);
}

moert_result trial_use_logits(struct trial *t, moert_dtype dtype) {
    size_t e = (size_t)t->shape->experts;
    t->io.logits_dtype = dtype;
    t->logits = calloc(((size_t)t->tokens + 1) * e, 4);
    return t->logits ? device_rows(t, e * width(dtype), (void **)&t->io.logits)
                     : MOERT_NO_MEMORY;
}

/* T rows of n fp32 values, then rows of NaN (every byte 0xff). */
static moert_result send(struct trial *t, const float *from, size_t n, moert_dtype d,
                         const void *to) {
    size_t bytes = n * width(d), used = bytes * rows(t, false);
    char *all = malloc(bytes * rows(t, true));
    if (!all)
        return MOERT_NO_MEMORY;
    narrow(from, n * rows(t, false), d, all);
    memset(all + used, 0xff, bytes * PADDING);
    moert_result r = moert_tool_upload(t->context, (void *)to, all, used + bytes * PADDING);
    free(all);
    return r;
}

moert_result trial_upload(struct trial *t) {
    size_t h = (size_t)t->shape->hidden, k = (size_t)t->shape->topk, all = rows(t, true);
    moert_context *c = t->context;
    moert_result r = send(t, t->x, h, t->io.x_dtype, t->io.x);
    if (!r && t->logits)
        r = send(t, t->logits, (size_t)t->shape->experts, t->io.logits_dtype, t->io.logits);
    if (!r)
        r = moert_tool_set(c, t->io.out, MARK, h * width(t->io.out_dtype) * all);
    if (!r)
        r = moert_tool_set(c, t->io.topk_idx, MARK, k * 4 * all);
    if (!r)
        r = moert_tool_set(c, t->io.topk_weight, MARK, k * 4 * all);
    if (!r)
        r = moert_tool_upload(c, t->io.topk_idx, t->idx, k * 4 * rows(t, false));
    if (!r)
        r = moert_tool_upload(c, t->io.topk_weight, t->weight, k * 4 * rows(t, false));
    return r;
}

moert_result trial_download(struct trial *t) {
    size_t h = (size_t)t->shape->hidden, k = (size_t)t->shape->topk, n = rows(t, false);
    void *out = malloc(h * width(t->io.out_dtype) * (n + 1));
    if (!out)
        return MOERT_NO_MEMORY;
    moert_result r =
        moert_tool_download(t->context, out, t->io.out, h * width(t->io.out_dtype) * n);
    if (!r)
        r = moert_tool_download(t->context, t->idx, t->io.topk_idx, k * 4 * n);
    if (!r)
        r = moert_tool_download(t->context, t->weight, t->io.topk_weight, k * 4 * n);
    if (!r)
        widen(out, h * n, t->io.out_dtype, t->out);
    free(out);
    return r;
}

/* Whether the padding of a device array is still all one byte. */
static bool padding_is(const struct trial *t, const void *p, size_t row_bytes, int byte) {
    size_t n = row_bytes * PADDING;
    unsigned char *bytes = malloc(n);
    bool same = bytes && !moert_tool_download(t->context, bytes,
                                              (const char *)p + row_bytes * rows(t, false), n);
    for (size_t i = 0; same && i < n; i++)
        same = bytes[i] == byte;
    free(bytes);
    return same;
}

bool trial_overran(const struct trial *t) {
    size_t h = (size_t)t->shape->hidden, k = (size_t)t->shape->topk;
    return !(padding_is(t, t->io.x, h * width(t->io.x_dtype), 0xff) &&
             padding_is(t, t->io.out, h * width(t->io.out_dtype), MARK) &&
             padding_is(t, t->io.topk_idx, k * 4, MARK) &&
             padding_is(t, t->io.topk_weight, k * 4, MARK));
}

/* ---- comparison ---- */

/* What the reference needs of the sampled tokens. */
struct sampled {
    float *x;
    double *logits, *out;
    int *idx;
    float *weight, *got;
};

static bool sampled_alloc(struct sampled *s, const struct moe_plan_class *c, int n) {
    size_t m = (size_t)n + 1, h = (size_t)c->hidden, k = (size_t)c->topk;
    s->x = calloc(m * h, 4);
    s->got = malloc(4 * m * h);
    s->out = malloc(8 * m * h);
    s->logits = malloc(8 * m * (size_t)c->experts);
    s->idx = malloc(4 * m * k);
    s->weight = malloc(4 * m * k);
    return s->x && s->got && s->out && s->logits && s->idx && s->weight;
}
static void sampled_free(struct sampled *s) {
    free(s->x);
    free(s->got);
    free(s->out);
    free(s->logits);
    free(s->idx);
    free(s->weight);
}

static void gather(const struct trial *t, const int *sample, int n, struct sampled *s) {
    size_t h = (size_t)t->shape->hidden, k = (size_t)t->shape->topk;
    size_t e = (size_t)t->shape->experts;
    for (int i = 0; i < n; i++) {
        size_t row = (size_t)sample[i];
        memcpy(s->x + (size_t)i * h, t->x + row * h, 4 * h);
        memcpy(s->got + (size_t)i * h, t->out + row * h, 4 * h);
        memcpy(s->idx + (size_t)i * k, t->idx + row * k, 4 * k);
        memcpy(s->weight + (size_t)i * k, t->weight + row * k, 4 * k);
        for (size_t j = 0; t->logits && j < e; j++)
            s->logits[(size_t)i * e + j] = t->logits[row * e + j];
    }
}

/* The reference's choice for sampled token i: balanced depends on the token's number. */
static void route_one(const struct trial *t, const struct ref_layer *ref, int token,
                      const double *logits, int *idx, float *weight) {
    int k = t->shape->topk;
    ref_route(ref, logits, 1, idx, weight);
    if (t->shape->router == MOE_ROUTER_BALANCED)
        for (int j = 0; j < k; j++)
            idx[j] = (int)(((long long)token * k + j) % t->shape->experts);
}

/* One token's ids and weights against the reference's. A choice between near ties is taken over
 * from the device, so that the experts are still compared. */
static void compare_choice(const struct trial *t, double margin, const int32_t *got,
                           const float *got_weight, int *idx, float *weight,
                           struct trial_error *e) {
    size_t k = (size_t)t->shape->topk;
    bool differs = memcmp(idx, got, 4 * k) != 0;
    if (differs && margin < TRIAL_MARGIN) {
        e->near_ties++;
        memcpy(idx, got, 4 * k);
        memcpy(weight, got_weight, 4 * k);
        return;
    }
    e->wrong_ids += differs;
    for (size_t j = 0; j < k; j++) {
        double d = fabs((double)weight[j] - got_weight[j]) / fmax(1, t->shape->scale);
        if (!(d <= e->weight_error)) /* NaN counts */
            e->weight_error = isnan(d) ? INFINITY : d;
    }
}

static void compare_route(const struct trial *t, const struct ref_layer *ref, const int *sample,
                          int n, struct sampled *s, struct trial_error *e) {
    size_t k = (size_t)t->shape->topk, experts = (size_t)t->shape->experts;
    if (!t->logits)
        ref_logits(ref, s->x, n, s->logits);
    for (int i = 0; i < n; i++) {
        const double *logits = s->logits + (size_t)i * experts;
        int *idx = s->idx + (size_t)i * k;
        float *weight = s->weight + (size_t)i * k;
        double margin;
        ref_margin(ref, logits, 1, &margin);
        route_one(t, ref, sample[i], logits, idx, weight);
        compare_choice(t, margin, t->idx + (size_t)sample[i] * k,
                       t->weight + (size_t)sample[i] * k, idx, weight, e);
    }
}

bool trial_compare(const struct trial *t, const struct ref_layer *ref, enum trial_choice choice,
                   const int *sample, int n, struct trial_error *e) {
    size_t values = (size_t)n * (size_t)t->shape->hidden;
    struct sampled s = {0};
    bool ok = sampled_alloc(&s, t->shape, n);
    *e = (struct trial_error){.tokens = n, .fp8 = moe_is_fp8(t->shape)};
    if (ok) {
        gather(t, sample, n, &s);
        if (choice == TRIAL_ROUTED)
            compare_route(t, ref, sample, n, &s, e);
        for (size_t i = 0; !e->fp8 && i < values; i++)
            s.x[i] = ref_bf16(s.x[i]); /* what the experts multiply */
        ok = ref_experts(ref, s.x, n, s.idx, s.weight, s.out);
    }
    if (ok) {
        e->rel_l2 = ref_rel_l2(s.got, s.out, (long long)values);
        e->difference = ref_difference(s.got, s.out, (long long)values);
    }
    sampled_free(&s);
    return ok;
}

bool trial_passes(const struct trial_error *e) {
    bool close = e->fp8 ? e->difference <= 1e-4 : e->rel_l2 <= 4e-3;
    return e->wrong_ids == 0 && e->weight_error <= 1e-6 && close;
}

int trial_sample(int tokens, int n, int *sample) {
    if (n > tokens)
        n = tokens;
    for (int i = 0; i < n; i++)
        sample[i] = n == 1 ? 0 : (int)((long long)i * (tokens - 1) / (n - 1));
    return n;
}

void trial_json(const struct trial_error *e, struct buf *out) {
    buf_printf(out, "\"wrong_ids\":%d,\"near_ties\":%d,\"weight_error\":", e->wrong_ids,
               e->near_ties);
    buf_json_double(out, e->weight_error);
    buf_printf(out, ",\"rel_l2\":");
    buf_json_double(out, e->rel_l2);
    buf_printf(out, ",\"difference\":");
    buf_json_double(out, e->difference);
    buf_printf(out, ",\"passed\":%s", trial_passes(e) ? "true" : "false");
}

void trial_describe(const struct trial_error *e, char *text, size_t size) {
    int n = snprintf(text, size, "%d token%s, ", e->tokens, e->tokens == 1 ? "" : "s");
    if (e->wrong_ids)
        n += snprintf(text + n, size - (size_t)n, "ids wrong for %d, ", e->wrong_ids);
    else
        n += snprintf(text + n, size - (size_t)n, "ids exact, ");
    if (e->near_ties)
        n += snprintf(text + n, size - (size_t)n, "near ties apart %d, ", e->near_ties);
    n += snprintf(text + n, size - (size_t)n, "weights %.1e, relative L2 %.2e", e->weight_error,
                  e->rel_l2);
    if (e->fp8)
        snprintf(text + n, size - (size_t)n, ", difference %.1e", e->difference);
}

int trial_affordable(const struct moe_plan_class *c) {
    double n = 2e9 / (3.0 * c->hidden * c->inter * c->topk);
    return n < 1 ? 1 : n > 16 ? 16 : (int)n;
}

/* ---- weights held by a layer ---- */

struct trial_held {
    moert_layer *layer;
    const struct moe_plan_class *shape;
    unsigned char *record;
    float *expert, *bias, *shared;
    float *router, *router_bias, *correction, *shared_gate;
};

static bool is_gated(const struct moe_plan_class *c) {
    return c->activation != MOE_ACT_RELU2;
}

/* Plain row of packed row p of w1 (runtime/bundle.h): gate rows, then up rows. */
static size_t plain_row(const struct moe_plan_class *c, size_t p, size_t inter) {
    return is_gated(c) ? p / 16 * 8 + p % 8 + (p % 16 < 8 ? 0 : inter) : p;
}

/* n numbers of a row: bf16, or e4m3 with a scale for every 128. */
static void unpack_row(const unsigned char *from, const float *scale, size_t n, float *to) {
    if (!scale)
        widen(from, n, MOERT_BF16, to);
    for (size_t i = 0; scale && i < n; i++)
        to[i] = ref_of_e4m3(from[i]) * scale[i / 128];
}

/* offset: of w1, w2, s1, s2. */
static void unpack(const struct moe_plan_class *c, const unsigned char *record,
                   const int64_t offset[4], size_t inter, float *to, struct ref_expert *out) {
    size_t h = (size_t)c->hidden, rows1 = is_gated(c) ? 2 * inter : inter;
    size_t width = moe_is_fp8(c) ? 1 : 2, by_h = (h + 127) / 128,
           by_inter = (inter + 127) / 128;
    const float *s1 = (const float *)(record + offset[2]);
    const float *s2 = (const float *)(record + offset[3]);
    for (size_t p = 0; p < rows1; p++) {
        size_t plain = plain_row(c, p, inter), up = is_gated(c) && plain >= inter;
        size_t block = (plain - up * inter) / 128 * (is_gated(c) ? 2 : 1) + up;
        unpack_row(record + offset[0] + width * p * h, moe_is_fp8(c) ? s1 + block * by_h : NULL,
                   h, to + plain * h);
    }
    for (size_t p = 0; p < h; p++)
        unpack_row(record + offset[1] + width * p * inter,
                   moe_is_fp8(c) ? s2 + p / 128 * by_inter : NULL, inter,
                   to + rows1 * h + p * inter);
    out->gate = is_gated(c) ? to : NULL;
    out->up = is_gated(c) ? to + inter * h : to;
    out->down = to + rows1 * h;
}

static void unpack_biases(const struct trial_held *w, struct ref_expert *out) {
    const struct moe_plan_class *c = w->shape;
    size_t inter = (size_t)c->inter, rows1 = is_gated(c) ? 2 * inter : inter;
    const float *b1 = (const float *)(w->record + c->b1_offset);
    for (size_t p = 0; p < rows1; p++)
        w->bias[plain_row(c, p, inter)] = b1[p];
    memcpy(w->bias + rows1, w->record + c->b2_offset, 4 * (size_t)c->hidden);
    out->gate_bias = is_gated(c) ? w->bias : NULL;
    out->up_bias = is_gated(c) ? w->bias + inter : w->bias;
    out->down_bias = w->bias + rows1;
}

static bool held_expert(void *user, int e, struct ref_expert *out) {
    struct trial_held *w = user;
    const struct moe_plan_class *c = w->shape;
    if (moert_tool_record(w->layer, e, w->record))
        return false;
    *out = (struct ref_expert){0};
    const int64_t offset[] = {c->w1_offset, c->w2_offset, c->s1_offset, c->s2_offset};
    unpack(c, w->record, offset, (size_t)c->inter, w->expert, out);
    if (c->has_bias)
        unpack_biases(w, out);
    return true;
}

static bool held_alloc(struct trial_held *w) {
    const struct moe_plan_class *c = w->shape;
    size_t h = (size_t)c->hidden, e = (size_t)c->experts, inter = (size_t)c->inter;
    int64_t largest = c->slot_bytes > c->shared_bytes ? c->slot_bytes : c->shared_bytes;
    w->record = malloc((size_t)largest);
    w->expert = malloc(12 * h * inter);
    w->bias = malloc(4 * (2 * inter + h));
    w->shared = malloc(12 * h * (size_t)c->shared_inter + 1);
    w->router = malloc(4 * e * h);
    w->router_bias = malloc(4 * e);
    w->correction = malloc(4 * e);
    w->shared_gate = malloc(4 * h);
    return w->record && w->expert && w->bias && w->shared && w->router && w->router_bias &&
           w->correction && w->shared_gate;
}

static bool held_fill(struct trial_held *w, struct ref_layer *out) {
    const struct moe_plan_class *c = w->shape;
    if (moert_tool_router(w->layer, w->router, w->router_bias, w->correction, w->shared_gate))
        return false;
    *out =
        (struct ref_layer){.shape = c, .router = w->router, .expert = held_expert, .user = w};
    out->router_bias = c->has_router_bias ? w->router_bias : NULL;
    out->correction_bias = c->has_correction_bias ? w->correction : NULL;
    out->shared_gate = c->shared_gate ? w->shared_gate : NULL;
    if (!c->shared_inter)
        return true;
    if (moert_tool_record(w->layer, -1, w->record))
        return false;
    const int64_t offset[] = {c->shared_w1_offset, c->shared_w2_offset, c->shared_s1_offset,
                              c->shared_s2_offset};
    unpack(c, w->record, offset, (size_t)c->shared_inter, w->shared, &out->shared);
    return true;
}

struct trial_held *trial_held_open(moert_layer *l, const struct moe_plan_class *c,
                                   struct ref_layer *out) {
    struct trial_held *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->layer = l;
    w->shape = c;
    if (held_alloc(w) && held_fill(w, out))
        return w;
    trial_held_free(w);
    return NULL;
}

void trial_held_free(struct trial_held *w) {
    if (!w)
        return;
    free(w->record);
    free(w->expert);
    free(w->bias);
    free(w->shared);
    free(w->router);
    free(w->router_bias);
    free(w->correction);
    free(w->shared_gate);
    free(w);
}
