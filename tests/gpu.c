/* The tests that want a GPU.
 *
 *   gpu_tests build [TARGETS]   compiles the bundles into build/gpu (NVRTC, no GPU); default sm_90a
 *   gpu_tests [cases|models|chain|exchange|assign|sanitize] [NAME]   runs them; default: all but
 *     sanitize
 *   gpu_tests rank NAME   one rank of a world of processes, as its launcher says
 *
 * cases: every router, activation and awkward size, 100 runs bit for bit, graph replay.
 * models: one layer of every model of plans/models in full size, sampled tokens.
 * chain: all layers of Qwen3-30B, each with its own weights, in one CUDA graph.
 * exchange: several ranks on the one GPU: results, 100 runs bit for bit, graph replay with new
 *   routing, ranks on streams of their own, a rank that stays away, ranks in processes of their own.
 * assign: the kernels that choose replicas, and their times.
 * sanitize: the cases once each, small, for compute-sanitizer. */
#include "layer_checks.h"
#include "world_checks.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

static int passed, failed, children;

static void path_of(char *out, size_t size, const char *name) {
    const char *build = getenv("B");
    snprintf(out, size, "%s/gpu%s%s", build ? build : "build", *name ? "/" : "", name);
}

static void verdict(bool ok, const char *name, const char *why_not) {
    ok ? passed++ : failed++;
    printf("%s %s%s%s\n", ok ? "ok  " : "FAIL", name, ok ? "" : ": ", ok ? "" : why_not);
    fflush(stdout);
}

/* ---- models ---- */

enum { MAX_MODELS = 64 };

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Names of plans/models, without .yaml, ascending; they live as long as the program. */
static int list_models(char **names) {
    int n = 0;
    DIR *d = opendir("plans/models");
    for (struct dirent *f; d && n < MAX_MODELS && (f = readdir(d));) {
        size_t len = strlen(f->d_name);
        if (len > 5 && !strcmp(f->d_name + len - 5, ".yaml"))
            names[n++] = strndup(f->d_name, len - 5);
    }
    if (d)
        closedir(d);
    qsort(names, (size_t)n, sizeof *names, by_name);
    return n;
}

/* ---- build ---- */

/* What stands between two layers of the chain. */
static const char norm_source[] =
    "extern \"C\" __global__ void __launch_bounds__(256)\n"
    "rms_norm(const unsigned short *in, unsigned short *out, int n) {\n"
    "    __shared__ float part[8];\n"
    "    in += (long long)blockIdx.x * n;\n"
    "    out += (long long)blockIdx.x * n;\n"
    "    float sum = 0;\n"
    "    for (int i = threadIdx.x; i < n; i += 256) {\n"
    "        float v = __uint_as_float((unsigned)in[i] << 16);\n"
    "        sum += v * v;\n"
    "    }\n"
    "    for (int d = 16; d; d /= 2)\n"
    "        sum += __shfl_xor_sync(~0u, sum, d);\n"
    "    if (threadIdx.x % 32 == 0)\n"
    "        part[threadIdx.x / 32] = sum;\n"
    "    __syncthreads();\n"
    "    sum = 0;\n"
    "    for (int i = 0; i < 8; i++)\n"
    "        sum += part[i];\n"
    "    float scale = rsqrtf(sum / n + 1e-30f);\n"
    "    for (int i = threadIdx.x; i < n; i += 256) {\n"
    "        unsigned u = __float_as_uint(__uint_as_float((unsigned)in[i] << 16) * scale);\n"
    "        out[i] = (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);\n"
    "    }\n"
    "}\n";

static bool build_norm(void) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    char path[512];
    struct compile_job job = {.source = norm_source,
                              .source_name = "rms_norm.cu",
                              .expression = "rms_norm",
                              .target = MOE_TARGET_SM_90A};
    path_of(path, sizeof path, "rms_norm.cubin");
    bool ok = nvrtc_compile(&a, &d, &job, 1, 1, NULL, NULL) &&
              !file_write(path, job.cubin, job.cubin_len);
    diag_print(&d, stderr);
    arena_free(&a);
    return ok;
}

static bool build_model(const char *name, const char *targets) {
    char file[512], out[512], bundle[300];
    snprintf(file, sizeof file, "plans/models/%s.yaml", name);
    snprintf(bundle, sizeof bundle, "%s.moe", name);
    path_of(out, sizeof out, bundle);
    return compile_file(file, targets, 8192, out);
}

/* Ranks in one process. Names begin with "world_", to be told from the models. */
static const struct shape world_shapes[] = {
    {"world_small", 4, 80, 48, 22, 4, 16, NULL, NULL},
    {"world_replicas", 4, 256, 64, 12, 4, 64, NULL,
     "dispatch: share\nmoe_config: {load_balancer: {num_slots: 20}}\n"},
    {"world_gptoss", 2, 2880, 64, 17, 4, 64,
     "router: {method: topk_softmax, bias: true}\n"
     "activation: {name: swiglu_oai, alpha: 1.702, limit: 0.9}\nweights: {bias: true}\n",
     NULL},
    {"world_llama4", 3, 1024, 64, 16, 1, 48,
     "router: {method: llama4}\nshared_experts: {intermediate_size: 64}\n", NULL},
    {"world_deepseek", 8, 7168, 512, 64, 8, 128,
     "router: {method: deepseek_v3, n_group: 8, topk_group: 4, norm_topk_prob: true,\n"
     "  routed_scaling_factor: 2.5, correction_bias: true}\n"
     "shared_experts: {intermediate_size: 512}\n",
     NULL},
    {"world_fp8", 4, 1024, 512, 32, 4, 128,
     "router: {method: softmax_topk, norm_topk_prob: true}\n"
     "shared_experts: {intermediate_size: 512}\n"
     "weights: {format: fp8_block, block: [128, 128]}\n",
     NULL},
    {"world_gather", 4, 256, 64, 12, 4, 64,
     "router: {method: softmax_topk, norm_topk_prob: true}\n"
     "shared_experts: {intermediate_size: 64}\n",
     "policy: ./allgather.lua\n"},
    {"world_swap", 4, 256, 64, 12, 4, 64, NULL, "policy: ./alltoall.lua\n"},
    {"world_many", 64, 64, 32, 70, 22, 4, NULL, NULL},
};
enum { NUM_WORLDS = sizeof world_shapes / sizeof *world_shapes };

static bool build_world(const struct shape *s, const char *targets, const char *dir) {
    static struct world w;
    static const char *const methods[] = {"allgather", "alltoall"};
    char path[600], text[100];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s.lua", dir, methods[i]);
        snprintf(text, sizeof text, "return {exchange = function() return '%s' end}\n",
                 methods[i]);
        if (file_write(path, text, strlen(text)))
            return false;
    }
    return world_compile(&w, s, dir, targets);
}

/* ---- cases ---- */

struct forward {
    moert_layer *layer;
    const moert_io *io;
};
static moert_result call_forward(void *user, moert_stream s) {
    struct forward *f = user;
    return moert_forward(f->layer, f->io, s);
}

/* A captured forward, replayed, gives the eager one's bits. */
static bool check_graph(struct env *e, int tokens) {
    struct trial t;
    moert_stream s = NULL;
    moert_graph *g = NULL;
    struct forward f = {e->layer, &t.io};
    if (!open_trial(e, &t, tokens, MOERT_FP32, MOERT_BF16))
        return false;
    size_t n = (size_t)tokens, h = (size_t)e->shape->hidden, k = (size_t)e->shape->topk;
    float *out = malloc(4 * n * h);
    int32_t *idx = malloc(4 * n * k);
    trial_random_x(&t, 41, e->number);
    bool ok = out && idx && run_forward(e, &t) &&
              good(e, moert_tool_stream(e->context, &s), "stream") &&
              good(e, moert_tool_capture(e->context, s, call_forward, &f, &g), "capture");
    if (ok) {
        memcpy(out, t.out, 4 * n * h);
        memcpy(idx, t.idx, 4 * n * k);
        ok = good(e, trial_upload(&t), "upload");
    }
    for (int i = 0; i < 3 && ok; i++)
        ok = good(e, moert_tool_replay(e->context, g, s), "replay");
    ok = ok && good(e, moert_tool_sync(e->context, s), "sync") &&
         good(e, trial_download(&t), "download") &&
         (same_results(&t, out, idx) || why(e, "T=%d: graph replay differs", tokens)) &&
         (!trial_overran(&t) || why(e, "T=%d: graph replay wrote beyond", tokens));
    if (g)
        moert_tool_graph_free(e->context, g);
    if (s)
        moert_tool_stream_free(e->context, s);
    trial_close(&t);
    free(out);
    free(idx);
    return ok;
}

static bool open_named(struct env *e, const char *name, int layer) {
    char file[300], path[512];
    snprintf(file, sizeof file, "%s.moe", name);
    path_of(path, sizeof path, file);
    return env_open(e, path, MOERT_CUDA_DEVICE, layer);
}

static void run_case(const struct layer_case *c, bool sanitize) {
    struct env e;
    bool ok = open_named(&e, c->name, -1);
    if (ok && sanitize)
        ok = check_batch(&e, 7, MOERT_FP32, MOERT_BF16, 0) &&
             check_batch(&e, 64, MOERT_BF16, MOERT_FP32, 0) && check_given(&e, 33, GIVEN_MIXED);
    else if (ok)
        ok = check_layer(&e, 100) && check_graph(&e, 64) && check_graph(&e, 177);
    verdict(ok, c->name, e.why);
    env_close(&e);
}

static void run_cases(const char *only, bool sanitize) {
    for (int i = 0; i < NUM_LAYER_CASES; i++)
        if (!only || !strcmp(only, layer_cases[i].name))
            run_case(&layer_cases[i], sanitize);
}

/* ---- full model shapes ---- */

static void wait_child(void) {
    int status;
    if (wait(&status) < 0)
        return;
    children--;
    WIFEXITED(status) && WEXITSTATUS(status) == 0 ? passed++ : failed++;
}

/* The reference takes seconds per batch: it runs in a process of its own, which only reads
 * memory, while the GPU goes on. */
static void compare_apart(struct env *e, const struct trial *t, const int *sample, int n,
                          const char *name) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    while (children >= (cores > 1 ? cores : 1))
        wait_child();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct trial_error r;
        char text[200] = "out of memory";
        bool ok = trial_compare(t, &e->ref, TRIAL_ROUTED, sample, n, &r);
        if (ok)
            trial_describe(&r, text, sizeof text);
        ok = ok && trial_passes(&r) && r.near_ties == 0;
        printf("%s %s, T=%d: %s\n", ok ? "ok  " : "FAIL", name, t->tokens, text);
        fflush(stdout);
        _exit(ok ? 0 : 1);
    }
    if (child < 0)
        verdict(false, name, "fork failed");
    else
        children++;
}

static bool run_model_batch(struct env *e, int tokens, const char *name) {
    struct trial t;
    int sample[4], n = trial_sample(tokens, 4, sample);
    moert_dtype x = tokens == 64 ? MOERT_FP32 : MOERT_BF16;
    if (!open_trial(e, &t, tokens, x, MOERT_BF16))
        return false;
    bool ok = draw(e, &t, (unsigned)tokens, sample, n) && run_forward(e, &t);
    if (ok)
        compare_apart(e, &t, sample, n, name);
    trial_close(&t);
    return ok;
}

static void run_model(const char *name) {
    static const int tokens[] = {0, 1, 7, 64, 177, 8192};
    struct env e;
    bool ok = open_named(&e, name, -1);
    for (size_t i = 0; ok && i < sizeof tokens / sizeof *tokens; i++)
        ok = run_model_batch(&e, tokens[i], name);
    ok = ok && check_repeats(&e, 64, 100) && check_graph(&e, 128);
    verdict(ok, name, e.why);
    env_close(&e);
}

static void run_models(const char *only) {
    char *models[MAX_MODELS];
    int n = list_models(models);
    if (n == 0)
        verdict(false, "plans/models", "no models there");
    for (int i = 0; i < n; i++)
        if (!only || !strcmp(only, models[i]))
            run_model(models[i]);
    while (children > 0)
        wait_child();
}

/* ---- chain ---- */

enum { MAX_CHAIN = 128 };

/* The driver's calls that the norm between two layers needs. */
struct driver {
    int (*load)(void **module, const void *image);
    int (*function)(void **f, void *module, const char *name);
    int (*launch)(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                  unsigned bz, unsigned smem, void *stream, void **args, void **extra);
    void *norm;
};

struct chain {
    struct env e; /* bundle, context and the first layer */
    struct driver driver;
    int layers, tokens;
    moert_layer *layer[MAX_CHAIN];
    struct trial trial[MAX_CHAIN];
};

static bool load_driver(struct env *e, struct driver *d) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    int (*retain)(void **context, int device) = NULL;
    int (*current)(void *context) = NULL;
    void *context;
    if (lib) {
        *(void **)&d->load = dlsym(lib, "cuModuleLoadData");
        *(void **)&d->function = dlsym(lib, "cuModuleGetFunction");
        *(void **)&d->launch = dlsym(lib, "cuLaunchKernel");
        *(void **)&retain = dlsym(lib, "cuDevicePrimaryCtxRetain");
        *(void **)&current = dlsym(lib, "cuCtxSetCurrent");
    }
    return (d->load && d->function && d->launch && retain && current && !retain(&context, 0) &&
            !current(context)) ||
           why(e, "the driver cannot be called");
}

static bool load_norm(struct chain *c) {
    struct arena a = {0};
    struct driver *d = &c->driver;
    char path[512], *cubin;
    size_t len;
    void *module;
    path_of(path, sizeof path, "rms_norm.cubin");
    bool ok = load_driver(&c->e, d) && !file_read(&a, path, 1 << 20, &cubin, &len) &&
              !d->load(&module, cubin) && !d->function(&d->norm, module, "rms_norm");
    arena_free(&a);
    return ok || why(&c->e, "%s cannot be loaded", path);
}

static moert_result call_chain(void *user, moert_stream s) {
    struct chain *c = user;
    moert_result r = MOERT_OK;
    for (int i = 0; i < c->layers && !r; i++) {
        const moert_io *io = &c->trial[i].io;
        r = moert_forward(c->layer[i], io, s);
        if (r || i + 1 == c->layers)
            break;
        const void *next = c->trial[i + 1].io.x;
        int n = c->e.shape->hidden;
        void *args[] = {(void *)&io->out, (void *)&next, &n};
        if (c->driver.launch(c->driver.norm, (unsigned)c->tokens, 1, 1, 256, 1, 1, 0, s, args,
                             NULL))
            r = MOERT_CUDA;
    }
    return r;
}

struct replay {
    moert_context *context;
    moert_graph *graph;
};
static moert_result call_replay(void *user, moert_stream s) {
    struct replay *r = user;
    return moert_tool_replay(r->context, r->graph, s);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median microseconds of replays of what `call` does. */
static bool time_replays(struct env *e, moert_result (*call)(void *user, moert_stream s),
                         void *user, double *us) {
    struct replay g = {.context = e->context};
    moert_stream s = NULL;
    double all[11];
    bool ok = good(e, moert_tool_stream(g.context, &s), "stream") &&
              good(e, moert_tool_capture(g.context, s, call, user, &g.graph), "capture");
    for (int i = 0; ok && i < 3; i++)
        ok = good(e, call_replay(&g, s), "replay");
    for (int i = 0; ok && i < 11; i++)
        ok = good(e, moert_tool_time(g.context, s, call_replay, &g, &all[i]), "replay");
    if (g.graph)
        moert_tool_graph_free(g.context, g.graph);
    if (s)
        moert_tool_stream_free(g.context, s);
    if (ok) {
        qsort(all, 11, sizeof *all, by_value);
        *us = all[5];
    }
    return ok;
}

/* What layer i read, as the device holds it. */
static bool fetch_input(struct chain *c, int i) {
    struct trial *t = &c->trial[i];
    size_t n = (size_t)t->tokens * (size_t)c->e.shape->hidden;
    unsigned short *bits = malloc(2 * n);
    bool ok = bits && good(&c->e, moert_tool_download(c->e.context, bits, t->io.x, 2 * n), "x");
    for (size_t j = 0; ok && j < n; j++) {
        unsigned u = (unsigned)bits[j] << 16;
        memcpy(t->x + j, &u, 4);
    }
    free(bits);
    return ok && good(&c->e, trial_download(t), "download");
}

/* Layer i against the reference, on the input it had. Near ties may fall either way here: the
 * inputs are what the layers before made them. */
static bool check_link(struct chain *c, int i) {
    struct ref_layer ref;
    struct trial_error r;
    char text[200];
    int number = moert_bundle_layer(c->e.bundle, i), sample[4];
    int n = trial_sample(c->tokens, 4, sample);
    struct ref_random *random = ref_random_layer(c->e.shape, weights_seed, number, &ref);
    bool ok = random && fetch_input(c, i) &&
              trial_compare(&c->trial[i], &ref, TRIAL_ROUTED, sample, n, &r);
    ref_random_free(random);
    if (!ok)
        return *c->e.why ? false : why(&c->e, "out of memory");
    trial_describe(&r, text, sizeof text);
    printf("     layer %d: %s\n", number, text);
    return trial_passes(&r) || why(&c->e, "layer %d: %s", number, text);
}

static bool open_links(struct chain *c) {
    for (int i = 0; i < c->layers; i++) {
        struct trial *t = &c->trial[i];
        if (!good(&c->e,
                  trial_open(t, c->e.context, c->layer[i], c->e.shape, c->tokens, MOERT_BF16,
                             MOERT_BF16),
                  "buffers"))
            return false;
        trial_random_x(t, 51, i);
        if (!good(&c->e, trial_upload(t), "upload"))
            return false;
    }
    return true;
}

static void run_links(struct chain *c, const char *name) {
    double us = 0;
    char title[128];
    bool ok = open_links(c) && time_replays(&c->e, call_chain, c, &us);
    for (int i = 0; ok && i<c->layers; i += c->layers> 8 ? c->layers / 6 : 1)
        ok = check_link(c, i);
    ok = ok && check_link(c, c->layers - 1);
    snprintf(title, sizeof title, "%s, %d layers in one graph, T=%d: %.1f us, %.1f us a layer",
             name, c->layers, c->tokens, us, us / c->layers);
    verdict(ok, title, c->e.why);
    for (int i = 0; i < c->layers; i++)
        if (c->trial[i].context)
            trial_close(&c->trial[i]);
}

static bool open_chain(struct chain *c, const char *name) {
    if (!open_named(&c->e, name, -1) || !load_norm(c))
        return false;
    int n = moert_bundle_num_layers(c->e.bundle);
    if (n > MAX_CHAIN)
        return why(&c->e, "over %d layers", MAX_CHAIN);
    for (c->layers = 0; c->layers < n; c->layers++) {
        moert_layer **l = &c->layer[c->layers];
        int number = moert_bundle_layer(c->e.bundle, c->layers);
        if (!good(&c->e, moert_layer_create(c->e.context, number, l), "layer") ||
            !good(&c->e, moert_layer_random(*l, weights_seed), "random weights"))
            return false;
    }
    return true;
}

static void run_chain(const char *only) {
    static const int tokens[] = {1, 128};
    static struct chain c;
    const char *name = only ? only : "qwen3-30b";
    bool ok = open_chain(&c, name);
    if (!ok)
        verdict(false, "chain", c.e.why);
    for (int i = 0; ok && i < 2; i++) {
        c.tokens = tokens[i];
        run_links(&c, name);
    }
    for (int i = 0; i < c.layers; i++)
        moert_layer_destroy(c.layer[i]);
    env_close(&c.e);
}

/* ---- several ranks on one GPU ---- */

static moert_result call_world(void *user, moert_stream s) {
    struct world *w = user;
    moert_io io[MOE_MAX_RANKS];
    for (int r = 0; r < w->c->ranks; r++)
        io[r] = w->trial[r].io;
    return moert_world_forward(w->world, w->layer, io, s);
}

static bool world_repeats(struct world *w, int runs) {
    float *first = world_forward(w) && world_download(w) ? world_keep(w) : NULL;
    bool ok = first != NULL;
    for (int i = 0; ok && i < runs; i++)
        ok = world_forward(w) && world_download(w) && world_same(w, first, "a later run");
    free(first);
    return ok;
}

static bool world_upload(struct world *w, unsigned seed) {
    for (int r = 0; r < w->c->ranks; r++) {
        trial_random_x(&w->trial[r], seed + (unsigned)r, 0);
        if (!world_good(w, trial_upload(&w->trial[r]), "upload"))
            return false;
    }
    return true;
}

/* A captured forward of all ranks, replayed on other tokens: epochs and routing move on. */
static bool world_graph(struct world *w) {
    moert_context *c = w->context[0];
    moert_stream s = NULL;
    moert_graph *g = NULL;
    double us = 0;
    bool ok = world_good(w, moert_tool_stream(c, &s), "stream") &&
              world_good(w, moert_tool_capture(c, s, call_world, w, &g), "capture");
    for (unsigned i = 0; ok && i < 5; i++)
        ok = world_upload(w, 70 + 10 * i) &&
             world_good(w, moert_tool_replay(c, g, s), "replay") &&
             world_good(w, moert_tool_sync(c, s), "sync") && world_download(w) &&
             world_results(w, TRIAL_ROUTED, 2);
    struct replay again = {c, g};
    ok = ok && world_good(w, moert_tool_time(c, s, call_replay, &again, &us), "replay");
    if (ok)
        printf("     %d ranks in turns, %d tokens on the first: %.1f us for all\n", w->c->ranks,
               w->tokens[0], us);
    if (g)
        moert_tool_graph_free(c, g);
    if (s)
        moert_tool_stream_free(c, s);
    return ok;
}

/* Every rank on a stream of its own, several forwards deep: kernels wait for each other while they
 * run. Waiting blocks are few, and all fit on the GPU beside those that send. */
static bool world_streams(struct world *w) {
    moert_stream s[MOE_MAX_RANKS] = {NULL};
    float *turns = world_forward(w) && world_download(w) ? world_keep(w) : NULL;
    bool ok = turns != NULL;
    for (int r = 0; ok && r < w->c->ranks; r++)
        ok = world_good(w, moert_tool_stream(w->context[r], &s[r]), "stream");
    for (int i = 0; ok && i < 10; i++)
        for (int r = 0; ok && r < w->c->ranks; r++)
            ok = world_good(w, moert_forward(w->layer[r], &w->trial[r].io, s[r]), "forward");
    ok = ok && world_good(w, moert_tool_sync(w->context[0], NULL), "sync") &&
         world_good(w, moert_world_check(w->world), "streams") && world_download(w) &&
         world_same(w, turns, "a run on streams");
    for (int r = 0; r < w->c->ranks; r++)
        if (s[r])
            moert_tool_stream_free(w->context[r], s[r]);
    free(turns);
    return ok;
}

/* The last rank sends nothing; the others end without a trap and say whom they missed. */
static bool world_missing(struct world *w) {
    char want[64];
    int last = w->c->ranks - 1;
    snprintf(want, sizeof want, "missing: %d", last);
    for (int r = 0; r < last; r++)
        if (!world_good(w, moert_route(w->layer[r], &w->trial[r].io, NULL), "route") ||
            !world_good(w, moert_dispatch_send(w->layer[r], &w->trial[r].io, NULL), "send"))
            return false;
    if (!world_good(w, moert_dispatch_wait(w->layer[0], &w->trial[0].io, NULL), "wait") ||
        !world_good(w, moert_tool_sync(w->context[0], NULL), "sync after the timeout"))
        return false;
    if (moert_world_check(w->world) != MOERT_PEER || !strstr(moert_last_error(), want))
        return world_no(w, "it says: %s", moert_last_error());
    printf("     %s\n", moert_last_error());
    return true;
}

static bool world_batches(struct world *w) {
    const int n = w->c->max_tokens;
    const int full[] = {n}, one[] = {1}, mixed[] = {n / 4, n / 2, 0, n},
              long_one[] = {1, 2 * n + 1};
    const int *counts[] = {full, one, mixed, long_one};
    const int num[] = {1, 1, 4, 2};
    for (int i = 0; i < 4; i++)
        if (!world_draw(w, counts[i], num[i], i % 2 ? MOERT_FP32 : MOERT_BF16) ||
            !world_repeats(w, 100) || !world_results(w, TRIAL_ROUTED, 2))
            return false;
    return world_draw(w, mixed, 4, MOERT_BF16) && world_graph(w) &&
           world_draw(w, one, 1, MOERT_BF16) && world_graph(w) &&
           (w->c->ranks > 8 || world_streams(w));
}

static void run_world(const struct shape *s) {
    static struct world w;
    char file[300];
    const int few[] = {2};
    memset(&w, 0, sizeof w);
    snprintf(file, sizeof file, "%s.moe", s->name);
    path_of(w.path, sizeof w.path, file);
    bool ok = world_open(&w, MOERT_CUDA_DEVICE, 0) && world_batches(&w);
    verdict(ok, s->name, w.why);
    world_close(&w);
    path_of(w.path, sizeof w.path, file);
    ok = world_open(&w, MOERT_CUDA_DEVICE, 300) && world_draw(&w, few, 1, MOERT_BF16) &&
         world_missing(&w);
    verdict(ok, "a rank that stays away", w.why);
    world_close(&w);
}

/* ---- a rank in a process of its own ---- */

/* Forwards of this process's rank against the reference, which knows all experts. */
static bool rank_forwards(struct world *w, int rank) {
    struct trial *t = &w->trial[rank];
    int sample[64], n = trial_sample(w->tokens[rank], 16, sample);
    struct trial_error e;
    char text[200];
    trial_random_x(t, (unsigned)(WORLD_SEED + rank), 0);
    t->io.rank_tokens = w->tokens;
    if (!world_good(w, trial_upload(t), "upload"))
        return false;
    for (int i = 0; i < 10; i++)
        if (!world_good(w, moert_forward(w->layer[rank], &t->io, NULL), "forward") ||
            !world_good(w, moert_tool_sync(w->context[rank], NULL), "sync") ||
            !world_good(w, moert_world_check(w->world), "waits"))
            return false;
    if (!world_good(w, trial_download(t), "download") ||
        !trial_compare(t, &w->ref, TRIAL_ROUTED, sample, n, &e))
        return false;
    trial_describe(&e, text, sizeof text);
    return trial_passes(&e) || world_no(w, "%s", text);
}

static bool open_rank(struct world *w, int *rank) {
    moert_world_config world = MOERT_WORLD_CONFIG_INIT;
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    const char *local = getenv("LOCAL_RANK");
    world.timeout_ms = 30000;
    if (!world_good(w, moert_world_processes(&world, &w->world), "world") ||
        !world_good(w, moert_bundle_open(w->path, &w->bundle), w->path))
        return false;
    w->c = moert_tool_class(w->bundle, 0);
    cfg.world = w->world;
    cfg.rank = *rank = moert_world_rank(w->world);
    cfg.ordinal = local ? atoi(local) : 0;
    for (int r = 0; r < w->c->ranks; r++)
        w->tokens[r] = r % 3 == 1 ? 0 : w->c->max_tokens - r % w->c->max_tokens;
    w->random = ref_random_layer(w->c, WORLD_SEED, 0, &w->ref);
    return world_good(w, moert_context_create(w->bundle, &cfg, &w->context[*rank]),
                      "context") &&
           world_good(w, moert_layer_create(w->context[*rank], 0, &w->layer[*rank]), "layer") &&
           world_good(w, moert_layer_random(w->layer[*rank], WORLD_SEED), "weights") &&
           world_good(w, moert_world_connect(w->world), "connect") &&
           world_good(w,
                      trial_open(&w->trial[*rank], w->context[*rank], w->layer[*rank], w->c,
                                 w->tokens[*rank], MOERT_BF16, MOERT_FP32),
                      "buffers");
}

static int run_rank(const char *name) {
    static struct world w;
    char file[300];
    int rank = -1;
    snprintf(file, sizeof file, "%s.moe", name);
    path_of(w.path, sizeof w.path, file);
    bool ok = open_rank(&w, &rank) && rank_forwards(&w, rank);
    if (!ok)
        printf("%s, rank %d: %s\n", name, rank, w.why);
    world_close(&w);
    return ok ? 0 : 1;
}

/* All ranks of a shape on this GPU: they take turns on it, in slices of milliseconds. */
static void run_apart(const struct shape *s) {
    pid_t child[MOE_MAX_RANKS];
    char text[300];
    bool ok = true;
    int status;
    fflush(NULL);
    for (int r = 0; r < s->ranks; r++) {
        child[r] = fork();
        if (child[r])
            continue;
        snprintf(text, sizeof text, "%d", r);
        setenv("RANK", text, 1);
        snprintf(text, sizeof text, "%d", s->ranks);
        setenv("WORLD_SIZE", text, 1);
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        snprintf(text, sizeof text, "%d", 20000 + getppid() % 10000);
        setenv("MASTER_PORT", text, 1);
        execl("/proc/self/exe", "gpu_tests", "rank", s->name, (char *)NULL);
        _exit(127);
    }
    for (int r = 0; r < s->ranks; r++)
        ok = waitpid(child[r], &status, 0) > 0 && status == 0 && ok;
    snprintf(text, sizeof text, "%s, a process per rank", s->name);
    verdict(ok, text, "see above");
}

static void run_worlds(const char *only) {
    for (int i = 0; i < NUM_WORLDS; i++) {
        if (only && strcmp(only, world_shapes[i].name) != 0)
            continue;
        run_world(&world_shapes[i]);
        if (world_shapes[i].ranks <= 4)
            run_apart(&world_shapes[i]);
    }
}

/* ---- replicas ---- */

#include "gpu_assign.h"

/* ---- */

static int build_all(const char *targets) {
    char dir[512], bundle[600], *models[MAX_MODELS];
    path_of(dir, sizeof dir, "");
    bool ok = !dir_make(dir) && build_norm() && build_assign(targets);
    for (int i = 0; ok && i < NUM_LAYER_CASES; i++)
        ok = compile_case(&layer_cases[i], targets, dir, bundle, sizeof bundle);
    for (int i = 0; ok && i < NUM_WORLDS; i++)
        ok = build_world(&world_shapes[i], targets, dir);
    int n = list_models(models);
    for (int i = 0; ok && i < n; i++)
        ok = build_model(models[i], targets);
    return ok ? 0 : 1;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "all", *only = argc > 2 ? argv[2] : NULL;
    bool all = !strcmp(what, "all");
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); /* a queue for every rank's stream */
    if (!strcmp(what, "rank") && only)
        return run_rank(only);
    if (!strcmp(what, "build"))
        return build_all(only ? only : "sm_90a");
    if (all || !strcmp(what, "cases"))
        run_cases(only, false);
    if (all || !strcmp(what, "models"))
        run_models(only);
    if (all || !strcmp(what, "chain"))
        run_chain(only);
    if (all || !strcmp(what, "exchange"))
        run_worlds(only);
    if (all || !strcmp(what, "assign"))
        run_assign();
    if (!strcmp(what, "sanitize"))
        run_cases(only, true);
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed ? 1 : 0;
}
