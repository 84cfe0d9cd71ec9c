/* A layer over several ranks, one process each, on the host: the same program as often as the bundle
 * has ranks, started by mpirun, srun or torchrun.
 *
 *   cc main.c $(pkg-config --cflags --libs moert) -o ranks
 *   mpirun -n 2 ./ranks two.moe 8
 */
#include <moert.h>

#include <stdio.h>
#include <stdlib.h>

struct rank {
    int rank, tokens;
    moert_bundle *bundle;
    moert_world *world;
    moert_context *context;
    moert_layer *layer;
    moert_layer_info info;
    float *x, *out; /* [tokens][hidden] */
    int32_t *topk_idx;
    float *topk_weight; /* [tokens][topk] */
    int *rank_tokens;   /* [ranks] */
};

/* False, after the reason is printed, unless r is MOERT_OK. */
static int good(const struct rank *k, moert_result r, const char *what) {
    if (r != MOERT_OK)
        fprintf(stderr, "rank %d: %s: %s\n", k->rank, what, moert_last_error());
    return r == MOERT_OK;
}

/* The world first: it knows which rank this process is. The layer's weights are those of the slots
 * that the plan gives this rank. */
static int join(struct rank *k, const char *bundle) {
    moert_world_config world = MOERT_WORLD_CONFIG_INIT;
    moert_context_config config = MOERT_CONTEXT_CONFIG_INIT;
    k->info = (moert_layer_info)MOERT_LAYER_INFO_INIT;
    if (!good(k, moert_bundle_open(bundle, &k->bundle), bundle) ||
        !good(k, moert_world_processes(&world, &k->world), "world"))
        return 0;
    int layer = moert_bundle_layer(k->bundle, 0);
    config.device = MOERT_HOST;
    config.world = k->world;
    config.rank = k->rank = moert_world_rank(k->world);
    return good(k, moert_bundle_layer_info(k->bundle, layer, &k->info), "layer info") &&
           good(k, moert_context_create(k->bundle, &config, &k->context), "context") &&
           good(k, moert_layer_create(k->context, layer, &k->layer), "layer") &&
           good(k, moert_layer_random(k->layer, 1), "weights") &&
           good(k, moert_world_connect(k->world), "connect");
}

/* Every rank has its own tokens, rank 1 here one less than rank 0, and so on. */
static int make_batch(struct rank *k, int tokens) {
    k->rank_tokens = malloc((size_t)k->info.ranks * sizeof *k->rank_tokens);
    for (int r = 0; k->rank_tokens && r < k->info.ranks; r++)
        k->rank_tokens[r] = tokens > r ? tokens - r : 0;
    k->tokens = k->rank_tokens ? k->rank_tokens[k->rank] : 0;
    size_t values = (size_t)k->tokens * (size_t)k->info.hidden;
    size_t entries = (size_t)k->tokens * (size_t)k->info.topk;
    k->x = malloc(values * sizeof *k->x + 1);
    k->out = malloc(values * sizeof *k->out + 1);
    k->topk_idx = malloc(entries * sizeof *k->topk_idx + 1);
    k->topk_weight = malloc(entries * sizeof *k->topk_weight + 1);
    if (!k->rank_tokens || !k->x || !k->out || !k->topk_idx || !k->topk_weight)
        return 0;
    srand((unsigned)k->rank + 1);
    for (size_t i = 0; i < values; i++)
        k->x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return 1;
}

static int forward(const struct rank *k) {
    moert_io io = MOERT_IO_INIT;
    io.num_tokens = k->tokens;
    io.x_dtype = io.out_dtype = MOERT_FP32;
    io.x = k->x;
    io.out = k->out;
    io.topk_idx = k->topk_idx;
    io.topk_weight = k->topk_weight;
    io.rank_tokens = k->rank_tokens;
    if (!good(k, moert_forward(k->layer, &io, NULL), "forward"))
        return 0;
    for (int t = 0; t < k->tokens; t++)
        printf("rank %d, token %d: expert %d first, out[0] %.5f\n", k->rank, t,
               (int)k->topk_idx[t * k->info.topk],
               (double)k->out[(size_t)t * (size_t)k->info.hidden]);
    return 1;
}

static void leave(struct rank *k) {
    moert_layer_destroy(k->layer);
    moert_context_destroy(k->context);
    moert_world_destroy(k->world);
    moert_bundle_close(k->bundle);
    free(k->x);
    free(k->out);
    free(k->topk_idx);
    free(k->topk_weight);
    free(k->rank_tokens);
}

int main(int argc, char **argv) {
    struct rank k = {.rank = -1};
    if (argc != 3) {
        fprintf(stderr, "usage: %s BUNDLE TOKENS\n", argv[0]);
        return 2;
    }
    int ok = join(&k, argv[1]) && make_batch(&k, atoi(argv[2])) && forward(&k);
    leave(&k);
    return ok ? 0 : 1;
}
