/* Several ranks in one process on the CPU: what each receives against the routing counted anew,
 * results against the reference, runs against each other bit for bit, and whoever stays away. */
#include "../compiler/moec.h"
#include "../compiler/trial.h"
#include "../runtime/internal.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SEED = 5, SAMPLES = 2 };
static const char folder[] = "build/exchange";

/* ---- a plan, its bundle, and a world of ranks that run it ---- */

struct shape {
    const char *name;
    int ranks, hidden, inter, experts, topk;
    int max_tokens;         /* of one rank in one pass */
    const char *model;      /* lines of the model file: router, activation, ... */
    const char *deployment; /* lines of the deployment file: dispatch, num_slots, ... */
};

struct world {
    char why[600];
    struct shape shape;
    char path[256];
    moert_bundle *bundle;
    moert_world *world;
    const struct moe_plan_class *c;
    struct ref_random *random;
    struct ref_layer ref;
    moert_context *context[MOE_MAX_RANKS];
    moert_layer *layer[MOE_MAX_RANKS];
    struct trial trial[MOE_MAX_RANKS];
    int tokens[MOE_MAX_RANKS];
};

static bool no(struct world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool no(struct world *w, const char *fmt, ...) {
    va_list list;
    va_start(list, fmt);
    vsnprintf(w->why, sizeof w->why, fmt, list);
    va_end(list);
    return false;
}
static bool good(struct world *w, moert_result r, const char *what) {
    return r == MOERT_OK || no(w, "%s: %s", what, moert_last_error());
}

static const char plain[] = "router: {method: softmax_topk, norm_topk_prob: true}\n";

/* Compiles the shape's plan for the host. */
static bool compile(struct world *w, const struct shape *s) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct overrides o = {0};
    struct build_options options = {.jobs = 1, .out = w->path};
    struct build_report report;
    char model[256], file[256];
    w->shape = *s;
    snprintf(w->path, sizeof w->path, "%s/%s.moe", folder, s->name);
    snprintf(model, sizeof model, "%s/%s.model.yaml", folder, s->name);
    snprintf(file, sizeof file, "%s/%s.yaml", folder, s->name);
    char *text = arena_printf(
        &a,
        "name: %s\nnum_hidden_layers: 1\nmoe_layers: all\nhidden_size: %d\n"
        "moe_intermediate_size: %d\nnum_experts: %d\nnum_experts_per_tok: %d\n%s",
        s->name, s->hidden, s->inter, s->experts, s->topk, s->model ? s->model : plain);
    char *plan = arena_printf(
        &a, "model: %s.model.yaml\ntarget: host\ncluster: {ranks: %d, nvlink_domain: %d}\n%s",
        s->name, s->ranks, s->ranks, s->deployment ? s->deployment : "");
    char *set = arena_printf(&a, "moe_config.max_num_tokens=%d", s->max_tokens * s->ranks);
    const char *sets[] = {set};
    o.set = sets;
    o.num_set = 1;
    bool ok = !dir_make(folder) && !file_write(model, text, strlen(text)) &&
              !file_write(file, plan, strlen(plan));
    struct deployment *dep = ok ? deployment_read(&a, &d, file, &o) : NULL;
    struct plan *p = dep ? plan_make(&a, &d, dep, 1) : NULL;
    ok = p && bundle_build(&a, &d, p, &options, &report);
    diag_print(&d, stderr);
    arena_free(&a);
    return ok || no(w, "%s does not compile", s->name);
}

static bool make_context(struct world *w, int rank) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    cfg.device = MOERT_HOST;
    cfg.host_threads = 1;
    cfg.world = w->world;
    cfg.rank = rank;
    return good(w, moert_context_create(w->bundle, &cfg, &w->context[rank]), "context") &&
           good(w, moert_layer_create(w->context[rank], 0, &w->layer[rank]), "layer") &&
           good(w, moert_layer_random(w->layer[rank], SEED), "weights");
}

/* Opens the compiled bundle as a world; timeout_ms 0: so long that no test waits for it. */
static bool open_world(struct world *w, int timeout_ms) {
    moert_world_config cfg = MOERT_WORLD_CONFIG_INIT;
    setenv("MOERT_CXXFLAGS", "-O1", 0);
    cfg.ranks = w->shape.ranks;
    cfg.timeout_ms = timeout_ms;
    if (!good(w, moert_bundle_open(w->path, &w->bundle), w->path) ||
        !good(w, moert_world_local(&cfg, &w->world), "world"))
        return false;
    w->c = moert_tool_class(w->bundle, 0);
    for (int r = 0; r < cfg.ranks; r++)
        if (!make_context(w, r))
            return false;
    w->random = ref_random_layer(w->c, SEED, 0, &w->ref);
    return good(w, moert_world_connect(w->world), "connect");
}

static void close_world(struct world *w) {
    for (int r = 0; r < MOE_MAX_RANKS; r++) {
        if (w->trial[r].context)
            trial_close(&w->trial[r]);
        moert_layer_destroy(w->layer[r]);
        moert_context_destroy(w->context[r]);
    }
    ref_random_free(w->random);
    moert_world_destroy(w->world);
    moert_bundle_close(w->bundle);
    memset((char *)w + sizeof w->why, 0, sizeof *w - sizeof w->why);
}

static struct world *new_world(const struct shape *s) {
    struct world *w = calloc(1, sizeof *w);
    cr_assert(w);
    cr_assert(compile(w, s) && open_world(w, 0), "%s", w->why);
    return w;
}
static void delete_world(struct world *w) {
    close_world(w);
    free(w);
}

/* Random activations: rank r has counts[r % num] tokens. */
static bool draw(struct world *w, const int *counts, int num, moert_dtype x) {
    for (int r = 0; r < w->c->ranks; r++) {
        struct trial *t = &w->trial[r];
        if (t->context)
            trial_close(t);
        w->tokens[r] = counts[r % num];
        if (!good(w,
                  trial_open(t, w->context[r], w->layer[r], w->c, w->tokens[r], x, MOERT_FP32),
                  "buffers"))
            return false;
        trial_random_x(t, (unsigned)(SEED + r), 0);
        t->io.rank_tokens = w->tokens;
        if (!good(w, trial_upload(t), "upload"))
            return false;
    }
    return true;
}

static bool forward(struct world *w) {
    moert_io io[MOE_MAX_RANKS];
    for (int r = 0; r < w->c->ranks; r++)
        io[r] = w->trial[r].io;
    return good(w, moert_world_forward(w->world, w->layer, io, NULL), "forward");
}

static bool download(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        if (!good(w, trial_download(&w->trial[r]), "download"))
            return false;
        else if (trial_overran(&w->trial[r]))
            return no(w, "rank %d wrote beyond its tokens", r);
    return true;
}

/* ---- what must be so ---- */

/* The local slot on `rank` that serves the entry-th choice of `source`, found in the plan's table
 * alone; -1: it is not there. For experts with one replica. */
static int slot_on(const struct world *w, int rank, int expert) {
    const int32_t *at =
        w->bundle->tables + w->bundle->layers[0].expert_of_slot + rank * w->c->slots_per_rank;
    for (int s = 0; s < w->c->slots_per_rank; s++)
        if (at[s] == expert)
            return s;
    return -1;
}

struct received { /* what a rank holds after a dispatch of `stride` tokens per rank */
    const struct moe_arena_head *head;
    const int *ids, *sources;
    const float *weights;
    const unsigned short *hidden;
    const float *results;
    int stride;
};

static struct received look(const struct world *w, int rank) {
    const char *arena = (const char *)w->context[rank]->arena;
    struct moe_peers at;
    struct received in = {.head = (const void *)arena};
    moe_arena_layout(w->c, &at);
    in.ids = (const void *)(arena + at.ids);
    in.weights = (const void *)(arena + at.weights);
    in.sources = (const void *)(arena + at.sources);
    in.hidden = (const void *)(arena + at.hidden);
    for (int r = 0; r < w->c->ranks; r++)
        in.stride = w->tokens[r] > in.stride ? w->tokens[r] : in.stride;
    return in;
}

/* Row `row` of what `rank` received is token t of `source`, bit for bit. */
static bool same_row(struct world *w, int rank, int source, int t, long row) {
    struct received in = look(w, rank);
    const struct trial *from = &w->trial[source];
    const int k = w->c->topk, h = w->c->hidden;
    if (in.sources[row] != t)
        return no(w, "rank %d, row %ld: token %d, not %d", rank, row, in.sources[row], t);
    for (int j = 0; j < k; j++)
        if (in.ids[row * k + j] != slot_on(w, rank, from->idx[t * k + j]) ||
            in.weights[row * k + j] != from->weight[t * k + j])
            return no(w, "rank %d, row %ld: choice %d is slot %d", rank, row, j,
                      in.ids[row * k + j]);
    for (int i = 0; i < h; i++) {
        unsigned u;
        float v = ref_bf16(from->x[(size_t)t * (size_t)h + (size_t)i]);
        memcpy(&u, &v, 4);
        if (in.hidden[row * h + i] != u >> 16)
            return no(w, "rank %d, row %ld: element %d differs", rank, row, i);
    }
    return true;
}

/* What `rank` received from `source`: each token that chose one of its experts, once, in order. */
static bool check_received(struct world *w, int rank, int source) {
    struct received in = look(w, rank);
    const struct trial *from = &w->trial[source];
    const int k = w->c->topk;
    long row = (long)source * in.stride, first = row;
    for (int t = 0; t < w->tokens[source]; t++) {
        bool comes = false;
        for (int j = 0; j < k; j++)
            comes = comes || slot_on(w, rank, from->idx[t * k + j]) >= 0;
        if (comes && !same_row(w, rank, source, t, row++))
            return false;
    }
    if ((long)(unsigned)in.head->dispatched[source] != row - first)
        return no(w, "rank %d: %u tokens of rank %d, not %ld", rank,
                  (unsigned)in.head->dispatched[source], source, row - first);
    for (; row < first + in.stride; row++)
        for (int j = 0; j < k; j++)
            if (in.ids[row * k + j] != -1)
                return no(w, "rank %d, row %ld is not empty", rank, row);
    return true;
}

static bool check_dispatch(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        for (int s = 0; s < w->c->ranks; s++)
            if (!check_received(w, r, s))
                return false;
    return true;
}

static bool check_results(struct world *w, enum trial_choice choice, int samples) {
    for (int r = 0; r < w->c->ranks; r++) {
        int sample[64], n = trial_sample(w->tokens[r], samples, sample);
        struct trial_error e;
        char text[200];
        if (!trial_compare(&w->trial[r], &w->ref, choice, sample, n, &e))
            return no(w, "out of memory");
        trial_describe(&e, text, sizeof text);
        if (!trial_passes(&e))
            return no(w, "rank %d: %s", r, text);
    }
    return true;
}

static void step_all(struct world *w,
                     moert_result (*step)(moert_layer *l, const moert_io *io, moert_stream s)) {
    for (int r = 0; r < w->c->ranks; r++)
        cr_assert_eq(step(w->layer[r], &w->trial[r].io, NULL), MOERT_OK, "%s",
                     moert_last_error());
}

/* The results alone, without the choice. */
static bool fetch_out(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        if (!good(w,
                  moert_tool_download(w->context[r], w->trial[r].out, w->trial[r].io.out,
                                      (size_t)w->tokens[r] * (size_t)w->c->hidden * 4),
                  "download"))
            return false;
    return true;
}

/* The results of all ranks, to compare runs. */
static float *keep(const struct world *w) {
    size_t n = 0, h = (size_t)w->c->hidden;
    for (int r = 0; r < w->c->ranks; r++)
        n += (size_t)w->tokens[r] * h;
    float *all = malloc((n + 1) * sizeof *all), *at = all;
    for (int r = 0; all && r < w->c->ranks; at += (size_t)w->tokens[r++] * h)
        memcpy(at, w->trial[r].out, (size_t)w->tokens[r] * h * 4);
    return all;
}
static bool same_as(struct world *w, const float *kept, const char *what) {
    size_t h = (size_t)w->c->hidden;
    for (int r = 0; r < w->c->ranks; kept += (size_t)w->tokens[r++] * h)
        if (memcmp(kept, w->trial[r].out, (size_t)w->tokens[r] * h * 4))
            return no(w, "rank %d: %s differs", r, what);
    return true;
}

/* One batch: dispatch, results, and, unless it is long, a second run. */
static bool check_batch(struct world *w, const int *counts, int num, moert_dtype x,
                        int samples) {
    if (!draw(w, counts, num, x) || !forward(w) || !download(w) || !check_dispatch(w) ||
        !check_results(w, TRIAL_ROUTED, samples))
        return false;
    float *first = keep(w);
    double elements = 0;
    for (int r = 0; r < w->c->ranks; r++)
        elements += (double)w->tokens[r] * w->c->topk * w->c->hidden;
    bool ok = first && elements > 3e5;
    ok = ok || (first && forward(w) && download(w) && same_as(w, first, "a second run"));
    free(first);
    return ok;
}

/* ---- the cover ---- */

static const int world_sizes[][2] = {{1, 5}, {2, 5}, {4, 17}, {4, 22}, {8, 17}}; /* R, E */
static const int topks[] = {1, 2, 4, 8};
static const int hiddens[] = {1024, 2880, 4096, 7168};
static const int batches[][4] = {
    {32, 32, 32, 32}, {16, 32, 48, 64}, {32, 0, 16, 0}, {1, 1, 1, 1}};
#define LEN(a) ((int)(sizeof(a) / sizeof *(a)))
static const int levels[] = {LEN(world_sizes), LEN(topks), LEN(hiddens), LEN(batches)};
enum { FACTORS = LEN(levels), MAX_LEVELS = 5, MAX_ROWS = 64 };

struct cover {
    bool seen[FACTORS][MAX_LEVELS][FACTORS][MAX_LEVELS];
    int row[MAX_ROWS][FACTORS];
    int rows;
};

static bool is_legal(const int *row) {
    return topks[row[1]] <= world_sizes[row[0]][1];
}

static int next_row(int *row) {
    for (int f = 0; f < FACTORS; f++) {
        if (++row[f] < levels[f])
            return 1;
        row[f] = 0;
    }
    return 0;
}

/* What a row costs, in elements of rows that experts work on; a new source has to be compiled. */
static double work(const struct cover *c, const int *row) {
    int tokens = 0;
    for (int r = 0; r < world_sizes[row[0]][0]; r++)
        tokens += batches[row[3]][r % 4];
    double base = 7e5;
    for (int i = 0; i < c->rows; i++)
        if (!memcmp(c->row[i] + 1, row + 1, 2 * sizeof *row) &&
            world_sizes[c->row[i][0]][1] == world_sizes[row[0]][1])
            base = 2e5;
    return base + (double)tokens * topks[row[1]] * hiddens[row[2]];
}

static int new_pairs(struct cover *c, const int *row, bool take) {
    int n = 0;
    for (int f = 0; f < FACTORS; f++)
        for (int g = f + 1; g < FACTORS; g++) {
            bool *seen = &c->seen[f][row[f]][g][row[g]];
            n += !*seen;
            *seen = *seen || take;
        }
    return n;
}

/* Takes rows of the most new pairs for their work until every pair is there. */
static void make_cover(struct cover *c) {
    for (;;) {
        int row[FACTORS] = {0}, best[FACTORS] = {0};
        double most = 0;
        do {
            double gain = is_legal(row) ? new_pairs(c, row, false) / sqrt(work(c, row)) : 0;
            if (gain > most) {
                most = gain;
                memcpy(best, row, sizeof best);
            }
        } while (next_row(row));
        if (most == 0 || c->rows == MAX_ROWS)
            return;
        new_pairs(c, best, true);
        memcpy(c->row[c->rows++], best, sizeof best);
    }
}

static void check_row(const int *row, int number) {
    char name[32];
    snprintf(name, sizeof name, "cover%d", number);
    struct shape s = {name,
                      world_sizes[row[0]][0],
                      hiddens[row[2]],
                      64,
                      world_sizes[row[0]][1],
                      topks[row[1]],
                      64,
                      NULL,
                      NULL};
    struct world *w = calloc(1, sizeof *w);
    cr_assert(w);
    bool ok = compile(w, &s) && open_world(w, 0);
    if (ok && s.ranks > 1)
        ok = check_batch(w, batches[row[3]], 4, MOERT_BF16, SAMPLES);
    else if (ok)
        ok = draw(w, batches[row[3]], 4, MOERT_BF16) && forward(w) && download(w) &&
             check_results(w, TRIAL_ROUTED, SAMPLES);
    cr_expect(ok, "R=%d E=%d k=%d H=%d T=%d,..: %s", s.ranks, s.experts, s.topk, s.hidden,
              batches[row[3]][0], w->why);
    delete_world(w);
}

TestSuite(exchange, .timeout = 600);

static void check_share_of_cover(int part, int parts) {
    struct cover c = {.rows = 0};
    make_cover(&c);
    cr_assert(c.rows >= 16 && c.rows < MAX_ROWS, "%d rows", c.rows);
    for (int i = part; i < c.rows; i += parts)
        check_row(c.row[i], i);
}
Test(exchange, dispatch_is_bit_exact_and_results_are_right_for_every_pair_of_settings) {
    check_share_of_cover(0, 2);
}
Test(exchange, dispatch_is_bit_exact_and_results_are_right_for_the_other_pairs_of_settings) {
    check_share_of_cover(1, 2);
}

/* ---- rules ---- */

static const struct shape small = {"small", 4, 80, 48, 22, 4, 16, NULL, NULL};

Test(exchange, the_ranks_that_experts_do_not_divide_into_hold_one_more_at_the_front) {
    struct world *w = new_world(&small);
    const int counts[] = {16, 3, 0, 9};
    int held[4] = {0};
    for (int r = 0; r < 4; r++)
        for (int e = 0; e < 22; e++)
            held[r] += slot_on(w, r, e) >= 0;
    cr_expect(held[0] == 6 && held[1] == 6 && held[2] == 5 && held[3] == 5);
    cr_expect(check_batch(w, counts, 4, MOERT_FP32, 16), "%s", w->why);
    delete_world(w);
}

/* The results of one rank that has all experts and all ranks' tokens. */
Test(exchange, several_ranks_give_the_bits_of_one) {
    struct shape one = small;
    struct world *w = new_world(&small);
    const int counts[] = {16, 3, 0, 9};
    one.name = "one", one.ranks = 1, one.max_tokens = 64;
    cr_assert(draw(w, counts, 4, MOERT_BF16) && forward(w) && download(w), "%s", w->why);
    struct world *alone = new_world(&one);
    const size_t h = (size_t)w->c->hidden;
    for (int r = 0; r < 4; r++) {
        struct trial *t = &alone->trial[0];
        cr_assert(draw(alone, &counts[r], 1, MOERT_BF16), "%s", alone->why);
        memcpy(t->x, w->trial[r].x, (size_t)counts[r] * h * 4);
        cr_assert_eq(trial_upload(t), MOERT_OK);
        cr_assert(forward(alone) && download(alone), "%s", alone->why);
        cr_expect_eq(memcmp(t->out, w->trial[r].out, (size_t)counts[r] * h * 4), 0, "rank %d",
                     r);
    }
    delete_world(alone);
    delete_world(w);
}

Test(exchange, batches_beyond_max_tokens_go_in_as_many_chunks_on_every_rank) {
    struct world *w = new_world(&small);
    const int counts[] = {50, 0, 7, 16}, alike[] = {33}, none[] = {0};
    cr_expect(draw(w, counts, 4, MOERT_FP32) && forward(w) && download(w) &&
                  check_results(w, TRIAL_ROUTED, 64),
              "%s", w->why);
    cr_expect_eq(look(w, 1).head->epoch, 4, "50 tokens are 4 chunks of at most 16");
    cr_expect(draw(w, alike, 1, MOERT_BF16) && forward(w) && download(w) &&
                  check_results(w, TRIAL_ROUTED, 64),
              "%s", w->why);
    cr_expect_eq(look(w, 2).head->epoch, 7);
    cr_expect(draw(w, none, 1, MOERT_BF16) && forward(w) && download(w), "%s", w->why);
    cr_expect_eq(look(w, 2).head->epoch, 7, "where no rank has tokens, nothing runs");
    delete_world(w);
}

Test(exchange, shared_experts_biases_and_weights_on_the_input_come_through) {
    static const struct shape shapes[] = {
        {"ashared", 2, 80, 48, 16, 4, 16,
         "router: {method: deepseek_v3, n_group: 4, topk_group: 2, norm_topk_prob: true,\n"
         "  routed_scaling_factor: 2.5}\nshared_experts: {intermediate_size: 80, gate: true}\n",
         NULL},
        {"abias", 2, 80, 48, 10, 4, 16,
         "router: {method: topk_softmax, bias: true}\n"
         "activation: {name: swiglu_oai, alpha: 1.702, limit: 0.9}\nweights: {bias: true}\n",
         NULL},
        {"ainput", 3, 80, 48, 8, 1, 16,
         "router: {method: llama4}\nshared_experts: {intermediate_size: 48}\n", NULL},
    };
    const int counts[] = {13, 0, 16};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct world *w = new_world(&shapes[i]);
        cr_expect(check_batch(w, counts + (shapes[i].ranks == 2), 3, MOERT_FP32, 16), "%s: %s",
                  shapes[i].name, w->why);
        cr_expect(check_batch(w, counts, 1, MOERT_BF16, 16), "%s: %s", shapes[i].name, w->why);
        delete_world(w);
    }
}

Test(exchange, top_32_on_128_ranks) {
    static const struct shape s = {"many", 128, 16, 16, 130, 32, 2, NULL, NULL};
    struct world *w = new_world(&s);
    const int counts[] = {1, 0, 2, 0, 0};
    cr_expect(check_batch(w, counts, 5, MOERT_BF16, 2), "%s", w->why);
    delete_world(w);
}

Test(exchange, the_callers_choice_may_name_no_expert_and_one_twice) {
    struct world *w = new_world(&small);
    const int counts[] = {5, 16, 0, 9};
    cr_assert(draw(w, counts, 4, MOERT_BF16), "%s", w->why);
    for (int r = 0; r < 4; r++) {
        struct trial *t = &w->trial[r];
        for (int i = 0; i < counts[r] * 4; i++) {
            static const int ids[] = {3, -1, 21, 22, 3, 3, 7, 1 << 30, 11, -7, 0};
            t->idx[i] = ids[(i + r) % 11];
            t->weight[i] = (float)(i % 7 + 1) / 8;
        }
        cr_assert_eq(trial_upload(t), MOERT_OK);
    }
    step_all(w, moert_dispatch_send);
    step_all(w, moert_dispatch_wait);
    step_all(w, moert_experts);
    step_all(w, moert_combine_send);
    step_all(w, moert_combine_wait);
    for (int r = 0; r < 4;
         r++) /* the reference has no word for "no expert": weight 0 instead */
        for (int i = 0; i < counts[r] * 4; i++)
            if (w->trial[r].idx[i] < 0 || w->trial[r].idx[i] >= 22)
                w->trial[r].idx[i] = 0, w->trial[r].weight[i] = 0;
    cr_expect(fetch_out(w) && check_results(w, TRIAL_GIVEN, 16), "%s", w->why);
    delete_world(w);
}
