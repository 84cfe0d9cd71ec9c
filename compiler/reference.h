/* A naive MoE layer: the published arithmetic in plain loops, fp32 inputs, fp64 sums. Written
 * from the models' papers and reference implementations, not from our kernels, and used by
 * `moec verify` and the tests as the thing to agree with. Knows no tiles, no packing, no ranks. */
#ifndef MOEC_REFERENCE_H
#define MOEC_REFERENCE_H

#include <stdbool.h>

#include "../runtime/bundle.h"

struct ref_expert {                               /* plain row-major fp32 */
    const float *gate;                            /* [I][H], NULL for relu2 */
    const float *up;                              /* [I][H] */
    const float *down;                            /* [H][I] */
    const float *gate_bias, *up_bias, *down_bias; /* [I] [I] [H], or NULL */
};
struct ref_layer {
    const struct moe_plan_class *shape; /* sizes, routing method, activation */
    const int *static_experts;          /* router static: k ids */
    const float *router;                /* [E][H] */
    const float *router_bias;           /* [E] or NULL */
    const float *correction_bias;       /* [E] or NULL */
    /* Fills *out with expert e's weights, valid until the next call. */
    bool (*expert)(void *user, int e, struct ref_expert *out);
    void *user;
    struct ref_expert shared; /* up NULL: none; sizes by shape->shared_inter */
    const float *shared_gate; /* [H] or NULL */
};

/* logits[T][E] = x[T][H] router^T + router_bias, in fp64. */
void ref_logits(const struct ref_layer *l, const float *x, int tokens, double *logits);
/* Scores, choice and weights from logits; static and balanced read no logits, and balanced counts
 * tokens from 0. Choices on scores (deepseek_v3, minimax2) compare the score rounded to fp32 plus
 * the fp32 bias, where saturated sigmoids tie; choices on logits compare the doubles. idx[T][k] in
 * order of choice (the highest first; ties to the lowest id), weight[T][k]. */
void ref_route(const struct ref_layer *l, const double *logits, int tokens, int *idx,
               float *weight);
/* How clearly each token's choice, and its order, stands: the smallest gap between two scores that
 * decided it, relative to the larger. Scores that tie in any arithmetic (equal logits, sigmoids
 * beyond fp32's reach) do not count. Below about 1e-5 an fp32 router may rightly differ. */
void ref_margin(const struct ref_layer *l, const double *logits, int tokens, double *margin);
/* out[T][H] from given choices; x is what the experts see (round it to bf16 first when the kernels
 * do). fp64 throughout, but for fp8 records: there x, and what lies between an expert's two
 * products, are rounded as the kernels quantise them (ref_quantise). false when the callback
 * failed. */
bool ref_experts(const struct ref_layer *l, const float *x, int tokens, const int *idx,
                 const float *weight, double *out);
/* Rounded to bf16, to nearest even. */
float ref_bf16(float v);
/* Rounded to e4m3, to nearest even; what lies beyond its largest number, 448, becomes that. */
float ref_e4m3(float v);
float ref_of_e4m3(unsigned char bits);
/* n numbers of a row to e4m3 and back, as DeepSeek-V3 quantises activations: every 128 share an
 * fp32 scale, their largest size / 448 (and at least 1e-30). */
void ref_quantise(float *v, int n);
/* ||a-b|| / ||b|| */
double ref_rel_l2(const float *a, const double *b, long long n);
/* 1 - 2ab / (aa + bb) */
double ref_difference(const float *a, const double *b, long long n);

/* Weights of `moert_layer_random` (templates/args.h) unpacked for the reference: what the kernels
 * multiply, bf16-rounded or e4m3 times its scale. free with ref_random_free. */
struct ref_random;
struct ref_random *ref_random_layer(const struct moe_plan_class *c, unsigned long long seed,
                                    int layer, struct ref_layer *out);
void ref_random_free(struct ref_random *r);

#endif
