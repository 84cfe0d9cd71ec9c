/* A naive MoE layer from the published arithmetic: see reference.h. */
#include "reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Eight running sums, so that the compiler may overlap them; the order is fixed. */
static double dot(const float *a, const float *b, int n) {
    double s[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            s[j] += (double)a[i + j] * b[i + j];
    for (; i < n; i++)
        s[0] += (double)a[i] * b[i];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static double sigmoid(double v) {
    return 1.0 / (1.0 + exp(-v));
}

float ref_bf16(float v) {
    unsigned u;
    memcpy(&u, &v, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        u |= 0x400000u; /* NaN stays NaN */
    else
        u += 0x7fffu + (u >> 16 & 1);
    u &= 0xffff0000u;
    memcpy(&v, &u, 4);
    return v;
}

float ref_e4m3(float v) {
    float size = fabsf(v);
    if (isnan(v))
        return v;
    if (size > 448)
        size = 448;
    int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
    float step = ldexpf(1, exponent - 3); /* three bits behind the leading one */
    return copysignf(rintf(size / step) * step, v);
}

float ref_of_e4m3(unsigned char bits) {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float size = exponent ? ldexpf(1 + (float)mantissa / 8, exponent - 7)
                          : ldexpf((float)mantissa / 8, -6);
    if (exponent == 15 && mantissa == 7)
        size = NAN;
    return bits & 0x80 ? -size : size;
}

void ref_quantise(float *v, int n) {
    for (int first = 0; first < n; first += 128) {
        int end = first + 128 < n ? first + 128 : n;
        float largest = 0;
        for (int i = first; i < end; i++)
            largest = isnan(v[i]) || fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
        float scale = largest / 448;
        if (scale < 1e-30f)
            scale = 1e-30f;
        for (int i = first; i < end; i++)
            v[i] = ref_e4m3(v[i] / scale) * scale;
    }
}

void ref_logits(const struct ref_layer *l, const float *x, int tokens, double *logits) {
    int h = l->shape->hidden, e = l->shape->experts;
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < e; i++)
            logits[(size_t)t * e + i] = dot(x + (size_t)t * h, l->router + (size_t)i * h, h) +
                                        (l->router_bias ? l->router_bias[i] : 0.0);
}

/* ---- routing ---- */

/* One token's decision under way. */
struct decision {
    const struct ref_layer *l;
    int token;
    double *logit;  /* [E] as the method sees them */
    double *score;  /* [E] s or p: what weights are made of */
    double *choice; /* [E] what is compared; -inf: not to be had */
    double margin;
    int *idx;
    float *weight;
};

/* The highest choice, ties to the lowest id; -1 when nothing is left. A NaN is not to be had. */
static int best_of(const double *choice, int n) {
    int best = -1;
    for (int i = 0; i < n; i++)
        if (choice[i] > -INFINITY && (best < 0 || choice[i] > choice[best]))
            best = i;
    return best;
}

/* The lowest of the ids that are not among idx[0..n): what is chosen when only NaN is left. */
static int lowest_free(const int *idx, int n) {
    int id = 0;
    for (int j = 0; j < n; j++)
        if (idx[j] == id) {
            id++;
            j = -1;
        }
    return id;
}

/* Notes how clearly a stood against b. Equal logits are equal in any arithmetic, and so are
 * sigmoids beyond 18, which are 1 in fp32, and masked groups at 0. */
static void note_gap(struct decision *d, int a, int b) {
    if (b < 0 || d->logit[a] == d->logit[b])
        return;
    double gap = d->choice[a] - d->choice[b];
    bool saturated = d->l->shape->sigmoid && d->logit[a] > 18 && d->logit[b] > 18;
    if (gap == 0 && (saturated || d->choice[a] == 0))
        return;
    d->margin = fmin(d->margin, gap / fmax(fabs(d->choice[a]), fabs(d->choice[b])));
}

static void top_k(struct decision *d) {
    int e = d->l->shape->experts;
    for (int j = 0; j < d->l->shape->topk; j++) {
        int best = best_of(d->choice, e);
        d->idx[j] = best < 0 ? lowest_free(d->idx, j) : best;
        if (best < 0)
            continue;
        double c = d->choice[best];
        d->choice[best] = -INFINITY;
        int next = best_of(d->choice, e);
        d->choice[best] = c;
        note_gap(d, best, next);
        d->choice[best] = -INFINITY;
    }
}

/* score = softmax of the logits, those at -inf left out. */
static void softmax(const double *logit, int n, double *score) {
    int best = best_of(logit, n);
    double max = best < 0 ? 0 : logit[best], sum = 0;
    for (int i = 0; i < n; i++)
        sum += score[i] = exp(logit[i] - max);
    for (int i = 0; i < n; i++)
        score[i] /= sum;
}

static void weigh(struct decision *d, bool normalise, double eps, double scale) {
    int k = d->l->shape->topk;
    double sum = 0;
    for (int j = 0; j < k; j++)
        sum += d->score[d->idx[j]];
    for (int j = 0; j < k; j++) {
        double w = d->score[d->idx[j]];
        d->weight[j] = (float)((normalise ? w / (sum + eps) : w) * scale);
    }
}

static void route_softmax_topk(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    softmax(d->logit, c->experts, d->score);
    memcpy(d->choice, d->logit, sizeof(double) * (size_t)c->experts);
    top_k(d);
    weigh(d, c->norm_topk_prob, 0, c->scale);
}

static void route_topk_softmax(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    memcpy(d->choice, d->logit, sizeof(double) * (size_t)c->experts);
    top_k(d);
    for (int i = 0; i < c->experts; i++)
        d->score[i] = exp(d->logit[i] - d->logit[d->idx[0]]);
    weigh(d, true, 0, 1);
}

static void route_llama4(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    memcpy(d->choice, d->logit, sizeof(double) * (size_t)c->experts);
    top_k(d);
    for (int i = 0; i < c->experts; i++)
        d->score[i] = sigmoid(d->logit[i]);
    weigh(d, false, 0, 1);
}

/* The choice is made on fp32 scores plus fp32 bias: that is where saturated scores tie. */
static void score_biased(struct decision *d) {
    const struct ref_layer *l = d->l;
    int e = l->shape->experts;
    if (l->shape->sigmoid)
        for (int i = 0; i < e; i++)
            d->score[i] = sigmoid(d->logit[i]);
    else
        softmax(d->logit, e, d->score);
    for (int i = 0; i < e; i++)
        d->choice[i] = (float)d->score[i] + (l->correction_bias ? l->correction_bias[i] : 0.0f);
}

/* A group's score: the sum, in fp32, of its two highest choices, or the highest alone. */
static double group_score(double *choice, int size, bool best_alone) {
    int first = best_of(choice, size);
    if (first < 0)
        return -INFINITY;
    double a = choice[first];
    if (best_alone)
        return a;
    choice[first] = -INFINITY;
    int second = best_of(choice, size);
    double b = second < 0 ? -INFINITY : choice[second];
    choice[first] = a;
    return (float)a + (float)b;
}

/* Whether two groups are equal number for number, so that their scores tie in any arithmetic.
 */
static bool same_group(const struct decision *d, int a, int b, int size) {
    return !memcmp(d->logit + (size_t)a * size, d->logit + (size_t)b * size,
                   sizeof(double) * (size_t)size) &&
           !memcmp(d->choice + (size_t)a * size, d->choice + (size_t)b * size,
                   sizeof(double) * (size_t)size);
}

static void keep_groups(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    int size = c->experts / c->n_group;
    double *score = malloc(sizeof *score * (size_t)c->n_group);
    bool *kept = calloc((size_t)c->n_group, sizeof *kept);
    if (!score || !kept)
        abort();
    for (int g = 0; g < c->n_group; g++)
        score[g] = group_score(d->choice + (size_t)g * size, size, c->group_best);
    for (int j = 0; j < c->topk_group; j++) {
        int g = best_of(score, c->n_group);
        for (int i = 0; g < 0; i++) /* only NaN is left: the lowest */
            g = kept[i] ? -1 : i;
        double best = score[g];
        kept[g] = true;
        score[g] = -INFINITY;
        int next = best_of(score, c->n_group);
        /* which groups are kept matters, their order does not */
        if (next >= 0 && j == c->topk_group - 1 && !same_group(d, g, next, size))
            d->margin = fmin(d->margin, (best - score[next]) / fmax(fabs(best), 1e-30));
    }
    for (int i = 0; i < c->experts; i++)
        if (!kept[i / size])
            d->choice[i] = c->mask_zero ? 0 : -INFINITY;
    free(score);
    free(kept);
}

static void route_deepseek_v3(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    score_biased(d);
    if (c->n_group > 1)
        keep_groups(d);
    top_k(d);
    weigh(d, c->norm_topk_prob, 1e-20, c->scale);
}

static void route_minimax2(struct decision *d) {
    score_biased(d);
    top_k(d);
    weigh(d, true, 0, 1);
}

/* SparseMixer without its training noise (Liu et al. 2023, as Phi-3.5-MoE evaluates it): twice
 * the highest logit, weighed by a softmax over those within a relative 2*eps of it. The divisor
 * is max(|logit|, highest). */
static void route_sparse_mixer(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    int e = c->experts;
    double *left = d->choice;
    memcpy(left, d->logit, sizeof(double) * (size_t)e);
    for (int j = 0; j < c->topk; j++) {
        int best = best_of(left, e);
        if (best < 0)
            best = lowest_free(d->idx, j);
        double max = left[best], sum = 0;
        for (int i = 0; i < e; i++) {
            double far = (max - d->logit[i]) / fmax(fabs(d->logit[i]), max);
            if (i != best && left[i] > -INFINITY)
                d->margin = fmin(d->margin, fabs(far - 2.0 * c->jitter));
            if (left[i] > -INFINITY && !(far > 2.0 * c->jitter))
                sum += exp(d->logit[i] - max);
        }
        d->idx[j] = best;
        d->weight[j] = (float)(1 / sum);
        left[best] = -INFINITY;
        int next = best_of(left, e);
        if (next >= 0 && d->logit[next] != max)
            d->margin = fmin(d->margin, (max - d->logit[next]) / fmax(fabs(max), 1e-30));
    }
}

static void route_static(struct decision *d) {
    for (int j = 0; j < d->l->shape->topk; j++) {
        d->idx[j] = d->l->static_experts[j];
        d->weight[j] = 1;
    }
}

static void route_balanced(struct decision *d) {
    const struct moe_plan_class *c = d->l->shape;
    for (int j = 0; j < c->topk; j++) {
        d->idx[j] = (int)(((long long)d->token * c->topk + j) % c->experts);
        d->weight[j] = 1;
    }
}

static void (*const routers[MOE_ROUTER_COUNT])(struct decision *) = {
    [MOE_ROUTER_SOFTMAX_TOPK] = route_softmax_topk,
    [MOE_ROUTER_TOPK_SOFTMAX] = route_topk_softmax,
    [MOE_ROUTER_DEEPSEEK_V3] = route_deepseek_v3,
    [MOE_ROUTER_LLAMA4] = route_llama4,
    [MOE_ROUTER_MINIMAX2] = route_minimax2,
    [MOE_ROUTER_SPARSE_MIXER] = route_sparse_mixer,
    [MOE_ROUTER_STATIC] = route_static,
    [MOE_ROUTER_BALANCED] = route_balanced,
};

static bool needs_logits(const struct moe_plan_class *c) {
    return c->router != MOE_ROUTER_STATIC && c->router != MOE_ROUTER_BALANCED;
}

static void route(const struct ref_layer *l, const double *logits, int tokens, int *idx,
                  float *weight, double *margin) {
    int e = l->shape->experts, k = l->shape->topk;
    double *scratch = malloc(sizeof(double) * 3 * (size_t)e);
    if (!scratch)
        abort();
    for (int t = 0; t < tokens; t++) {
        struct decision d = {.l = l,
                             .token = t,
                             .logit = scratch,
                             .score = scratch + e,
                             .choice = scratch + 2 * e,
                             .margin = INFINITY,
                             .idx = idx + (size_t)t * k,
                             .weight = weight + (size_t)t * k};
        for (int i = 0; i < e && needs_logits(l->shape); i++) {
            double v = logits[(size_t)t * e + i];
            d.logit[i] = l->shape->logits_bf16 ? ref_bf16((float)v) : v;
        }
        routers[l->shape->router](&d);
        if (margin)
            margin[t] = d.margin;
    }
    free(scratch);
}

void ref_route(const struct ref_layer *l, const double *logits, int tokens, int *idx,
               float *weight) {
    route(l, logits, tokens, idx, weight, NULL);
}

void ref_margin(const struct ref_layer *l, const double *logits, int tokens, double *margin) {
    size_t n = (size_t)tokens * (size_t)l->shape->topk;
    int *idx = malloc(sizeof *idx * (n ? n : 1));
    float *weight = malloc(sizeof *weight * (n ? n : 1));
    if (!idx || !weight)
        abort();
    route(l, logits, tokens, idx, weight, margin);
    free(idx);
    free(weight);
}

/* ---- experts ---- */

static double activate(const struct moe_plan_class *c, double g, double u) {
    switch ((enum moe_activation)c->activation) {
    case MOE_ACT_SWIGLU:
        return g * sigmoid(g) * u;
    case MOE_ACT_SWIGLU_OAI:
        g = fmin(g, c->act_limit);
        u = fmax(fmin(u, c->act_limit), -c->act_limit);
        return g * sigmoid(c->act_alpha * g) * (u + 1);
    case MOE_ACT_GEGLU:
        return 0.5 * g * (1 + erf(g * M_SQRT1_2)) * u;
    case MOE_ACT_GEGLU_TANH:
        return 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    case MOE_ACT_RELU2:
        return u > 0 ? u * u : 0;
    case MOE_ACT_COUNT:
        break;
    }
    abort();
}

/* What lies between the products of an fp8 expert, in fp32 and then in e4m3. */
static void quantise_hidden(double *act, int n) {
    float block[128];
    for (int first = 0; first < n; first += 128) {
        int count = n - first < 128 ? n - first : 128;
        for (int i = 0; i < count; i++)
            block[i] = (float)act[first + i];
        ref_quantise(block, count);
        for (int i = 0; i < count; i++)
            act[first + i] = block[i];
    }
}

/* y[H] += scale * expert(in_scale * x). act: scratch of I doubles. */
static void run_expert(const struct moe_plan_class *c, const struct ref_expert *e, int inter,
                       const float *x, double in_scale, double scale, double *act, double *y) {
    int h = c->hidden;
    for (int i = 0; i < inter; i++) {
        double g = 0, u = in_scale * dot(x, e->up + (size_t)i * h, h);
        if (e->gate)
            g = in_scale * dot(x, e->gate + (size_t)i * h, h);
        if (e->gate_bias)
            g += e->gate_bias[i];
        if (e->up_bias)
            u += e->up_bias[i];
        act[i] = activate(c, g, u);
    }
    if (moe_is_fp8(c))
        quantise_hidden(act, inter);
    for (int r = 0; r < h; r++) {
        const float *row = e->down + (size_t)r * inter;
        double s[4] = {0};
        for (int i = 0; i < inter; i++)
            s[i & 3] += act[i] * row[i];
        double v = (s[0] + s[1]) + (s[2] + s[3]);
        y[r] += scale * (v + (e->down_bias ? e->down_bias[r] : 0));
    }
}

/* The gate reads x, the expert what experts see of it. */
static void run_shared(const struct ref_layer *l, const float *x, const float *seen, int tokens,
                       double *act, double *out) {
    int h = l->shape->hidden;
    for (int t = 0; t < tokens && l->shared.up; t++) {
        size_t at = (size_t)t * h;
        double scale = l->shared_gate ? sigmoid(dot(x + at, l->shared_gate, h)) : 1;
        run_expert(l->shape, &l->shared, l->shape->shared_inter, seen + at, 1, scale, act,
                   out + at);
    }
}

static bool run_routed(const struct ref_layer *l, const float *x, int tokens, const int *idx,
                       const float *weight, double *act, double *out) {
    const struct moe_plan_class *c = l->shape;
    int h = c->hidden, k = c->topk;
    bool ok = true;
    for (int e = 0; e < c->experts && ok; e++) {
        struct ref_expert w = {0};
        for (int n = 0; n < tokens * k && ok; n++) {
            if (idx[n] != e)
                continue;
            if (!w.up)
                ok = l->expert(l->user, e, &w);
            if (ok)
                run_expert(c, &w, c->inter, x + (size_t)(n / k) * h,
                           c->input_weight ? weight[n] : 1, c->input_weight ? 1 : weight[n],
                           act, out + (size_t)(n / k) * h);
        }
    }
    return ok;
}

bool ref_experts(const struct ref_layer *l, const float *x, int tokens, const int *idx,
                 const float *weight, double *out) {
    const struct moe_plan_class *c = l->shape;
    size_t h = (size_t)c->hidden, n = (size_t)tokens * h;
    int widest = c->inter > c->shared_inter ? c->inter : c->shared_inter;
    double *act = malloc(sizeof *act * (size_t)widest);
    float *seen = malloc(sizeof *seen * (n + 1));
    bool ok = act && seen;
    for (size_t i = 0; ok && i < n; i++) {
        seen[i] = x[i];
        out[i] = 0;
    }
    for (int t = 0; ok && moe_is_fp8(c) && t < tokens; t++)
        ref_quantise(seen + (size_t)t * h, c->hidden);
    ok = ok && run_routed(l, seen, tokens, idx, weight, act, out);
    if (ok)
        run_shared(l, x, seen, tokens, act, out);
    free(act);
    free(seen);
    return ok;
}

double ref_rel_l2(const float *a, const double *b, long long n) {
    double diff = 0, norm = 0;
    for (long long i = 0; i < n; i++) {
        diff += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return norm > 0 ? sqrt(diff / norm) : diff > 0 ? INFINITY : sqrt(diff);
}

double ref_difference(const float *a, const double *b, long long n) {
    double diff = 0, norms = 0; /* 1 - 2ab / (aa + bb) is |a-b|^2 over the two norms */
    for (long long i = 0; i < n; i++) {
        diff += (a[i] - b[i]) * (a[i] - b[i]);
        norms += (double)a[i] * a[i] + b[i] * b[i];
    }
    return norms > 0 ? diff / norms : diff; /* NaN stays */
}

/* ---- random weights ---- */

struct ref_random {
    struct moe_plan_class shape;
    unsigned long long seed;
    int layer;
    int cached; /* expert in .now, -1 none */
    float *expert, *expert_bias, *shared;
    float *router, *router_bias, *correction, *gate;
    struct ref_expert now;
};

static unsigned long long tensor_seed(const struct ref_random *r, int tensor) {
    return moe_tensor_seed(r->seed, r->layer, tensor);
}

static float *vector(const struct ref_random *r, int tensor, size_t n, float scale) {
    float *v = malloc(sizeof *v * n);
    for (size_t i = 0; v && i < n; i++)
        v[i] = moe_random_value(tensor_seed(r, tensor), i) * scale;
    return v;
}

static bool gated(const struct moe_plan_class *c) {
    return c->activation != MOE_ACT_RELU2;
}

/* Row of the plain [gate; up] pair that packed row p is: gate rows 0..I-1, up rows I..2I-1;
 * without a gate, up rows 0..I-1. */
static size_t unpacked_row(const struct moe_plan_class *c, size_t p, size_t inter) {
    return gated(c) ? p / 16 * 8 + p % 8 + (p % 16 < 8 ? 0 : inter) : p;
}

static int blocks(size_t n) {
    return (int)((n + 127) / 128);
}

/* Element i of packed row p of w1 in the order of its scales: [blocks of rows][gate, up][blocks of
 * columns]. */
static size_t first_scale(const struct moe_plan_class *c, size_t p, size_t i) {
    size_t row = gated(c) ? p / 16 * 8 + p % 8 : p, matrices = gated(c) ? 2 : 1;
    size_t up = gated(c) && p % 16 >= 8;
    return (row / 128 * matrices + up) * (size_t)blocks((size_t)c->hidden) + i / 128;
}

/* Element i of a tensor as a record holds it; `block` is its scale's index. */
static float weight_value(const struct ref_random *r, unsigned long long seed, size_t i,
                          size_t block, float scale) {
    float v = moe_random_value(seed, i);
    if (!moe_is_fp8(&r->shape))
        return ref_bf16(v * scale);
    return ref_e4m3(v * 128) * (moe_random_scale(moe_scale_seed(seed), block) * scale);
}

/* Fills w with [gate,] up, down rows of one expert; first and second are its tensors. */
static void fill_expert(const struct ref_random *r, int first, int second, size_t inter,
                        float *w, struct ref_expert *out) {
    const struct moe_plan_class *c = &r->shape;
    size_t h = (size_t)c->hidden, rows = gated(c) ? 2 * inter : inter;
    unsigned long long s1 = tensor_seed(r, first), s2 = tensor_seed(r, second);
    float scale1 = (float)(1 / sqrt((double)h)), scale2 = (float)(1 / sqrt((double)inter));
    for (size_t p = 0; p < rows; p++) {
        float *row = w + unpacked_row(c, p, inter) * h;
        for (size_t i = 0; i < h; i++)
            row[i] = weight_value(r, s1, p * h + i, first_scale(c, p, i), scale1);
    }
    for (size_t i = 0; i < h * inter; i++) {
        size_t block = i / inter / 128 * (size_t)blocks(inter) + i % inter / 128;
        w[rows * h + i] = weight_value(r, s2, i, block, scale2);
    }
    out->gate = gated(c) ? w : NULL;
    out->up = gated(c) ? w + inter * h : w;
    out->down = w + rows * h;
}

static void fill_biases(struct ref_random *r, int e) {
    const struct moe_plan_class *c = &r->shape;
    size_t inter = (size_t)c->inter, h = (size_t)c->hidden, rows = gated(c) ? 2 * inter : inter;
    unsigned long long s1 = tensor_seed(r, MOE_TENSOR_EXPERT + 4 * e + 2);
    unsigned long long s2 = tensor_seed(r, MOE_TENSOR_EXPERT + 4 * e + 3);
    float *b = r->expert_bias;
    for (size_t p = 0; p < rows; p++)
        b[unpacked_row(c, p, inter)] = moe_random_value(s1, p) * 0.05f;
    for (size_t i = 0; i < h; i++)
        b[rows + i] = moe_random_value(s2, i) * 0.05f;
    r->now.gate_bias = gated(c) ? b : NULL;
    r->now.up_bias = gated(c) ? b + inter : b;
    r->now.down_bias = b + rows;
}

/* Experts are made when asked for: a big model's do not fit in memory together. */
static bool random_expert(void *user, int e, struct ref_expert *out) {
    struct ref_random *r = user;
    const struct moe_plan_class *c = &r->shape;
    if (!r->expert) {
        r->expert = malloc(sizeof(float) * 3 * (size_t)c->inter * (size_t)c->hidden);
        r->expert_bias = malloc(sizeof(float) * (2 * (size_t)c->inter + (size_t)c->hidden));
    }
    if (!r->expert || !r->expert_bias)
        return false;
    if (r->cached != e) {
        fill_expert(r, MOE_TENSOR_EXPERT + 4 * e, MOE_TENSOR_EXPERT + 4 * e + 1,
                    (size_t)c->inter, r->expert, &r->now);
        if (c->has_bias)
            fill_biases(r, e);
        r->cached = e;
    }
    *out = r->now;
    return true;
}

static bool random_small(struct ref_random *r, struct ref_layer *out) {
    const struct moe_plan_class *c = &r->shape;
    size_t h = (size_t)c->hidden, e = (size_t)c->experts, si = (size_t)c->shared_inter;
    float scale = (float)(1 / sqrt((double)h));
    out->router = r->router = vector(r, MOE_TENSOR_ROUTER, e * h, scale);
    if (c->has_router_bias)
        out->router_bias = r->router_bias = vector(r, MOE_TENSOR_ROUTER_BIAS, e, 0.05f);
    if (c->has_correction_bias)
        out->correction_bias = r->correction = vector(r, MOE_TENSOR_CORRECTION, e, 0.05f);
    if (c->shared_gate)
        out->shared_gate = r->gate = vector(r, MOE_TENSOR_SHARED_GATE, h, scale);
    if (si) {
        r->shared = malloc(sizeof(float) * 3 * si * h);
        if (r->shared)
            fill_expert(r, MOE_TENSOR_SHARED_W1, MOE_TENSOR_SHARED_W2, si, r->shared,
                        &out->shared);
    }
    return r->router && (r->router_bias || !c->has_router_bias) &&
           (r->correction || !c->has_correction_bias) && (r->gate || !c->shared_gate) &&
           (r->shared || !si);
}

struct ref_random *ref_random_layer(const struct moe_plan_class *c, unsigned long long seed,
                                    int layer, struct ref_layer *out) {
    struct ref_random *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->shape = *c;
    r->seed = seed;
    r->layer = layer;
    r->cached = -1;
    *out = (struct ref_layer){.shape = &r->shape, .expert = random_expert, .user = r};
    if (random_small(r, out))
        return r;
    ref_random_free(r);
    return NULL;
}

void ref_random_free(struct ref_random *r) {
    if (!r)
        return;
    free(r->expert);
    free(r->expert_bias);
    free(r->shared);
    free(r->router);
    free(r->router_bias);
    free(r->correction);
    free(r->gate);
    free(r);
}
