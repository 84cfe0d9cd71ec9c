#include "trial.h"

#include <math.h>
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
    s->x = malloc(4 * m * h);
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

static void compare_route(const struct trial *t, const struct ref_layer *ref, const int *sample,
                          int n, struct sampled *s, struct trial_error *e) {
    size_t k = (size_t)t->shape->topk;
    double unit = fmax(1, t->shape->scale);
    if (!t->logits)
        ref_logits(ref, s->x, n, s->logits);
    for (int i = 0; i < n; i++) {
        int *idx = s->idx + (size_t)i * k;
        float *weight = s->weight + (size_t)i * k;
        const int32_t *got = t->idx + (size_t)sample[i] * k;
        const float *got_weight = t->weight + (size_t)sample[i] * k;
        route_one(t, ref, sample[i], s->logits + (size_t)i * (size_t)t->shape->experts, idx,
                  weight);
        e->wrong_ids += memcmp(idx, got, 4 * k) != 0;
        for (size_t j = 0; j < k; j++) {
            double d = fabs((double)weight[j] - got_weight[j]) / unit;
            if (!(d <= e->weight_error)) /* NaN counts */
                e->weight_error = isnan(d) ? INFINITY : d;
        }
    }
}

bool trial_compare(const struct trial *t, const struct ref_layer *ref, enum trial_choice choice,
                   const int *sample, int n, struct trial_error *e) {
    size_t values = (size_t)n * (size_t)t->shape->hidden;
    struct sampled s = {0};
    bool ok = sampled_alloc(&s, t->shape, n);
    *e = (struct trial_error){.tokens = n};
    if (ok) {
        gather(t, sample, n, &s);
        if (choice == TRIAL_ROUTED)
            compare_route(t, ref, sample, n, &s, e);
        for (size_t i = 0; i < values; i++)
            s.x[i] = ref_bf16(s.x[i]); /* what the experts multiply */
        ok = ref_experts(ref, s.x, n, s.idx, s.weight, s.out);
    }
    if (ok)
        e->rel_l2 = ref_rel_l2(s.got, s.out, (long long)values);
    sampled_free(&s);
    return ok;
}

bool trial_passes(const struct trial_error *e) {
    return e->wrong_ids == 0 && e->weight_error <= 1e-6 && e->rel_l2 <= 4e-3;
}

int trial_sample(int tokens, int n, int *sample) {
    if (n > tokens)
        n = tokens;
    for (int i = 0; i < n; i++)
        sample[i] = n == 1 ? 0 : (int)((long long)i * (tokens - 1) / (n - 1));
    return n;
}
