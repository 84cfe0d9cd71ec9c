/* A trial: one forward of one layer on a device, on random or given activations, compared with
 * the reference. What `moec run`, `moec verify` and the layer tests have in common. */
#ifndef MOEC_TRIAL_H
#define MOEC_TRIAL_H

#include "../runtime/tool.h"
#include "moec.h"
#include "reference.h"

/* Margin (ref_margin) below which an fp32 router may rightly choose otherwise. */
#define TRIAL_MARGIN 1e-5

struct trial {
    moert_context *context;
    moert_layer *layer;
    const struct moe_plan_class *shape;
    int tokens;
    moert_io io; /* device pointers; rows beyond T are NaN in x and marked in the outputs */
    float *x;    /* [T][H], values that x_dtype holds */
    float *
        logits; /* [T][E] the caller's own, values that logits_dtype holds; NULL: the router's */
    int32_t *idx; /* [T][k] and [T][k]: what the device chose, or what it is given */
    float *weight;
    float *out; /* [T][H] */
};

/* Allocates for T tokens; x is random, a function of seed and layer number. The trial is closed
 * again on failure. */
moert_result trial_open(struct trial *t, moert_context *c, moert_layer *l,
                        const struct moe_plan_class *shape, int tokens, moert_dtype x_dtype,
                        moert_dtype out_dtype);
void trial_close(struct trial *t);
void trial_random_x(struct trial *t, unsigned long long seed, int layer);
/* Redraws the tokens among sample[n] whose choice is a near tie. */
void trial_settle(struct trial *t, const struct ref_layer *ref, unsigned long long seed,
                  const int *sample, int n);
/* Gives the layer logits instead of its router's; t->logits is then the caller's to fill. */
moert_result trial_use_logits(struct trial *t, moert_dtype dtype);
/* x, logits, and idx and weight to the device, outputs' rows marked. */
moert_result trial_upload(struct trial *t);
moert_result trial_download(struct trial *t);
/* Rows beyond T, in x or in an output, that a launch wrote to; after trial_download. */
bool trial_overran(const struct trial *t);

enum trial_choice {
    TRIAL_ROUTED,
    TRIAL_GIVEN
}; /* by the layer's router; by t->idx, t->weight */
struct trial_error {
    int tokens;    /* compared */
    int wrong_ids; /* tokens whose choice or its order differs */
    int near_ties; /* tokens that differ, but whose scores hardly do: not counted as wrong */
    double weight_error; /* highest |w - w'| / max(1, routed_scaling_factor) */
    double rel_l2;
    double difference; /* 1 - 2xy / (x^2 + y^2) */
    bool fp8;          /* the layer multiplies in fp8: difference is judged, else rel_l2 */
};
/* Compares the n sampled tokens, after trial_download; false when memory ran out. */
bool trial_compare(const struct trial *t, const struct ref_layer *ref, enum trial_choice choice,
                   const int *sample, int n, struct trial_error *e);
/* The figures that hold everywhere: ids exact, weights to 1e-6, and relative L2 at most 4e-3; in
 * fp8, where the reference quantises as the kernels do, a difference of at most 1e-4. */
bool trial_passes(const struct trial_error *e);
/* A line of text for people, without newline. */
void trial_describe(const struct trial_error *e, char *text, size_t size);
/* The same as members of a JSON object, from wrong_ids to passed; what is no number is null. */
void trial_json(const struct trial_error *e, struct buf *out);
/* How many tokens the reference affords within a few seconds. */
int trial_affordable(const struct moe_plan_class *c);
/* Up to n token numbers spread over 0..tokens-1, the first and the last among them. Returns how
 * many. */
int trial_sample(int tokens, int n, int *sample);

/* The weights a layer holds on its device, unpacked for the reference. NULL: memory ran out or
 * the runtime failed. */
struct trial_held;
struct trial_held *trial_held_open(moert_layer *l, const struct moe_plan_class *c,
                                   struct ref_layer *out);
void trial_held_free(struct trial_held *h);

#endif
