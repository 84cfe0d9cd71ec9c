/* One MoE layer on the host: open a bundle, fill the layer with random weights, run a batch.
 *
 *   cc main.c $(pkg-config --cflags --libs moert) -o forward
 *   ./forward tiny.moe 8
 */
#include <moert.h>

#include <stdio.h>
#include <stdlib.h>

struct batch {
    float *x, *out; /* [tokens][hidden] */
    int32_t *topk_idx;
    float *topk_weight; /* [tokens][topk] */
};

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, moert_last_error());
    return 1;
}

static void batch_make(struct batch *b, const moert_layer_info *info, int tokens) {
    size_t values = (size_t)tokens * (size_t)info->hidden;
    size_t entries = (size_t)tokens * (size_t)info->topk;
    b->x = malloc(values * sizeof *b->x + 1);
    b->out = malloc(values * sizeof *b->out + 1);
    b->topk_idx = malloc(entries * sizeof *b->topk_idx + 1);
    b->topk_weight = malloc(entries * sizeof *b->topk_weight + 1);
    for (size_t i = 0; i < values; i++)
        b->x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

static void batch_free(struct batch *b) {
    free(b->x);
    free(b->out);
    free(b->topk_idx);
    free(b->topk_weight);
}

static void print_token(const struct batch *b, const moert_layer_info *info, int t) {
    printf("token %d: experts", t);
    for (int j = 0; j < info->topk; j++)
        printf(" %d (%.3f)", (int)b->topk_idx[t * info->topk + j],
               (double)b->topk_weight[t * info->topk + j]);
    printf(", out[0] %.5f\n", (double)b->out[(size_t)t * (size_t)info->hidden]);
}

static int layer_run(moert_layer *layer, const moert_layer_info *info, int tokens) {
    struct batch b;
    batch_make(&b, info, tokens);
    moert_io io = MOERT_IO_INIT;
    io.num_tokens = tokens;
    io.x_dtype = io.out_dtype = MOERT_FP32;
    io.x = b.x;
    io.out = b.out;
    io.topk_idx = b.topk_idx;
    io.topk_weight = b.topk_weight;
    int status = moert_forward(layer, &io, NULL) ? fail("forward") : 0;
    for (int t = 0; !status && t < tokens; t++)
        print_token(&b, info, t);
    batch_free(&b);
    return status;
}

static int context_run(moert_bundle *bundle, moert_context *context, int tokens) {
    moert_layer_info info = MOERT_LAYER_INFO_INIT;
    moert_layer *layer;
    int number = moert_bundle_layer(bundle, 0);
    if (moert_bundle_layer_info(bundle, number, &info))
        return fail("layer info");
    printf("layer %d: hidden %d, %d experts of %d, top-%d, %.1f MB of weights\n", number,
           info.hidden, info.experts, info.inter, info.topk, (double)info.weight_bytes * 1e-6);
    if (moert_layer_create(context, number, &layer))
        return fail("layer");
    int status =
        moert_layer_random(layer, 1) ? fail("weights") : layer_run(layer, &info, tokens);
    moert_layer_destroy(layer);
    return status;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s BUNDLE TOKENS\n", argv[0]);
        return 2;
    }
    moert_bundle *bundle;
    moert_context *context;
    moert_context_config config = MOERT_CONTEXT_CONFIG_INIT;
    config.device = MOERT_HOST;
    if (moert_bundle_open(argv[1], &bundle))
        return fail(argv[1]);
    int status = 1;
    if (moert_context_create(bundle, &config, &context)) {
        fail("context");
    } else {
        status = context_run(bundle, context, atoi(argv[2]));
        moert_context_destroy(context);
    }
    moert_bundle_close(bundle);
    return status;
}
