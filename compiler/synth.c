/* Made-up loads that look like recorded ones: other experts are hot in every layer, every layer
 * has the same sum, and what is hot may change over time.
 *
 * In recordings of DeepSeek-V3 and V2-Lite the logarithm of an expert's load has a standard
 * deviation of 0.6 to 0.7 over the experts of a layer, 0.4 to 0.9 in single layers, and the
 * hottest expert 3 to 10 times the mean; that is the default. Only +, -, *, / and sqrt decide,
 * which IEEE 754 defines to the last bit, so every machine makes the same tokens. */
#include "loads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOPICS = 4 };

const char *const synth_kind_names[SYNTH_KIND_COUNT] = {
#define X(name) #name,
    SYNTH_KINDS(X)
#undef X
};

static const double usual_skew[SYNTH_KIND_COUNT] = {0.5, 0.65, 0.65, 0.65};
static const double topics_common = 0.2; /* of the variance of the log popularity */
static const double drift_kept = 0.9;    /* correlation of the log popularity between windows */

/* ---- arithmetic that is the same everywhere ---- */

static const double ln2 = 0.693147180559945309417232121458;

static double exp_same(double x) {
    double n = floor(x / ln2 + 0.5), r = x - n * ln2, term = 1, sum = 1;
    for (int i = 1; i < 20; i++) {
        term = term * r / i;
        sum += term;
    }
    return ldexp(sum, (int)n);
}

static double log_same(double x) {
    int e;
    double m = frexp(x, &e), s = (m - 1) / (m + 1), square = s * s, power = s, sum = 0;
    for (int i = 1; i < 60; i += 2) { /* |s| <= 1/3 */
        sum += power / i;
        power *= square;
    }
    return 2 * sum + e * ln2;
}

/* splitmix64 */
static uint64_t next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Within (0, 1). */
static double uniform(uint64_t *state) {
    return ((double)(next(state) >> 12) + 0.5) / 4503599627370496.0;
}

/* Marsaglia's polar method. */
static double normal(uint64_t *state) {
    for (;;) {
        double u = 2 * uniform(state) - 1, v = 2 * uniform(state) - 1, s = u * u + v * v;
        if (s > 0 && s < 1)
            return u * sqrt(-2 * log_same(s) / s);
    }
}

/* ---- popularity of one layer ---- */

struct layer {
    const struct synth *s;
    uint64_t state;
    double sigma;
    double *popularity; /* [E], of the window at hand */
    double *log;        /* [E] drift: log popularity over sigma; mixture: [TOPICS][E] */
    double *tokens;     /* [E] */
    int *order;         /* [E] */
};

static void shuffle(struct layer *l) {
    for (int i = 0; i < l->s->experts; i++)
        l->order[i] = i;
    for (int i = l->s->experts - 1; i > 0; i--) {
        int j = (int)(next(&l->state) % (uint64_t)(i + 1)), swap = l->order[i];
        l->order[i] = l->order[j];
        l->order[j] = swap;
    }
}

static void first_zipf(struct layer *l) {
    shuffle(l);
    for (int i = 0; i < l->s->experts; i++)
        l->popularity[l->order[i]] = exp_same(-l->sigma * log_same(i + 1));
}

static void first_log(struct layer *l) {
    for (int e = 0; e < l->s->experts; e++)
        l->log[e] = normal(&l->state);
}

/* What topics have in common is little: recordings of law, summaries and translations by one model
 * correlate by 0.1 to 0.2. */
static void first_topics(struct layer *l) {
    int experts = l->s->experts;
    double own = sqrt(1 - topics_common);
    for (int e = 0; e < experts; e++) {
        double common = sqrt(topics_common) * normal(&l->state);
        for (int t = 0; t < TOPICS; t++)
            l->log[t * experts + e] = common + own * normal(&l->state);
    }
}

static void walk(struct layer *l) {
    double fresh = sqrt(1 - drift_kept * drift_kept);
    for (int e = 0; e < l->s->experts; e++)
        l->log[e] = drift_kept * l->log[e] + fresh * normal(&l->state);
}

static void popularity_of_log(struct layer *l) {
    for (int e = 0; e < l->s->experts; e++)
        l->popularity[e] = exp_same(l->sigma * l->log[e]);
}

/* How much of each topic a window holds: the same in every layer, and one or two outweigh. */
static void mix_topics(struct layer *l, int window) {
    uint64_t state = l->s->seed ^ (uint64_t)(window + 1) * 0xd1342543de82ef95;
    int experts = l->s->experts;
    memset(l->popularity, 0, sizeof(double) * (size_t)experts);
    for (int t = 0; t < TOPICS; t++) {
        double x = -log_same(uniform(&state)), part = x * x * x, sum = 0;
        for (int e = 0; e < experts; e++)
            sum += l->tokens[e] = exp_same(l->sigma * l->log[t * experts + e]);
        for (int e = 0; e < experts; e++)
            l->popularity[e] += part * l->tokens[e] / sum;
    }
}

static void first_window(struct layer *l) {
    switch (l->s->kind) {
    case SYNTH_zipf:
        first_zipf(l);
        break;
    case SYNTH_mixture:
        first_topics(l);
        break;
    default:
        first_log(l);
        popularity_of_log(l);
    }
}

static void next_window(struct layer *l, int window) {
    if (l->s->kind == SYNTH_mixture) {
        mix_topics(l, window);
    } else if (l->s->kind == SYNTH_drift && window) {
        walk(l);
        popularity_of_log(l);
    }
}

/* ---- tokens of one window ---- */

/* The popularity's shares of the total, none above tokens: an expert gets a token once. */
static void spread(struct layer *l, const double *weight) {
    double cap = (double)l->s->tokens, left = cap * l->s->top_k, sum;
    int experts = l->s->experts, capped;
    for (int e = 0; e < experts; e++)
        l->tokens[e] = -1;
    do {
        capped = 0;
        sum = 0;
        for (int e = 0; e < experts; e++)
            sum += l->tokens[e] < 0 ? weight[e] : 0;
        for (int e = 0; e < experts; e++)
            if (l->tokens[e] < 0 && weight[e] / sum * left > cap) {
                l->tokens[e] = cap;
                capped++;
            }
        left -= capped * cap;
    } while (capped);
    for (int e = 0; e < experts; e++)
        if (l->tokens[e] < 0)
            l->tokens[e] = weight[e] / sum * left;
}

/* A sample of so many tokens is never exactly its expectation. */
static void add_noise(struct layer *l, double *weight) {
    for (int e = 0; e < l->s->experts; e++) {
        double mean = l->tokens[e], drawn = mean + sqrt(mean) * normal(&l->state);
        weight[e] = drawn > mean / 100 ? drawn : mean / 100;
    }
}

struct part {
    double fraction;
    int expert;
};

static int by_fraction(const void *a, const void *b) {
    const struct part *x = a, *y = b;
    if (x->fraction != y->fraction)
        return x->fraction < y->fraction ? 1 : -1;
    return x->expert - y->expert;
}

/* Whole numbers with the same sum: the largest fractions are rounded up. */
static void round_tokens(struct layer *l, double *out) {
    struct part parts[LOADS_MAX_EXPERTS];
    double cap = (double)l->s->tokens;
    long long left = l->s->tokens * l->s->top_k;
    int experts = l->s->experts;
    for (int e = 0; e < experts; e++) {
        double whole = floor(l->tokens[e]);
        whole = whole > cap ? cap : whole;
        parts[e] = (struct part){l->tokens[e] - whole, e};
        out[e] = whole;
        left -= (long long)whole;
    }
    qsort(parts, (size_t)experts, sizeof *parts, by_fraction);
    while (left) /* once round, but for rounding errors in the shares */
        for (int i = 0; i < experts && left; i++) {
            double *x = &out[parts[i].expert];
            int step = left > 0 ? 1 : -1;
            if ((step > 0 && *x < cap) || (step < 0 && *x > 0)) {
                *x += step;
                left -= step;
            }
        }
}

static void run_layer(struct layer *l, int index, int windows, double *count) {
    const struct synth *s = l->s;
    size_t window = (size_t)s->num_layers * (size_t)s->experts;
    double skew = s->skew < 0 ? usual_skew[s->kind] : s->skew;
    l->state = s->seed * 0x2545f4914f6cdd1d + (uint64_t)index;
    next(&l->state);
    l->sigma = s->kind == SYNTH_zipf ? skew : skew * (0.75 + 0.5 * uniform(&l->state));
    first_window(l);
    for (int w = 0; w < windows; w++) {
        double *out = count + (size_t)w * window + (size_t)index * (size_t)s->experts;
        next_window(l, w);
        spread(l, l->popularity);
        add_noise(l, out);
        spread(l, out);
        round_tokens(l, out);
    }
}

void synth_run(const struct synth *s, int windows, double *count) {
    struct arena a = {0};
    struct layer l = {.s = s,
                      .popularity = arena_array(&a, double, s->experts),
                      .log = arena_array(&a, double, TOPICS * s->experts),
                      .tokens = arena_array(&a, double, s->experts),
                      .order = arena_array(&a, int, s->experts)};
    for (int i = 0; i < s->num_layers; i++)
        run_layer(&l, i, windows, count);
    arena_free(&a);
}
