/* The reference against arithmetic done by hand, then every layer on the host device against the
 * reference. */
#include "layer_checks.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <criterion/redirect.h>
#include <getopt.h>
#include <sys/stat.h>

/* ---- routing by hand ---- */

struct hand {
    struct moe_plan_class shape;
    struct ref_layer layer;
};

static void hand_open(struct hand *h, enum moe_router router, int experts, int topk) {
    *h = (struct hand){.shape = {.experts = experts,
                                 .topk = topk,
                                 .router = router,
                                 .n_group = 1,
                                 .topk_group = 1,
                                 .sigmoid = 1,
                                 .scale = 1}};
    h->layer.shape = &h->shape;
}

/* Routes one token and compares. */
static void hand_expect(struct hand *h, const double *logits, const int *idx,
                        const double *weight) {
    int got[32];
    float w[32];
    ref_route(&h->layer, logits, 1, got, w);
    for (int j = 0; j < h->shape.topk; j++) {
        cr_expect_eq(got[j], idx[j], "choice %d is %d, expected %d", j, got[j], idx[j]);
        cr_expect_float_eq(w[j], weight[j], 1e-7, "weight %d is %.9f, expected %.9f", j, w[j],
                           weight[j]);
    }
}
#define EXPECT(h, logits, ids, weights) \
    hand_expect((h), (const double[])logits, (const int[])ids, (const double[])weights)
#define L(...) \
    { __VA_ARGS__ }

Test(layer, softmax_topk_by_hand) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_SOFTMAX_TOPK, 4, 3);
    /* p = 1/8, 2/8, 4/8, 1/8; 0 and 3 tie */
    EXPECT(&h, L(log(1), log(2), log(4), log(1)), L(2, 1, 0), L(0.5, 0.25, 0.125));
    h.shape.norm_topk_prob = 1;
    EXPECT(&h, L(log(1), log(2), log(4), log(1)), L(2, 1, 0), L(4 / 7., 2 / 7., 1 / 7.));
    h.shape.scale = 3;
    EXPECT(&h, L(log(1), log(2), log(4), log(1)), L(2, 1, 0), L(12 / 7., 6 / 7., 3 / 7.));
    h.shape.scale = 1;
    EXPECT(&h, L(900, -900, 900, -900), L(0, 2, 1), L(0.5, 0.5, 0));
}

Test(layer, topk_softmax_by_hand) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_TOPK_SOFTMAX, 4, 2);
    EXPECT(&h, L(log(3), log(1), log(9), log(2)), L(2, 0), L(0.75, 0.25));
    EXPECT(&h, L(5, 5, 5, 5), L(0, 1), L(0.5, 0.5));
}

/* Users' activations may hold it: the reference must stay inside its arrays. */
Test(layer, nan_logits_choose_experts_that_exist) {
    double logits[2][8] = {{NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN},
                           {NAN, 1, NAN, -INFINITY, NAN, NAN, 3, 2}};
    for (int router = 0; router < MOE_ROUTER_COUNT; router++)
        for (int groups = 1; groups <= 4; groups *= 4)
            for (int i = 0; i < 2 && router != MOE_ROUTER_STATIC; i++) {
                struct hand h;
                int idx[2];
                float w[2];
                double margin;
                hand_open(&h, (enum moe_router)router, 8, 2);
                h.shape.n_group = groups;
                h.shape.topk_group = groups == 1 ? 1 : 2;
                ref_route(&h.layer, logits[i], 1, idx, w);
                ref_margin(&h.layer, logits[i], 1, &margin);
                for (int j = 0; j < 2; j++)
                    cr_expect(idx[j] >= 0 && idx[j] < 8, "%s: expert %d", router_names[router],
                              idx[j]);
                if (i == 1 && router == MOE_ROUTER_TOPK_SOFTMAX)
                    cr_expect(idx[0] == 6 && idx[1] == 7, "NaN is chosen last");
            }
}

Test(layer, router_bias_is_part_of_the_logits) {
    struct hand h;
    float router[] = {1, 0, 0, 1, 1, 1}, bias[] = {0.5f, 4, -1}, x[] = {2, 3};
    double logits[3];
    hand_open(&h, MOE_ROUTER_TOPK_SOFTMAX, 3, 1);
    h.shape.hidden = 2;
    h.layer.router = router;
    ref_logits(&h.layer, x, 1, logits);
    cr_expect(logits[0] == 2 && logits[1] == 3 && logits[2] == 5);
    h.layer.router_bias = bias;
    ref_logits(&h.layer, x, 1, logits);
    cr_expect(logits[0] == 2.5 && logits[1] == 7 && logits[2] == 4);
}

/* The logit of a sigmoid score of n/4. */
#define S1 (-log(3))
#define S2 0.0
#define S3 log(3)

Test(layer, deepseek_groups_by_hand) {
    struct hand h;
    float bias[8] = {0};
    hand_open(&h, MOE_ROUTER_DEEPSEEK_V3, 8, 3);
    h.shape.n_group = 4;
    h.shape.topk_group = 2;
    h.layer.correction_bias = bias;
    /* group sums 1, 1, 1.25, 0.75: groups 2 and 0 stay, though 2 (0.75) is in group 1 */
    double logits[] = {S2, S2, S3, S1, S3, S2, S2, S1};
    hand_expect(&h, logits, (int[]){4, 0, 1}, (double[]){0.75, 0.5, 0.5});
    h.shape.norm_topk_prob = 1;
    h.shape.scale = 2.5f;
    hand_expect(&h, logits, (int[]){4, 0, 1},
                (double[]){2.5 * 0.75 / 1.75, 2.5 * 0.5 / 1.75, 2.5 * 0.5 / 1.75});
    /* the bias chooses, the weight does not know it: sums 1, 1.5, 1.25, 0.75 */
    bias[3] = 0.5f;
    h.shape.norm_topk_prob = 0;
    h.shape.scale = 1;
    hand_expect(&h, logits, (int[]){2, 3, 4}, (double[]){0.75, 0.25, 0.75});
}

Test(layer, deepseek_masked_groups_by_hand) {
    struct hand h;
    float bias[4] = {-1, -1.25f, -2, -2};
    hand_open(&h, MOE_ROUTER_DEEPSEEK_V3, 4, 2);
    h.shape.n_group = 2;
    h.shape.topk_group = 1;
    h.layer.correction_bias = bias;
    EXPECT(&h, L(S2, S2, S1, S3), L(0, 1), L(0.5, 0.5));
    h.shape.mask_zero = 1; /* 0 beats every biased score */
    EXPECT(&h, L(S2, S2, S1, S3), L(2, 3), L(0.25, 0.75));
}

Test(layer, deepseek_best_of_group_by_hand) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_DEEPSEEK_V3, 6, 2);
    h.shape.sigmoid = 0;
    h.shape.n_group = 3;
    h.shape.topk_group = 1;
    /* p in sixteenths: 4 4, 6 1, 1 0; sums 8, 7, 1, but the best are 4, 6, 1 */
    double logits[] = {log(4), log(4), log(6), 0, 0, -800};
    hand_expect(&h, logits, (int[]){0, 1}, (double[]){0.25, 0.25});
    h.shape.group_best = 1;
    hand_expect(&h, logits, (int[]){2, 3}, (double[]){6 / 16., 1 / 16.});
}

Test(layer, deepseek_softmax_by_hand) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_DEEPSEEK_V3, 3, 2);
    h.shape.sigmoid = 0;
    h.shape.scale = 16;
    EXPECT(&h, L(log(1), log(5), log(2)), L(1, 2), L(10, 4));
}

/* NaN is never chosen before a number, and then from the lowest id on. */
static void expect_ids(struct hand *h, const double *logits, const int *idx) {
    int got[32];
    float w[32];
    double margin;
    ref_route(&h->layer, logits, 1, got, w);
    ref_margin(&h->layer, logits, 1, &margin);
    for (int j = 0; j < h->shape.topk; j++)
        cr_expect_eq(got[j], idx[j], "router %d: choice %d is %d, expected %d", h->shape.router,
                     j, got[j], idx[j]);
}

Test(layer, nan_is_chosen_last) {
    static const enum moe_router routers[] = {MOE_ROUTER_SOFTMAX_TOPK, MOE_ROUTER_TOPK_SOFTMAX,
                                              MOE_ROUTER_DEEPSEEK_V3,  MOE_ROUTER_LLAMA4,
                                              MOE_ROUTER_MINIMAX2,     MOE_ROUTER_SPARSE_MIXER};
    struct hand h;
    for (int i = 0; i < 6; i++)
        for (int groups = 1; groups <= (routers[i] == MOE_ROUTER_DEEPSEEK_V3 ? 2 : 1);
             groups++) {
            hand_open(&h, routers[i], 4, 2);
            h.shape.n_group = groups;
            expect_ids(&h, (double[])L(NAN, NAN, NAN, NAN), (int[])L(0, 1));
            if (groups == 1) /* two groups: neither has a score */
                expect_ids(&h, (double[])L(NAN, NAN, 1, NAN), (int[])L(2, 0));
        }
}

Test(layer, llama4_by_hand) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_LLAMA4, 3, 1);
    EXPECT(&h, L(S1, S3, S3), L(1), L(0.75));
}

Test(layer, minimax2_by_hand) {
    struct hand h;
    float bias[3] = {0, 0.5f, 0};
    hand_open(&h, MOE_ROUTER_MINIMAX2, 3, 2);
    h.layer.correction_bias = bias;
    /* choices 0.75, 0.25 + 0.5, 0.5: the first two tie */
    EXPECT(&h, L(S3, S1, S2), L(0, 1), L(0.75, 0.25));
}

Test(layer, sparse_mixer_by_hand) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_SPARSE_MIXER, 4, 2);
    h.shape.jitter = 0.01f;
    /* 9.9 lies 1 % below 10, 9 and 5 further than 2 %; then 9.9 is alone */
    EXPECT(&h, L(10, 9.9, 5, 9), L(0, 1), L(1 / (1 + exp(-0.1)), 1));
    /* below zero the divisor is the logit's own size */
    EXPECT(&h, L(-3, -1.01, -1, -1.025), L(2, 1),
           L(1 / (1 + exp(-0.01)), 1 / (1 + exp(-0.015))));
}

Test(layer, fixed_routers_by_hand) {
    struct hand h;
    int ids[] = {2, 0}, idx[6];
    float weight[6];
    hand_open(&h, MOE_ROUTER_STATIC, 3, 2);
    h.layer.static_experts = ids;
    hand_expect(&h, NULL, (int[]){2, 0}, (double[]){1, 1});
    hand_open(&h, MOE_ROUTER_BALANCED, 5, 2);
    ref_route(&h.layer, NULL, 3, idx, weight);
    cr_expect_arr_eq(idx, ((int[]){0, 1, 2, 3, 4, 0}), sizeof idx);
    cr_expect_float_eq(weight[5], 1, 0);
}

Test(layer, ties_of_the_number_format) {
    struct hand h;
    hand_open(&h, MOE_ROUTER_MINIMAX2, 3, 2);
    EXPECT(&h, L(-1, 25, 50), L(1, 2), L(0.5, 0.5)); /* both scores are 1 in fp32 */
    hand_open(&h, MOE_ROUTER_LLAMA4, 3, 1);
    EXPECT(&h, L(0, 1.001, 1.002), L(2), L(1 / (1 + exp(-1.002))));
    h.shape.logits_bf16 = 1; /* both logits are 1 in bf16 */
    EXPECT(&h, L(0, 1.001, 1.002), L(1), L(1 / (1 + exp(-1))));
}

Test(layer, margin_by_hand) {
    struct hand h;
    double margin;
    hand_open(&h, MOE_ROUTER_LLAMA4, 4, 2);
    ref_margin(&h.layer, (double[]){8, 10, 5, 4}, 1, &margin);
    cr_expect_float_eq(margin, 0.2, 1e-12); /* between the two chosen: their order counts */
    ref_margin(&h.layer, (double[]){8, 10, 7.999, 7.999}, 1, &margin);
    cr_expect_float_eq(margin, 0.001 / 8, 1e-12);
    ref_margin(&h.layer, (double[]){8, 10, 8, 8}, 1, &margin);
    cr_expect_float_eq(margin, 0.2, 1e-12); /* equal logits tie in any arithmetic */
}

/* ---- experts by hand ---- */

static bool hand_expert(void *user, int e, struct ref_expert *out) {
    *out = *(struct ref_expert *)user;
    return e == 1;
}

/* hidden 2, intermediate 1: gate reads x[0], up reads x[1], down writes (1, -2). */
static void expect_activation(enum moe_activation act, double g, double u, double y) {
    struct hand h;
    float gate[] = {1, 0}, up[] = {0, 1}, down[] = {1, -2}, x[] = {(float)g, (float)u},
          w = 0.5f;
    struct ref_expert e = {.gate = act == MOE_ACT_RELU2 ? NULL : gate, .up = up, .down = down};
    double out[2];
    int id = 1;
    hand_open(&h, MOE_ROUTER_SOFTMAX_TOPK, 2, 1);
    h.shape.hidden = 2;
    h.shape.inter = 1;
    h.shape.activation = (int)act;
    h.shape.act_alpha = 1.702f;
    h.shape.act_limit = 7;
    h.layer.expert = hand_expert;
    h.layer.user = &e;
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 0.5 * y, 1e-7 * fmax(1, fabs(y)),
                       "%s(%g, %g) = %.9f, expected %.9f", activation_names[act], g, u,
                       2 * out[0], y);
    cr_expect_float_eq(out[1], -y, 1e-7 * fmax(1, fabs(y)));
}

/* Values to nine digits from tables of exp and erf. */
Test(layer, activations_by_hand) {
    expect_activation(MOE_ACT_SWIGLU, 1, 2, 2 * 0.731058579);
    expect_activation(MOE_ACT_SWIGLU, -1, 3, -3 * 0.268941421);
    expect_activation(MOE_ACT_SWIGLU_OAI, 1, 2, 3 * 0.845795766);
    expect_activation(MOE_ACT_SWIGLU_OAI, 9, -9, 7 * 0.999993304 * -6);
    expect_activation(MOE_ACT_GEGLU, 1, 2, 2 * 0.841344746);
    expect_activation(MOE_ACT_GEGLU_TANH, 1, 2, 2 * 0.841191991);
    expect_activation(MOE_ACT_RELU2, 5, 3, 9);
    expect_activation(MOE_ACT_RELU2, 5, -3, 0);
}

Test(layer, biases_and_shared_expert_by_hand) {
    struct hand h;
    float one[] = {1, 1}, down[] = {1, -2}, x[] = {1, 2}, b[] = {0.5f, 1, 2, -1}, w = 2;
    float gate[] = {1, 0.0986122887f}; /* x . gate = 1 + 2 * 0.0986... = log 3.31 */
    struct ref_expert e = {.up = one, .down = down, .up_bias = b, .down_bias = b + 2};
    double out[2];
    int id = 1;
    hand_open(&h, MOE_ROUTER_SOFTMAX_TOPK, 2, 1);
    h.shape = (struct moe_plan_class){
        .hidden = 2, .inter = 1, .experts = 2, .topk = 1, .activation = MOE_ACT_RELU2};
    h.layer.shape = &h.shape;
    h.layer.expert = hand_expert;
    h.layer.user = &e;
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 2 * (12.25 + 2), 1e-9);
    cr_expect_float_eq(out[1], 2 * (-24.5 - 1), 1e-9);
    h.shape.input_weight = 1; /* the weight scales x, not the result */
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 6.5 * 6.5 + 2, 1e-9);
    h.shape.shared_inter = 1;
    h.layer.shared = (struct ref_expert){.up = one, .down = down};
    id = -1; /* an expert that is elsewhere adds nothing */
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 9, 1e-9);
    h.layer.shared_gate = gate;
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 9 * (exp(1.1972245774) / (1 + exp(1.1972245774))), 1e-6);
}

Test(layer, random_weights_are_the_formula) {
    struct moe_plan_class c = {.hidden = 32,
                               .inter = 16,
                               .experts = 3,
                               .topk = 1,
                               .has_bias = 1,
                               .activation = MOE_ACT_SWIGLU};
    struct ref_layer l;
    struct ref_expert e;
    struct ref_random *r = ref_random_layer(&c, 5, 9, &l);
    cr_assert(r && l.expert(l.user, 2, &e));
    int first = MOE_TENSOR_EXPERT + 4 * 2;
    unsigned long long w1 = moe_tensor_seed(5, 9, first), b1 = moe_tensor_seed(5, 9, first + 2);
    float scale = (float)(1 / sqrt(32));
    /* gate row 9 is packed row 17, up row 9 packed row 25 */
    cr_expect_eq(e.gate[9 * 32 + 3], ref_bf16(moe_random_value(w1, 17 * 32 + 3) * scale));
    cr_expect_eq(e.up[9 * 32 + 3], ref_bf16(moe_random_value(w1, 25 * 32 + 3) * scale));
    cr_expect_eq(e.gate_bias[9], moe_random_value(b1, 17) * 0.05f);
    cr_expect_eq(e.up_bias[9], moe_random_value(b1, 25) * 0.05f);
    cr_expect_eq(e.down[5],
                 ref_bf16(moe_random_value(moe_tensor_seed(5, 9, first + 1), 5) / 4));
    cr_expect_eq(l.router[40], moe_random_value(moe_tensor_seed(5, 9, 0), 40) * scale);
    ref_random_free(r);
}

Test(layer, bf16_rounds_to_nearest_even) {
    cr_expect_eq(ref_bf16(1.0f + 0x1p-8f), 1.0f);
    cr_expect_eq(ref_bf16(1.0f + 0x1.8p-7f), 1.0f + 0x1p-6f);
    cr_expect_eq(ref_bf16(1.0f + 0x1.8p-8f), 1.0f + 0x1p-7f);
    cr_expect(isnan(ref_bf16(NAN)));
    cr_expect_eq(ref_bf16(-INFINITY), -INFINITY);
}

/* ---- the host device ---- */

static const char *scratch(char *out, size_t size, const char *name) {
    const char *build = getenv("B");
    snprintf(out, size, "%s/layer/%s", build ? build : "build", name);
    return out;
}

/* Compiled hosts are kept from run to run. */
static void settings(void) {
    char cache[256];
    setenv("XDG_CACHE_HOME", scratch(cache, sizeof cache, "cache"), 1);
    setenv("MOERT_CXXFLAGS", "-O1", 0);
}

ParameterizedTestParameters(layer, host) {
    static int which[NUM_LAYER_CASES];
    for (int i = 0; i < NUM_LAYER_CASES; i++)
        which[i] = i;
    return cr_make_param_array(int, which, NUM_LAYER_CASES);
}

ParameterizedTest(int *which, layer, host, .init = settings) {
    const struct layer_case *c = &layer_cases[*which];
    char dir[256], bundle[512];
    struct env e = {0};
    cr_assert(compile_case(c, "host", scratch(dir, sizeof dir, "host"), bundle, sizeof bundle),
              "%s does not compile", c->name);
    bool ok = env_open(&e, bundle, MOERT_HOST, -1) && check_layer(&e, 3);
    cr_expect(ok, "%s: %s", c->name, e.why);
    env_close(&e);
}

/* ---- bundles and commands ---- */

#define COMMAND(name, ...) command(cmd_##name, (char *[]){#name, ##__VA_ARGS__, NULL})

static int command(int (*run)(int, char **), char **argv) {
    int argc = 0;
    while (argv[argc])
        argc++;
    optind = 0; /* getopt begins anew */
    int code = run(argc, argv);
    fflush(stdout);
    return code;
}

static const struct layer_case *case_named(const char *name) {
    for (int i = 0; i < NUM_LAYER_CASES; i++)
        if (!strcmp(layer_cases[i].name, name))
            return &layer_cases[i];
    return NULL;
}

/* A bundle of one case in a folder of its own. */
static void make_bundle(const char *name, const char *folder, char *bundle, size_t size) {
    char dir[256];
    cr_assert(
        compile_case(case_named(name), "host", scratch(dir, sizeof dir, folder), bundle, size));
}

/* ---- fp8 ---- */

Test(layer, e4m3_rounds_to_nearest_even) {
    cr_expect_eq(ref_e4m3(17), 16); /* between 16 and 18 */
    cr_expect_eq(ref_e4m3(19), 20);
    cr_expect_eq(ref_e4m3(-19), -20);
    cr_expect_eq(ref_e4m3(1e9f), 448);
    cr_expect_eq(ref_e4m3(0x1p-10f), 0); /* half of the smallest number */
    cr_expect_eq(ref_e4m3(0x1.8p-9f), 0x1p-8f);
    cr_expect_eq(ref_e4m3(0x1.1p-7f), 0x1p-7f);
    cr_expect(isnan(ref_e4m3(NAN)));
    for (int b = 0; b < 256; b++) {
        float v = ref_of_e4m3((unsigned char)b);
        cr_expect(isnan(v) ? (b & 0x7f) == 0x7f : ref_e4m3(v) == v, "%02x", b);
    }
    cr_expect_eq(ref_of_e4m3(0xb9), -1.125f);
    cr_expect_eq(ref_of_e4m3(0x7e), 448);
    cr_expect_eq(ref_of_e4m3(0x01), 0x1p-9f);
}

Test(layer, activations_are_quantised_by_128) {
    float v[131] = {[3] = -44.8f, [4] = 1.7f, [5] = 0.00005f, [129] = 3, [130] = 448};
    ref_quantise(v, 131);
    cr_expect_float_eq(v[3], -44.8f, 1e-5);
    cr_expect_float_eq(v[4], 1.6f, 1e-6); /* 17 tenths: 16 and 18 are as near */
    cr_expect_eq(v[5], 0);                /* a quarter of the smallest number */
    cr_expect_eq(v[129], 3);
    cr_expect_eq(v[130], 448);
    float zero[16] = {0};
    ref_quantise(zero, 16);
    for (int i = 0; i < 16; i++)
        cr_expect_eq(zero[i], 0);
}

/* By hand, hidden 2 and intermediate 1: x = (448, 19) becomes (448, 20), and the hidden value is
 * its own block's largest, which stays. */
Test(layer, fp8_experts_by_hand) {
    struct hand h;
    float up[] = {0.5f, 1}, down[] = {1, -2}, x[] = {448, 19}, w = 1;
    struct ref_expert e = {.up = up, .down = down};
    double out[2];
    int id = 1;
    hand_open(&h, MOE_ROUTER_SOFTMAX_TOPK, 2, 1);
    h.shape.hidden = 2;
    h.shape.inter = 1;
    h.shape.activation = MOE_ACT_RELU2;
    h.layer.expert = hand_expert;
    h.layer.user = &e;
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 243. * 243, 1e-6);
    h.shape.record_format = MOE_FORMAT_FP8_BLOCK;
    cr_assert(ref_experts(&h.layer, x, 1, &id, &w, out));
    cr_expect_float_eq(out[0], 244. * 244, 0.1);
    cr_expect_float_eq(out[1], -2 * 244. * 244, 0.1);
}

Test(layer, random_fp8_weights_are_the_formula) {
    struct moe_plan_class c = {.hidden = 272,
                               .inter = 144,
                               .experts = 3,
                               .topk = 1,
                               .activation = MOE_ACT_SWIGLU,
                               .record_format = MOE_FORMAT_FP8_BLOCK};
    struct ref_layer l;
    struct ref_expert e;
    struct ref_random *r = ref_random_layer(&c, 5, 9, &l);
    cr_assert(r && l.expert(l.user, 2, &e));
    unsigned long long w1 = moe_tensor_seed(5, 9, MOE_TENSOR_EXPERT + 8);
    float scale = (float)(1 / sqrt(272));
    /* row 130 is in the second block of rows, whose scales are 6 to 8 (gate) and 9 to 11 (up);
     * packed, gate row 130 is row 258 and up row 130 row 266 */
    float gate = ref_e4m3(128 * moe_random_value(w1, 258 * 272 + 200));
    float up = ref_e4m3(128 * moe_random_value(w1, 266 * 272 + 270));
    cr_expect_eq(e.gate[130 * 272 + 200],
                 gate * (moe_random_scale(moe_scale_seed(w1), 7) * scale));
    cr_expect_eq(e.up[130 * 272 + 270],
                 up * (moe_random_scale(moe_scale_seed(w1), 11) * scale));
    ref_random_free(r);
}

/* The number of e4m3 nearest to v, by trying all. */
static unsigned char nearest_e4m3(float v) {
    int best = 0;
    for (int b = 1; b < 255; b++) {
        double now = fabs((double)ref_of_e4m3((unsigned char)b) - (double)v);
        double then = fabs((double)ref_of_e4m3((unsigned char)best) - (double)v);
        if (b != 0x80 && (now < then || (now == then && best % 2)))
            best = b;
    }
    return (unsigned char)best;
}

/* Four rows: numbers of every size that e4m3 has, and ties; zeros; a NaN; an infinity. */
static void fill_rows(struct trial *t, size_t h) {
    for (size_t i = 0; i < h; i++) {
        float far = moe_random_value(5, i) * (float)pow(2, -(double)(i % 20));
        t->x[i] = ref_bf16(i == 7 || i == 131 ? 448 : i % 3 ? far : (float)(i % 37) / 8192);
        t->x[h + i] = 0;
        t->x[2 * h + i] = i == 40 ? NAN : 1;
        t->x[3 * h + i] = i == 140 ? INFINITY : 1;
    }
}

static void expect_quantised(struct env *e, moert_dtype dtype) {
    enum { H = 144, ROWS = 4 };
    struct trial t;
    unsigned char x8[ROWS * H];
    float xs[ROWS * 2];
    cr_assert(open_trial(e, &t, ROWS, dtype, MOERT_FP32), "%s", e->why);
    fill_rows(&t, H);
    cr_assert(run_forward(e, &t), "%s", e->why);
    cr_assert_eq(moert_tool_workspace(e->context, MOE_WS_X8, x8, sizeof x8), MOERT_OK);
    cr_assert_eq(moert_tool_workspace(e->context, MOE_WS_XS, xs, sizeof xs), MOERT_OK);
    cr_expect(xs[0] == 1 && xs[1] == 1 && xs[2] == 1e-30f && xs[3] == 1e-30f);
    for (int i = 0; i < H; i++) {
        int sign_of_zero = x8[i] == 0x80 && t.x[i] <= 0;
        cr_expect(x8[i] == nearest_e4m3(t.x[i]) || sign_of_zero, "%02x of %g, not %02x", x8[i],
                  t.x[i], nearest_e4m3(t.x[i]));
        cr_expect_eq(x8[H + i], 0);
    }
    cr_expect(isnan(xs[4]) && xs[5] == 1 / 448.f, "a NaN spoils its own block");
    cr_expect(xs[6] == 1 / 448.f && isinf(xs[7]), "an infinity its own, too");
    for (int i = 0; i < H; i++)
        cr_expect(isnan(t.out[2 * H + i]) && isnan(t.out[3 * H + i]) && isfinite(t.out[i]));
    trial_close(&t);
}

Test(layer, x_is_quantised_to_the_bit, .init = settings) {
    char bundle[512];
    struct env e;
    make_bundle("fp8wide", "quant", bundle, sizeof bundle);
    cr_assert(env_open(&e, bundle, MOERT_HOST, -1), "%s", e.why);
    expect_quantised(&e, MOERT_FP32);
    expect_quantised(&e, MOERT_BF16);
    env_close(&e);
}

/* A tensor of layer 2 for the checkpoint below; memory lives as long as the test. */
static struct moert_tool_tensor tensor_of(const char *dtype, int64_t rows, int64_t cols,
                                          size_t width, const char *name) {
    size_t bytes = (size_t)rows * (size_t)(cols ? cols : 1) * width;
    char *full = malloc(200);
    snprintf(full, 200, "model.layers.2.mlp.%s", name);
    return (struct moert_tool_tensor){full,         dtype,         cols ? 2 : 1,
                                      {rows, cols}, malloc(bytes), bytes};
}

/* Appends a weight and its block scales, as DeepSeek-V3 has them. */
static int add_fp8(struct moert_tool_tensor *t, int n, int64_t rows, int64_t cols,
                   const char *name) {
    char scale[128];
    snprintf(scale, sizeof scale, "%s_scale_inv", name);
    t[n] = tensor_of("F8_E4M3", rows, cols, 1, name);
    for (int64_t i = 0; i < rows * cols; i++)
        ((unsigned char *)t[n].data)[i] =
            nearest_e4m3(moe_random_value((unsigned)n, (unsigned long long)i) * 100);
    t[n + 1] = tensor_of("F32", (rows + 127) / 128, (cols + 127) / 128, 4, scale);
    for (size_t i = 0; i < t[n + 1].bytes / 4; i++)
        ((float *)t[n + 1].data)[i] = 0.0006f + 0.0001f * (float)i;
    return n + 2;
}

Test(layer, an_fp8_checkpoint_runs_as_released, .init = settings) {
    static struct moert_tool_tensor t[128];
    const struct layer_case *c = case_named("fp8relu8");
    char bundle[512], path[256], name[128];
    int n = 1;
    make_bundle("fp8relu8", "released", bundle, sizeof bundle);
    t[0] = tensor_of("F32", c->experts, c->hidden, 4, "gate.weight");
    for (size_t i = 0; i < t[0].bytes / 4; i++)
        ((float *)t[0].data)[i] = moe_random_value(1, i) / 8;
    for (int e = 0; e < c->experts; e++) {
        snprintf(name, sizeof name, "experts.%d.up_proj.weight", e);
        n = add_fp8(t, n, c->inter, c->hidden, name);
        snprintf(name, sizeof name, "experts.%d.down_proj.weight", e);
        n = add_fp8(t, n, c->hidden, c->inter, name);
    }
    cr_assert_eq(moert_tool_save(scratch(path, sizeof path, "fp8.safetensors"), t, n),
                 MOERT_OK);
    cr_redirect_stdout();
    cr_redirect_stderr();
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--weights", path, "--tokens", "9"),
                 0);
    for (int i = 0; i < n; i++) {
        free((char *)t[i].name);
        free((void *)t[i].data);
    }
}

/* Around a part's, a block's and a warp's end, with and without counts that come before. */
Test(layer, rows_and_tiles_are_those_of_a_plain_loop, .init = settings) {
    static const int tokens[] = {1, 4, 5, 63, 64, 65, 128, 511, 512, 513, 640, 897, 1024, 1100};
    char dir[256], bundle[512];
    struct env e = {0};
    cr_assert(compile_case(case_named("many"), "host", scratch(dir, sizeof dir, "rows"), bundle,
                           sizeof bundle));
    cr_assert(env_open(&e, bundle, MOERT_HOST, -1), "%s", e.why);
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
        cr_expect(check_tables(&e, tokens[i], GIVEN_MIXED), "T=%d: %s", tokens[i], e.why);
    env_close(&e);
}

/* ---- commands ---- */

/* x, and bad, which is x with a NaN. */
static void write_input(const char *path, int tokens, int hidden) {
    size_t n = (size_t)tokens * (size_t)hidden;
    float *x = malloc(2 * sizeof *x * n);
    for (size_t i = 0; i < n; i++)
        x[i] = x[n + i] = moe_random_value(77, i);
    x[n + 3] = NAN;
    struct moert_tool_tensor t[] = {{"x", "F32", 2, {tokens, hidden}, x, 4 * n},
                                    {"bad", "F32", 2, {tokens, hidden}, x + n, 4 * n}};
    cr_assert_eq(moert_tool_save(path, t, 2), MOERT_OK);
    free(x);
}

/* What the output file holds against the reference on the same input, seed 1. */
static void compare_output(const char *path, struct env *e, int tokens) {
    moert_tool_file *f;
    struct moert_tool_tensor out, idx, weight;
    size_t n = (size_t)tokens, h = (size_t)e->shape->hidden, k = (size_t)e->shape->topk;
    cr_assert_eq(moert_tool_open(path, &f), MOERT_OK);
    cr_assert(!moert_tool_find(f, "out", &out) && !moert_tool_find(f, "topk_idx", &idx) &&
              !moert_tool_find(f, "topk_weight", &weight));
    cr_expect(!strcmp(out.dtype, "F32") && !strcmp(idx.dtype, "I32"));
    cr_assert(out.shape[0] == tokens && out.shape[1] == e->shape->hidden);
    cr_assert(idx.shape[0] == tokens && idx.shape[1] == e->shape->topk);
    struct ref_layer ref;
    struct ref_random *random = ref_random_layer(e->shape, 1, e->number, &ref);
    float *x = malloc(4 * n * h), *w = malloc(4 * n * k);
    double *logits = malloc(8 * n * (size_t)e->shape->experts), *y = malloc(8 * n * h);
    int *ids = malloc(4 * n * k);
    for (size_t i = 0; i < n * h; i++)
        x[i] = moe_random_value(77, i);
    ref_logits(&ref, x, tokens, logits);
    ref_route(&ref, logits, tokens, ids, w);
    for (size_t i = 0; i < n * h; i++)
        x[i] = ref_bf16(x[i]);
    cr_assert(ref_experts(&ref, x, tokens, ids, w, y));
    cr_expect_arr_eq(idx.data, ids, 4 * n * k);
    cr_expect_leq(ref_rel_l2(out.data, y, (long long)(n * h)), 4e-3);
    ref_random_free(random);
    free(x), free(w), free(logits), free(y), free(ids);
    moert_tool_close(f);
}

Test(layer, run_reads_and_writes_tensors, .init = settings) {
    char bundle[512], in[256], in_x[300], out[256];
    struct env e;
    struct stat st;
    make_bundle("qwennext", "run", bundle, sizeof bundle);
    write_input(scratch(in, sizeof in, "in.safetensors"), 5, 144);
    snprintf(in_x, sizeof in_x, "%s:x", in);
    scratch(out, sizeof out, "out.safetensors");
    cr_redirect_stdout();
    cr_redirect_stderr();
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--input", in_x, "--output", out), 0);
    cr_assert(env_open(&e, bundle, MOERT_HOST, -1), "%s", e.why);
    compare_output(out, &e, 5);
    env_close(&e);
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--tokens", "3", "--json"), 0);
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--tokens", "0"), 0);
    snprintf(in_x, sizeof in_x, "%s:bad", in);
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--input", in_x, "--json"), 1);
    snprintf(in_x, sizeof in_x, "%s:x", in);
    remove(scratch(out, sizeof out, "pipe"));
    cr_assert_eq(mkfifo(out, 0600), 0);
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--input", in_x, "--output", out), 1);
    cr_expect(!stat(out, &st) && S_ISFIFO(st.st_mode), "what is no regular file stays");
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--layer", "9"), 1);
    cr_expect_eq(COMMAND(run, bundle, "--device", "host", "--input", in), 2);
    cr_expect_eq(COMMAND(run, bundle, "--device", "tpu"), 2);
    cr_expect_eq(COMMAND(run, bundle, "--input", in_x, "--tokens", "3"), 2);
    cr_expect_eq(COMMAND(run, bundle, "--tokens", "many"), 2);
    cr_expect_eq(COMMAND(run, "--json"), 2);
}

/* One run of a bundle that must fail, and what it says. */
#define SAYS(text, ...) \
    do { \
        char said_[1024] = ""; \
        cr_expect_eq(COMMAND(run, bundle, "--device", "host", __VA_ARGS__), 1); \
        fflush(stderr); \
        size_t n_ = fread(said_, 1, sizeof said_ - 1, cr_get_redirected_stderr()); \
        cr_expect(n_ &&strstr(said_, text), "expected %s, got %s", text, said_); \
    } while (0)

Test(layer, run_says_what_is_wrong_with_an_input, .init = settings) {
    char bundle[512], file[256], tensor[4][300];
    float x[6 * 144] = {0};
    struct moert_tool_tensor t[] = {
        {"half", "F16", 2, {6, 144}, x, 2 * 6 * 144},
        {"narrow", "F32", 2, {8, 96}, x, 4 * 8 * 96},
        {"batched", "F32", 3, {1, 6, 144}, x, sizeof x},
        {"nan", "F32", 2, {6, 144}, x, sizeof x},
    };
    make_bundle("qwennext", "wrong", bundle, sizeof bundle);
    x[2 * 144 + 3] = NAN;
    scratch(file, sizeof file, "wrong.safetensors");
    cr_assert_eq(moert_tool_save(file, t, 4), MOERT_OK);
    for (int i = 0; i < 4; i++)
        snprintf(tensor[i], sizeof tensor[i], "%s:%s", file, t[i].name);
    cr_redirect_stdout();
    cr_redirect_stderr();
    SAYS("type F16, expected F32 or BF16", "--input", tensor[0]);
    SAYS("shape [8, 96], expected [tokens, 144]", "--input", tensor[1]);
    SAYS("shape [1, 6, 144], expected [tokens, 144]", "--input", tensor[2]);
    SAYS("token 2, element 3 is not finite", "--input", tensor[3]);
    snprintf(tensor[0], sizeof tensor[0], "%s:x", file);
    SAYS("there is no tensor x in the file; it holds batched, half, nan, narrow", "--input",
         tensor[0]);
    SAYS("layer 7 is no MoE layer of this bundle; those are", "--layer", "7");
}

Test(layer, verify_finds_a_changed_byte, .init = settings) {
    char bundle[512], source[600];
    make_bundle("deepseek2", "verify", bundle, sizeof bundle);
    cr_redirect_stdout();
    cr_redirect_stderr();
    cr_expect_eq(COMMAND(verify, bundle, "--device", "host", "--tokens", "1,70"), 0);
    cr_expect_eq(COMMAND(verify, bundle, "--integrity", "--json"), 0);
    cr_expect_eq(COMMAND(verify, bundle, "--tokens", ","), 2);
    snprintf(source, sizeof source, "%s/class0.cu", bundle);
    FILE *f = fopen(source, "r+");
    cr_assert(f && !fseek(f, 100, SEEK_SET) && fputc('~', f) == '~' && !fclose(f));
    cr_expect_eq(COMMAND(verify, bundle, "--integrity"), 1);
}

/* The plan in a bundle is the plan of its file, to the last character. */
Test(layer, explain_says_the_same_of_file_and_bundle, .init = settings) {
    char bundle[512], file[256], max[64], text[2][16384] = {{0}};
    const struct layer_case *c = case_named("deepseek");
    make_bundle("deepseek", "explain", bundle, sizeof bundle);
    scratch(file, sizeof file, "explain/deepseek.yaml");
    snprintf(max, sizeof max, "moe_config.max_num_tokens=%d", c->max_tokens);
    cr_redirect_stdout();
    cr_redirect_stderr();
    cr_assert_eq(COMMAND(explain, file, "--target", "host", "--set", max, "--json"), 0);
    cr_assert(fread(text[0], 1, sizeof text[0] - 1, cr_get_redirected_stdout()) > 100);
    cr_assert_eq(COMMAND(explain, bundle, "--json"), 0);
    cr_assert(fread(text[1], 1, sizeof text[1] - 1, cr_get_redirected_stdout()) > 100);
    cr_expect_str_eq(text[0], text[1]);
    cr_expect_eq(COMMAND(explain, bundle, "--layer", "2"), 0);
    cr_expect_eq(COMMAND(explain, bundle, "--layer", "1"), 1);
    cr_expect_eq(COMMAND(explain, bundle, "--ep", "2"), 1);
    cr_expect_eq(COMMAND(explain), 2);
}

Test(layer, bench_times_the_host, .init = settings) {
    char bundle[512];
    make_bundle("maskzero", "bench", bundle, sizeof bundle);
    cr_redirect_stdout();
    cr_redirect_stderr();
    cr_expect_eq(COMMAND(bench, bundle, "--device", "host", "--tokens", "1,4", "--stages"), 0);
    cr_expect_eq(COMMAND(bench, bundle, "--device", "host", "--tokens", "2", "--json"), 0);
    cr_expect_eq(COMMAND(bench, bundle, "--rotate", "0"), 2);
}
