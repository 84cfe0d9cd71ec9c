/* Several ranks in one process on the CPU: what each receives against the routing counted anew,
 * results against the reference, runs against each other bit for bit, and whoever stays away. */
#include "world_checks.h"

#include "../runtime/internal.h"

#include "fake_nccl.h"

#include <criterion/criterion.h>
#include <dlfcn.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SAMPLES = 2 };
static const char folder[] = "build/exchange";

static struct world *new_world(const struct shape *s) {
    if (s->ranks <= 8) /* small: sooner compiled than run */
        setenv("MOERT_CXXFLAGS", "-O0", 0);
    struct world *w = calloc(1, sizeof *w);
    cr_assert(w);
    cr_assert(world_compile(w, s, folder, "host") && world_open(w, MOERT_HOST, 0), "%s",
              w->why);
    return w;
}
static void delete_world(struct world *w) {
    world_close(w);
    free(w);
}

#define FAILS(call, result, text) \
    do { \
        cr_expect_eq(call, result); \
        cr_expect(strstr(moert_last_error(), text), "\"%s\" does not say \"%s\"", \
                  moert_last_error(), text); \
    } while (0)

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
    const unsigned short *hidden; /* bf16, or */
    const unsigned char *hidden8; /* e4m3 times */
    const float *scales;
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
    in.hidden8 = (const void *)(arena + at.hidden);
    in.scales = (const void *)(arena + at.scales);
    for (int r = 0; r < w->c->ranks; r++)
        in.stride = w->tokens[r] > in.stride ? w->tokens[r] : in.stride;
    return in;
}

/* The first element of a received row that is not x as the kernels multiply it; -1: none. */
static int different(const struct world *w, const struct received *in, long row,
                     const float *x) {
    const int h = w->c->hidden, blocks = (h + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK;
    float *want = malloc((size_t)h * sizeof *want);
    int i = 0;
    cr_assert(want);
    memcpy(want, x, (size_t)h * sizeof *want);
    if (moe_is_fp8(w->c))
        ref_quantise(want, h);
    for (; i < h; i++) {
        unsigned u = (unsigned)in->hidden[row * h + i] << 16;
        float got;
        memcpy(&got, &u, 4);
        if (moe_is_fp8(w->c))
            got = ref_of_e4m3(in->hidden8[row * h + i]) *
                  in->scales[row * blocks + i / MOE_SCALE_BLOCK];
        if (got != (moe_is_fp8(w->c) ? want[i] : ref_bf16(want[i])))
            break;
    }
    free(want);
    return i < h ? i : -1;
}

/* Row `row` of what `rank` received is token t of `source`, bit for bit. */
static bool same_row(struct world *w, int rank, int source, int t, long row) {
    struct received in = look(w, rank);
    const struct trial *from = &w->trial[source];
    const int k = w->c->topk;
    if (in.sources[row] != t)
        return world_no(w, "rank %d, row %ld: token %d, not %d", rank, row, in.sources[row], t);
    for (int j = 0; j < k; j++)
        if (in.ids[row * k + j] != slot_on(w, rank, from->idx[t * k + j]) ||
            in.weights[row * k + j] != from->weight[t * k + j])
            return world_no(w, "rank %d, row %ld: choice %d is slot %d", rank, row, j,
                            in.ids[row * k + j]);
    int at = different(w, &in, row, from->x + (size_t)t * (size_t)w->c->hidden);
    return at < 0 || world_no(w, "rank %d, row %ld: element %d differs", rank, row, at);
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
    unsigned came = in.head->dispatched[source] & MOE_FLAG_TOKENS;
    if (came != row - first)
        return world_no(w, "rank %d: %u tokens of rank %d, not %ld", rank, came, source,
                        row - first);
    for (; row < first + in.stride; row++)
        for (int j = 0; j < k; j++)
            if (in.ids[row * k + j] != -1)
                return world_no(w, "rank %d, row %ld is not empty", rank, row);
    return true;
}

static bool check_dispatch(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        for (int s = 0; s < w->c->ranks; s++)
            if (!check_received(w, r, s))
                return false;
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
        if (!world_good(w,
                        moert_tool_download(w->context[r], w->trial[r].out, w->trial[r].io.out,
                                            (size_t)w->tokens[r] * (size_t)w->c->hidden * 4),
                        "download"))
            return false;
    return true;
}

/* One batch: dispatch, results, and, unless it is long, a second run. */
static bool check_batch(struct world *w, const int *counts, int num, moert_dtype x,
                        int samples) {
    if (!world_draw(w, counts, num, x) || !world_forward(w) || !world_download(w) ||
        !check_dispatch(w) || !world_results(w, TRIAL_ROUTED, samples))
        return false;
    float *first = world_keep(w);
    double elements = 0;
    for (int r = 0; r < w->c->ranks; r++)
        elements += (double)w->tokens[r] * w->c->topk * w->c->hidden;
    bool ok = first && elements > 1e5;
    ok = ok || (first && world_forward(w) && world_download(w) &&
                world_same(w, first, "a second run"));
    free(first);
    return ok;
}

/* ---- the cover ---- */

static const int sizes[] = {2, 4, 8};
/* Experts, top-k, hidden size: what a source is compiled for, so few of them. */
static const int kinds[][3] = {
    {9, 1, 2880}, {22, 2, 1024}, {22, 8, 4096}, {17, 4, 7168}, {17, 8, 1024}};
static const int batches[][4] = {{4, 4, 4, 4}, {2, 4, 6, 8}, {4, 0, 3, 0}, {1, 1, 1, 1}};
#define LEN(a) ((int)(sizeof(a) / sizeof *(a)))
static const int levels[] = {LEN(sizes), LEN(kinds), LEN(batches)};
enum { FACTORS = LEN(levels), MAX_LEVELS = 5, MAX_ROWS = 64 };

struct cover {
    bool seen[FACTORS][MAX_LEVELS][FACTORS][MAX_LEVELS];
    int row[MAX_ROWS][FACTORS];
    int rows;
};

static int next_row(int *row) {
    for (int f = 0; f < FACTORS; f++) {
        if (++row[f] < levels[f])
            return 1;
        row[f] = 0;
    }
    return 0;
}

/* What a row costs, in elements of rows that experts work on. */
static double work(const int *row) {
    int tokens = 0;
    for (int r = 0; r < sizes[row[0]]; r++)
        tokens += batches[row[2]][r % 4];
    return 1e5 + (double)tokens * kinds[row[1]][1] * kinds[row[1]][2];
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
            double gain = new_pairs(c, row, false) / sqrt(work(row));
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
    setenv("MOERT_CXXFLAGS", "-O1", 0);
    char name[32];
    snprintf(name, sizeof name, "cover%d", number);
    const int *kind = kinds[row[1]], *batch = batches[row[2]];
    struct shape s = {name, sizes[row[0]], kind[2], 16, kind[0], kind[1], 16, NULL, NULL};
    struct world *w = calloc(1, sizeof *w);
    cr_assert(w);
    bool ok = world_compile(w, &s, folder, "host") && world_open(w, MOERT_HOST, 0);
    ok = ok && check_batch(w, batch, 4, MOERT_BF16, SAMPLES);
    cr_expect(ok, "R=%d E=%d k=%d H=%d T=%d,..: %s", s.ranks, s.experts, s.topk, s.hidden,
              batch[0], w->why);
    delete_world(w);
}

TestSuite(exchange, .timeout = 600);

Test(exchange, dispatch_is_bit_exact_and_results_are_right_for_every_pair_of_settings) {
    struct cover c = {.rows = 0};
    make_cover(&c);
    cr_assert(c.rows >= 15 && c.rows < MAX_ROWS, "%d rows", c.rows);
    for (int i = 0; i < c.rows; i++)
        check_row(c.row[i], i);
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
static void check_bits_of_one(const struct shape *s) {
    struct shape one = *s;
    struct world *w = new_world(s);
    const int counts[] = {16, 3, 0, 9};
    one.name = "one", one.ranks = 1, one.max_tokens = 64;
    cr_assert(world_draw(w, counts, 4, MOERT_BF16) && world_forward(w) && world_download(w),
              "%s", w->why);
    struct world *alone = new_world(&one);
    const size_t h = (size_t)w->c->hidden;
    for (int r = 0; r < 4; r++) {
        struct trial *t = &alone->trial[0];
        cr_assert(world_draw(alone, &counts[r], 1, MOERT_BF16), "%s", alone->why);
        memcpy(t->x, w->trial[r].x, (size_t)counts[r] * h * 4);
        cr_assert_eq(trial_upload(t), MOERT_OK);
        cr_assert(world_forward(alone) && world_download(alone), "%s", alone->why);
        cr_expect_eq(memcmp(t->out, w->trial[r].out, (size_t)counts[r] * h * 4), 0, "rank %d",
                     r);
    }
    delete_world(alone);
    delete_world(w);
}
Test(exchange, several_ranks_give_the_bits_of_one) {
    check_bits_of_one(&small);
}
/* Quantised before it is sent. */
static const struct shape small8 = {"small8",
                                    4,
                                    272,
                                    144,
                                    22,
                                    4,
                                    16,
                                    "router: {method: softmax_topk, norm_topk_prob: true}\n"
                                    "shared_experts: {intermediate_size: 80}\n"
                                    "weights: {format: fp8_block, block: [128, 128]}\n",
                                    NULL};
Test(exchange, several_ranks_in_fp8_give_the_bits_of_one) {
    check_bits_of_one(&small8);
}
Test(exchange, fp8_tokens_come_with_their_scales) {
    struct world *w = new_world(&small8);
    const int counts[] = {16, 3, 0, 9};
    cr_expect(check_batch(w, counts, 4, MOERT_FP32, 16), "%s", w->why);
    cr_expect(check_batch(w, counts, 4, MOERT_BF16, 16), "%s", w->why);
    delete_world(w);
}

Test(exchange, batches_beyond_max_tokens_go_in_as_many_chunks_on_every_rank) {
    struct world *w = new_world(&small);
    const int counts[] = {50, 0, 7, 16}, alike[] = {33}, none[] = {0};
    cr_expect(world_draw(w, counts, 4, MOERT_FP32) && world_forward(w) && world_download(w) &&
                  world_results(w, TRIAL_ROUTED, 64),
              "%s", w->why);
    cr_expect_eq(look(w, 1).head->epoch, 4, "50 tokens are 4 chunks of at most 16");
    cr_expect(world_draw(w, alike, 1, MOERT_BF16) && world_forward(w) && world_download(w) &&
                  world_results(w, TRIAL_ROUTED, 64),
              "%s", w->why);
    cr_expect_eq(look(w, 2).head->epoch, 7);
    cr_expect(world_draw(w, none, 1, MOERT_BF16) && world_forward(w) && world_download(w), "%s",
              w->why);
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

#ifdef __SANITIZE_ADDRESS__ /* whose leak checker takes no more thread-local memory of libraries */
enum { MANY = 48 };
#else
enum { MANY = MOE_MAX_RANKS };
#endif
Test(exchange, top_32_on_128_ranks) {
    static const struct shape s = {"many", MANY, 16, 16, 130, 32, 2, NULL, NULL};
    struct world *w = new_world(&s);
    const int counts[] = {1, 0, 2, 0, 0};
    cr_expect(world_draw(w, counts, 5, MOERT_BF16) && world_forward(w) && world_download(w) &&
                  check_dispatch(w) && world_results(w, TRIAL_ROUTED, 2),
              "%s", w->why);
    delete_world(w);
}

Test(exchange, the_callers_choice_may_name_no_expert_and_one_twice) {
    struct world *w = new_world(&small);
    const int counts[] = {5, 16, 0, 9};
    cr_assert(world_draw(w, counts, 4, MOERT_BF16), "%s", w->why);
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
    cr_expect(fetch_out(w) && world_results(w, TRIAL_GIVEN, 16), "%s", w->why);
    delete_world(w);
}

Test(exchange, moec_run_takes_the_ranks_of_the_plan_and_no_others) {
    struct world *w = new_world(&small);
    char *right[] = {"run", w->path,    "--device", "host", "--ranks",
                     "4",   "--tokens", "37",       NULL};
    char *wrong[] = {"run", w->path, "--device", "host", "--ranks", "2", NULL};
    cr_expect_eq(cmd_run(8, right), 0);
    optind = 1;
    cr_expect_eq(cmd_run(6, wrong), 1);
    delete_world(w);
}

/* ---- replicas ---- */

static const struct shape replicated = {
    "replicated", 4,    32,
    16,           6,    2,
    700,          NULL, "dispatch: share\nmoe_config: {load_balancer: {num_slots: 12}}\n"};

/* Entries that each slot over all ranks was given, from what the ranks hold. */
static void count_slots(const struct world *w, int *count) {
    for (int r = 0; r < w->c->ranks; r++) {
        struct received in = look(w, r);
        for (int i = 0; i < w->c->ranks * in.stride * w->c->topk; i++)
            if (in.ids[i] >= 0)
                count[r * w->c->slots_per_rank + in.ids[i]]++;
    }
}

/* More entries than a block of any kernel takes. */
static const int many[] = {700, 40, 31, 555};

/* A batch on replicas: results are right, and how many entries each slot served. */
static struct world *run_replicas(const char *dispatch, int *count) {
    struct shape s = replicated;
    char text[128], name[32];
    snprintf(text, sizeof text, "dispatch: %s\nmoe_config: {load_balancer: {num_slots: 12}}\n",
             dispatch);
    snprintf(name, sizeof name, "replicas_%s", dispatch);
    s.deployment = text;
    s.name = name;
    struct world *w = new_world(&s);
    cr_assert(world_draw(w, many, 4, MOERT_BF16) && world_forward(w) && world_download(w) &&
                  world_results(w, TRIAL_ROUTED, 40),
              "%s", w->why);
    count_slots(w, count);
    return w;
}

/* Replicas in turn, one entry after the other; round robin begins anew every 1024 entries. */
static void count_turns(const struct world *w, bool round, int *count) {
    const int32_t *expert = w->bundle->tables + w->bundle->layers[0].expert_of_slot;
    int slots = w->c->ranks * w->c->slots_per_rank;
    for (int r = 0; r < w->c->ranks; r++) {
        int nth[6] = {0};
        for (int i = 0; i < w->tokens[r] * w->c->topk; i++) {
            int e = w->trial[r].idx[i], mine[12], n = 0;
            if (round && i % 1024 == 0)
                memset(nth, 0, sizeof nth);
            for (int s = 0; s < slots; s++)
                if (expert[s] == e)
                    mine[n++] = s;
            count[mine[(nth[e]++ + (round ? i / 1024 : 0) + r) % n]]++;
        }
    }
}

Test(exchange, replicas_take_turns_or_their_shares) {
    static const char *const names[] = {"roundrobin", "even", "share"};
    for (int i = 0; i < 3; i++) {
        int count[12] = {0}, turns[12] = {0}, total[6] = {0}, replicas[6] = {0};
        struct world *w = run_replicas(names[i], count);
        const int32_t *expert = w->bundle->tables + w->bundle->layers[0].expert_of_slot;
        const int32_t *share = w->bundle->tables + w->bundle->layers[0].share_of_slot;
        count_turns(w, i == 0, turns);
        for (int s = 0; s < 12; s++) {
            cr_expect(i == 2 || count[s] == turns[s], "%s, slot %d: %d, not %d", names[i], s,
                      count[s], turns[s]);
            total[expert[s]] += count[s];
            replicas[expert[s]]++;
        }
        for (int s = 0; s < 12;
             s++) { /* 4 ranks split on their own: each is off by at most 1 or so */
            double part = i < 2 ? 1.0 / replicas[expert[s]] : share[s] / 65536.0;
            cr_expect_leq(fabs(count[s] - part * total[expert[s]]), 8, "%s, slot %d: %d of %d",
                          names[i], s, count[s], total[expert[s]]);
        }
        delete_world(w);
    }
}

Test(exchange, balanced_dispatch_of_replicas_is_refused_in_so_many_words) {
    struct shape s = replicated;
    struct world *w = calloc(1, sizeof *w);
    s.name = "balanced";
    s.deployment = "dispatch: balanced\nmoe_config: {load_balancer: {num_slots: 12}}\n";
    cr_assert(world_compile(w, &s, folder, "host"), "%s", w->why);
    cr_expect_not(world_open(w, MOERT_HOST, 0));
    cr_expect(strstr(w->why, "dispatch is balanced"), "%s", w->why);
    delete_world(w);
}

/* ---- ranks side by side ---- */

enum { ROUNDS = 12 };
struct side {
    struct world *w;
    int rank;
    moert_result result;
    char why[300];
};

static void *run_side(void *arg) {
    struct side *s = arg;
    for (int i = 0; i < ROUNDS && s->result == MOERT_OK; i++)
        s->result = moert_forward(s->w->layer[s->rank], &s->w->trial[s->rank].io, NULL);
    if (s->result != MOERT_OK)
        snprintf(s->why, sizeof s->why, "%s", moert_last_error());
    return NULL;
}

/* Ranks 0..n-1 in threads of their own. */
static void run_sides(struct world *w, struct side *side, int n) {
    pthread_t thread[MOE_MAX_RANKS];
    for (int r = 0; r < n; r++) {
        side[r] = (struct side){.w = w, .rank = r};
        cr_assert_eq(pthread_create(&thread[r], NULL, run_side, &side[r]), 0);
    }
    for (int r = 0; r < n; r++)
        pthread_join(thread[r], NULL);
}

Test(exchange, ranks_in_threads_give_the_bits_of_ranks_in_turns) {
    static const struct shape s = {"threads", 4, 32, 16, 9, 3, 8, NULL, NULL};
    struct world *w = new_world(&s);
    struct side side[4];
    const int counts[] = {8, 0, 13, 1};
    cr_assert(world_draw(w, counts, 4, MOERT_BF16) && world_forward(w) && world_download(w),
              "%s", w->why);
    float *turns = world_keep(w);
    for (int r = 0; r < 4; r++)
        cr_assert_eq(trial_upload(&w->trial[r]), MOERT_OK);
    run_sides(w, side, 4);
    for (int r = 0; r < 4; r++)
        cr_expect_eq(side[r].result, MOERT_OK, "rank %d: %s", r, side[r].why);
    cr_expect(world_download(w) && world_same(w, turns, "a run side by side"), "%s", w->why);
    cr_expect_eq(look(w, 3).head->epoch, 2 * (ROUNDS + 1));
    free(turns);
    delete_world(w);
}

/* ---- faults ---- */

static struct world *impatient_world(int timeout_ms) {
    static const struct shape s = {"faults", 4, 32, 16, 9, 3, 8, NULL, NULL};
    struct world *w = calloc(1, sizeof *w);
    const int counts[] = {3, 8, 2, 1};
    cr_assert(w && world_compile(w, &s, folder, "host") &&
                  world_open(w, MOERT_HOST, timeout_ms) && world_draw(w, counts, 4, MOERT_BF16),
              "%s", w->why);
    return w;
}

Test(exchange, a_rank_that_stays_away_is_named_by_those_that_wait) {
    struct world *w = impatient_world(200);
    struct side side[4];
    run_sides(w, side, 3); /* not rank 3 */
    for (int r = 0; r < 3; r++) {
        cr_expect_eq(side[r].result, MOERT_PEER);
        cr_expect(strstr(side[r].why, "waiting for rank 3 in dispatch 1; missing: 3"), "%s",
                  side[r].why);
    }
    cr_expect_eq(moert_world_check(w->world), MOERT_PEER);
    cr_expect_eq(moert_forward(w->layer[0], &w->trial[0].io, NULL), MOERT_PEER,
                 "what follows is refused");
    cr_expect_eq(moert_forward(w->layer[3], &w->trial[3].io, NULL), MOERT_PEER,
                 "nobody sends results to who comes late");
    cr_expect(strstr(moert_last_error(), "rank 3 gave up waiting") &&
                  strstr(moert_last_error(), "in combine 1; missing: 0, 1, 2"),
              "%s", moert_last_error());
    delete_world(w);
}

/* Rank 3 sends its tokens and is not seen again. */
Test(exchange, a_rank_that_stops_between_dispatch_and_combine_is_named) {
    struct world *w = impatient_world(200);
    struct side side[4];
    cr_assert_eq(moert_route(w->layer[3], &w->trial[3].io, NULL), MOERT_OK);
    cr_assert_eq(moert_dispatch_send(w->layer[3], &w->trial[3].io, NULL), MOERT_OK);
    run_sides(w, side, 3);
    for (int r = 0; r < 3; r++) {
        char begin[64];
        snprintf(begin, sizeof begin, "rank %d gave up waiting for rank 3 in combine 1; ", r);
        cr_expect_eq(side[r].result, MOERT_PEER);
        cr_expect(!strncmp(side[r].why, begin, strlen(begin)) &&
                      strstr(side[r].why, "missing: 3"),
                  "%s", side[r].why);
        cr_expect(w->context[r]->status->rank == r && w->context[r]->status->peer == 3 &&
                  w->context[r]->status->phase == MOE_PHASE_COMBINE &&
                  w->context[r]->status->epoch == 1);
    }
    delete_world(w);
}

/* Every expert on two ranks; rank 3 has stayed away. */
static struct world *bereaved_world(const char *dispatch) {
    static char name[32], text[128];
    const int counts[] = {9, 31, 40, 12};
    struct side side[4];
    struct world *w = calloc(1, sizeof *w);
    snprintf(name, sizeof name, "bereaved_%s", dispatch);
    snprintf(text, sizeof text, "dispatch: %s\nmoe_config: {load_balancer: {num_slots: 12}}\n",
             dispatch);
    const struct shape s = {name, 4, 32, 16, 6, 2, 40, NULL, text};
    cr_assert(w && world_compile(w, &s, folder, "host") && world_open(w, MOERT_HOST, 200) &&
                  world_draw(w, counts, 4, MOERT_BF16),
              "%s", w->why);
    run_sides(w, side, 3);
    cr_assert_eq(moert_world_check(w->world), MOERT_PEER);
    return w;
}

static void check_survivors(struct world *w) {
    const int counts[] = {40, 0, 33, 0};
    int count[12] = {0}, all = 0;
    struct side side[3];
    cr_expect(world_draw(w, counts, 4, MOERT_BF16) && world_forward(w) && world_download(w) &&
                  world_results(w, TRIAL_ROUTED, 40),
              "%s", w->why);
    count_slots(w, count);
    for (int s = 0; s < 12; s++)
        all += s / 3 == 3 ? 0 : count[s];
    cr_expect_eq(all, 73 * 2, "every entry is served by those that are left");
    float *turns = world_keep(w);
    run_sides(w, side, 3);
    for (int r = 0; r < 3; r++)
        cr_expect_eq(side[r].result, MOERT_OK, "rank %d: %s", r, side[r].why);
    cr_expect(world_download(w) && world_same(w, turns, "a run side by side"), "%s", w->why);
    cr_expect_eq(look(w, 1).head->epoch, 1 + ROUNDS, "epochs begin anew");
    free(turns);
}

Test(exchange, ranks_go_on_without_one_whose_experts_others_have) {
    static const char *const dispatches[] = {"even", "share"};
    for (int i = 0; i < 2; i++) {
        struct world *w = bereaved_world(dispatches[i]);
        cr_assert_eq(moert_exclude_rank(w->world, 3), MOERT_OK, "%s", moert_last_error());
        cr_expect_eq(moert_world_check(w->world), MOERT_OK);
        check_survivors(w);
        cr_expect_eq(moert_forward(w->layer[3], &w->trial[3].io, NULL), MOERT_PEER);
        cr_expect_str_eq(moert_last_error(), "rank 3 is left out");
        cr_expect_eq(moert_exclude_rank(w->world, 3), MOERT_INVALID, "twice");
        trial_close(&w->trial[3]);
        moert_layer_destroy(w->layer[3]);
        moert_context_destroy(w->context[3]);
        w->layer[3] = NULL, w->context[3] = NULL;
        memset(&w->trial[3], 0, sizeof w->trial[3]);
        cr_expect(world_forward(w), "without its context, too: %s", w->why);
        delete_world(w);
    }
}

Test(exchange, a_rank_that_alone_has_an_expert_cannot_be_left_out) {
    struct world *w = bereaved_world("even");
    int counts[] = {10, 10, 10, 1}, refused = 0;
    cr_assert_eq(moert_exclude_rank(w->world, 3), MOERT_OK, "%s", moert_last_error());
    cr_assert(world_draw(w, counts, 4, MOERT_BF16), "%s", w->why);
    cr_expect_eq(moert_forward(w->layer[0], &w->trial[0].io, NULL), MOERT_INVALID);
    cr_expect_str_eq(moert_last_error(),
                     "moert_io: rank_tokens[3] is 1, but rank 3 is left out");
    counts[3] = 0;
    for (int r = 0; r < 3; r++) { /* an expert of rank 3 is now on one rank alone */
        char want[64];
        snprintf(want, sizeof want, "rank %d cannot be left out: no other has expert ", r);
        if (moert_exclude_rank(w->world, r) == MOERT_OK) {
            counts[r] = 0;
            continue;
        }
        refused++;
        cr_expect(!strncmp(moert_last_error(), want, strlen(want)) &&
                      strstr(moert_last_error(), " of layer 0"),
                  "%s", moert_last_error());
    }
    cr_expect(refused > 0);
    cr_expect(world_draw(w, counts, 4, MOERT_BF16) && world_forward(w) && world_download(w) &&
                  world_results(w, TRIAL_ROUTED, 10),
              "%s", w->why);
    delete_world(w);
    w = impatient_world(0);
    cr_expect_eq(moert_exclude_rank(w->world, 2), MOERT_INVALID, "no expert has two replicas");
    cr_expect_eq(moert_exclude_rank(w->world, 4), MOERT_INVALID);
    cr_expect_eq(moert_exclude_rank(w->world, -1), MOERT_INVALID);
    cr_expect_eq(moert_exclude_rank(NULL, 0), MOERT_INVALID);
    cr_expect(world_forward(w), "what was refused changes nothing: %s", w->why);
    delete_world(w);
}

static void *abort_soon(void *world) {
    usleep(50000);
    moert_world_abort(world);
    return NULL;
}

Test(exchange, an_abort_ends_every_wait) {
    struct world *w = impatient_world(0);
    struct side side[2];
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, abort_soon, w->world), 0);
    run_sides(w, side, 2);
    pthread_join(thread, NULL);
    for (int r = 0; r < 2; r++)
        cr_expect(side[r].result == MOERT_PEER && strstr(side[r].why, "aborted; missing: 2, 3"),
                  "%s", side[r].why);
    delete_world(w);
}

/* ---- set-up ---- */

/* FACTS: rank-major, 128 tokens on each of 8 ranks, H 7168, k 8: 2H + 80 bytes a row received and
 * 2H a result (14.7 MB of results). */
Test(exchange, an_arena_is_no_larger_than_rank_major_rows_need) {
    struct moe_plan_class c = {
        .hidden = 7168, .topk = 8, .ranks = 8, .max_tokens = 128, .experts = 256};
    struct moe_peers at;
    long long rows = 8ll * 128 * (2 * 7168 + 80), results = 128ll * 8 * 2 * 7168;
    cr_expect_leq(moe_arena_layout(&c, &at), rows + results);
    cr_expect_leq(at.ids % 256 + at.weights % 256 + at.sources % 256 + at.hidden % 256 +
                      at.results % 256,
                  0);
}

Test(exchange, arenas_that_differ_name_the_rank) {
    struct shape longer = {"longer", 4, 32, 16, 9, 3, 9, NULL, NULL};
    struct world *w = calloc(1, sizeof *w);
    moert_bundle *other;
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    cr_assert(world_compile(w, &longer, folder, "host"), "%s", w->why);
    delete_world(w);
    w = impatient_world(0);
    cr_expect_neq(moert_arena_bytes(w->bundle), 0);
    trial_close(&w->trial[2]);
    moert_layer_destroy(w->layer[2]);
    moert_context_destroy(w->context[2]);
    w->layer[2] = NULL, w->context[2] = NULL;
    cr_expect_eq(moert_world_connect(w->world), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "rank 2 of 4 has no context yet"));
    cr_assert_eq(moert_bundle_open("build/exchange/longer.moe", &other), MOERT_OK);
    cfg.device = MOERT_HOST;
    cfg.world = w->world;
    cfg.rank = 1;
    cr_expect_eq(moert_context_create(other, &cfg, &w->context[2]), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "rank 1 has a context already"));
    cfg.rank = 2;
    cr_assert_eq(moert_context_create(other, &cfg, &w->context[2]), MOERT_OK);
    cr_expect_eq(moert_world_connect(w->world), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "rank 2 has an arena of"), "%s", moert_last_error());
    cr_expect_eq(moert_forward(w->layer[0], &w->trial[0].io, NULL), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "moert_world_connect comes before"));
    moert_context_destroy(w->context[2]);
    w->context[2] = NULL;
    delete_world(w);
    moert_bundle_close(other);
}

Test(exchange, counts_that_are_missing_or_wrong_are_refused) {
    struct world *w = impatient_world(0);
    moert_io io = w->trial[1].io;
    int counts[] = {3, 8, -2, 1};
    io.rank_tokens = NULL;
    cr_expect_eq(moert_forward(w->layer[1], &io, NULL), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "rank_tokens is NULL"));
    io.rank_tokens = counts;
    cr_expect_eq(moert_forward(w->layer[1], &io, NULL), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "rank_tokens[2] is -2"));
    counts[2] = 2, counts[1] = 7;
    cr_expect_eq(moert_forward(w->layer[1], &io, NULL), MOERT_INVALID);
    cr_expect(
        strstr(moert_last_error(), "num_tokens is 8, rank_tokens[1], of this rank, is 7"));
    counts[1] = 8, counts[3] = 9;
    cr_expect_eq(moert_dispatch_send(w->layer[1], &io, NULL), MOERT_INVALID, "two chunks");
    cr_expect(strstr(moert_last_error(), "9 tokens of a rank in one step: at most 8"));
    moert_io ios[4];
    const int agreed[] = {3, 8, 2, 1};
    for (int r = 0; r < 4; r++) {
        ios[r] = w->trial[r].io;
        ios[r].rank_tokens = r ? agreed : counts;
        ios[r].num_tokens = agreed[r];
    }
    cr_expect_eq(moert_world_forward(w->world, w->layer, ios, NULL), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "ios[1]: its rank_tokens make 1 passes, those before "
                                         "it 2"),
              "%s", moert_last_error());
    delete_world(w);
}

Test(exchange, a_local_world_takes_nothing_that_is_for_processes) {
    moert_world_config c = MOERT_WORLD_CONFIG_INIT;
    moert_world *w = (moert_world *)1;
    c.ranks = 2;
    c.address = "127.0.0.1:4000";
    cr_expect_eq(moert_world_local(&c, &w), MOERT_INVALID);
    cr_expect(!w && strstr(moert_last_error(), "are for worlds of processes"));
}

/* ---- collectives ---- */

static const char *const collectives[] = {"allgather", "alltoall"};

/* A world whose policy chooses the method; s->deployment NULL. */
static struct world *collective_world(const struct shape *s, const char *method,
                                      const char *more) {
    char name[64], policy[128], text[256], source[128];
    struct shape own = *s;
    mkdir("build", 0777);
    mkdir(folder, 0777);
    snprintf(name, sizeof name, "%s_%s", method, s->name);
    snprintf(policy, sizeof policy, "%s/%s.lua", folder, method);
    snprintf(source, sizeof source, "return {exchange = function() return '%s' end}\n", method);
    snprintf(text, sizeof text, "policy: ./%s.lua\n%s", method, more);
    cr_assert_not(file_write(policy, source, strlen(source)));
    own.name = name;
    own.deployment = text;
    struct world *w = new_world(&own);
    for (uint32_t i = 0; i < w->bundle->count[MOE_SECTION_BUCKET]; i++)
        cr_assert_eq(w->bundle->buckets[i].exchange, !strcmp(method, "allgather")
                                                         ? MOE_EXCHANGE_ALLGATHER
                                                         : MOE_EXCHANGE_ALLTOALL);
    return w;
}

/* Of the tokens that a rank gets by all-to-all, all but the source's number is as with stores. */
static bool check_swapped(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        for (int s = 0; s < w->c->ranks; s++) {
            struct received in = look(w, r);
            int *sources = (int *)in.sources;
            long row = (long)s * in.stride;
            for (int t = 0; t < w->tokens[s]; t++)
                for (int j = 0, done = 0; j < w->c->topk && !done; j++)
                    if (slot_on(w, r, w->trial[s].idx[t * w->c->topk + j]) >= 0)
                        sources[row++] = t, done = 1;
            if (!check_received(w, r, s))
                return false;
        }
    return true;
}

static bool check_collective(struct world *w, const int *counts, int num, moert_dtype x,
                             bool swaps) {
    if (!world_draw(w, counts, num, x) || !world_forward(w) || !world_download(w) ||
        (swaps && !check_swapped(w)) || !world_results(w, TRIAL_ROUTED, 8))
        return false;
    float *first = world_keep(w);
    bool ok =
        first && world_forward(w) && world_download(w) && world_same(w, first, "a second run");
    free(first);
    return ok;
}

Test(exchange, collectives_bring_the_same_tokens_and_results) {
    static const struct shape shapes[] = {
        {"csmall", 4, 80, 48, 22, 4, 16, NULL, NULL},
        {"cinput", 3, 80, 48, 8, 1, 16,
         "router: {method: llama4}\nshared_experts: {intermediate_size: 48}\n", NULL},
        {"cfp8", 4, 144, 80, 10, 4, 16,
         "router: {method: softmax_topk, norm_topk_prob: true}\n"
         "shared_experts: {intermediate_size: 80}\n"
         "weights: {format: fp8_block, block: [128, 128]}\n",
         NULL},
    };
    const int counts[] = {13, 0, 16, 5}, longer[] = {50, 0, 7, 16}, none[] = {0};
    for (int m = 0; m < LEN(collectives); m++)
        for (int i = 0; i < LEN(shapes); i++) {
            struct world *w = collective_world(&shapes[i], collectives[m], "");
            cr_expect(check_collective(w, counts, 4, MOERT_FP32, m == 1), "%s, %s: %s",
                      collectives[m], shapes[i].name, w->why);
            cr_expect(i || check_collective(w, longer, 4, MOERT_BF16, false), "%s, %s: %s",
                      collectives[m], shapes[i].name, w->why);
            cr_expect(world_draw(w, none, 1, MOERT_BF16) && world_forward(w), "%s", w->why);
            delete_world(w);
        }
}

Test(exchange, collectives_serve_ranks_side_by_side_and_what_a_lost_one_leaves) {
    static const struct shape s = {"cside", 4, 32, 16, 6, 2, 40, NULL, NULL};
    const int counts[] = {8, 0, 33, 9}, fewer[] = {8, 5, 33, 0};
    for (int m = 0; m < LEN(collectives); m++) {
        struct side side[4];
        struct world *w =
            collective_world(&s, collectives[m],
                             "dispatch: even\nmoe_config: {load_balancer: {num_slots: 12}}\n");
        cr_assert(world_draw(w, counts, 4, MOERT_BF16) && world_forward(w) && world_download(w),
                  "%s", w->why);
        float *turns = world_keep(w);
        run_sides(w, side, 4);
        for (int r = 0; r < 4; r++)
            cr_expect_eq(side[r].result, MOERT_OK, "rank %d: %s", r, side[r].why);
        cr_expect(world_download(w) && world_same(w, turns, "a run side by side"), "%s: %s",
                  collectives[m], w->why);
        cr_assert_eq(moert_exclude_rank(w->world, 3), MOERT_OK, "%s", moert_last_error());
        cr_expect(check_collective(w, fewer, 4, MOERT_BF16, false), "%s: %s", collectives[m],
                  w->why);
        free(turns);
        delete_world(w);
    }
}

/* ---- processes ---- */

enum { APART_MS = 20000 };
static const char *const launchers[][3] = {
    {"RANK", "WORLD_SIZE", NULL},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE"},
    {"PMI_RANK", "PMI_SIZE", "PMI_JOBID"},
    {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID"},
};
static void no_launcher(void) {
    static const char *const names[] = {"MASTER_ADDR", "MASTER_PORT", "NCCL_COMM_ID"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++)
        for (int j = 0; j < 3; j++)
            if (launchers[i][j])
                unsetenv(launchers[i][j]);
}

/* A port that nobody has, and the next. */
static int free_port(void) {
    for (int port = 31000 + getpid() % 4000 * 2;; port += 2) {
        struct sockaddr_in a = {.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)(port + 1)),
                                .sin_addr = {htonl(INADDR_LOOPBACK)}};
        int s = socket(AF_INET, SOCK_STREAM, 0), no = bind(s, (void *)&a, sizeof a);
        close(s);
        if (!no)
            return port;
    }
}

struct job {                   /* what a process of a test's job does */
    const struct world *local; /* the same ranks in turns: its bundle, tokens and choice */
    const float *want;         /* its results; NULL: whatever comes */
    moert_world_config cfg;
    int mute; /* this rank goes away before the second forward; -1: none */
    moert_world *world;
    moert_context *context;
    moert_layer *layer;
    struct trial trial;
    int rank;
    char why[500];
    bool (*join)(struct job *j); /* NULL: join_job */
    const char *far;             /* joining fails so */
};

static bool job_good(struct job *j, moert_result r, const char *what) {
    if (r != MOERT_OK)
        snprintf(j->why, sizeof j->why, "rank %d: %s: %s", j->rank, what, moert_last_error());
    return r == MOERT_OK;
}

static bool join_job(struct job *j) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    if (!job_good(j, moert_world_processes(&j->cfg, &j->world), "world"))
        return false;
    j->rank = cfg.rank = moert_world_rank(j->world);
    cfg.device = MOERT_HOST;
    cfg.host_threads = 1;
    cfg.world = j->world;
    const struct world *w = j->local;
    return job_good(j, moert_context_create(w->bundle, &cfg, &j->context), "context") &&
           job_good(j, moert_layer_create(j->context, 0, &j->layer), "layer") &&
           job_good(j, moert_layer_random(j->layer, WORLD_SEED), "weights") &&
           job_good(j, moert_world_connect(j->world), "connect") &&
           job_good(j,
                    trial_open(&j->trial, j->context, j->layer, w->c, w->tokens[j->rank],
                               w->trial[j->rank].io.x_dtype, MOERT_FP32),
                    "buffers");
}

static bool run_job(struct job *j) {
    const struct world *w = j->local;
    size_t h = (size_t)w->c->hidden, first = 0;
    j->trial.io.rank_tokens = w->tokens;
    trial_random_x(&j->trial, (unsigned)(WORLD_SEED + j->rank), 0);
    if (!job_good(j, trial_upload(&j->trial), "upload"))
        return false;
    for (int i = 0; i < 3; i++) {
        if (i && j->rank == j->mute)
            return true;
        if (!job_good(j, moert_forward(j->layer, &j->trial.io, NULL), "forward"))
            return false;
    }
    if (!job_good(j, trial_download(&j->trial), "download"))
        return false;
    for (int r = 0; r < j->rank; r++)
        first += (size_t)w->tokens[r] * h;
    if (j->want && memcmp(j->want + first, j->trial.out, (size_t)w->tokens[j->rank] * h * 4)) {
        snprintf(j->why, sizeof j->why, "rank %d: the results differ", j->rank);
        return false;
    }
    return true;
}

static void leave_job(struct job *j) {
    if (j->trial.context)
        trial_close(&j->trial);
    moert_layer_destroy(j->layer);
    moert_context_destroy(j->context);
    moert_world_destroy(j->world);
}

/* Runs `ranks` processes, each with what the launcher would have told it; 0, or how many failed. */
static int run_processes(const struct job *base, int ranks, int launcher, int port,
                         bool (*run)(struct job *j)) {
    pid_t child[MOE_MAX_RANKS];
    int failed = 0, status;
    fflush(NULL);
    for (int r = 0; r < ranks; r++) {
        child[r] = fork();
        if (child[r])
            continue;
        struct job j = *base;
        char text[32];
        alarm(60);
        no_launcher();
        snprintf(text, sizeof text, "%d", r);
        setenv(launchers[launcher][0], text, 1);
        snprintf(text, sizeof text, "%d", ranks);
        setenv(launchers[launcher][1], text, 1);
        snprintf(text, sizeof text, "%d", port);
        if (launchers[launcher][2]) {
            setenv(launchers[launcher][2], text, 1); /* names the job */
        } else {
            setenv("MASTER_ADDR", "127.0.0.1", 1);
            setenv("MASTER_PORT", text, 1);
        }
        bool ok = (j.join ? j.join(&j) : join_job(&j)) != !!j.far && run(&j);
        if (!ok)
            printf("%s\n", j.why);
        leave_job(&j);
        fflush(stdout);
        _exit(ok ? 0 : 1);
    }
    for (int r = 0; r < ranks; r++)
        failed += waitpid(child[r], &status, 0) < 0 || status != 0;
    return failed;
}

static struct job new_job(const struct world *w, const float *want) {
    struct job j = {.local = w, .want = want, .mute = -1};
    j.cfg = (moert_world_config)MOERT_WORLD_CONFIG_INIT;
    j.cfg.timeout_ms = APART_MS;
    return j;
}

Test(exchange, processes_give_the_bits_of_ranks_in_turns_whatever_started_them) {
    static const struct shape s = {"apart", 3, 32, 16, 9, 3, 8, NULL, NULL};
    const int counts[] = {8, 0, 13};
    struct world *w = new_world(&s);
    cr_assert(world_draw(w, counts, 3, MOERT_BF16) && world_forward(w) && world_download(w),
              "%s", w->why);
    float *want = world_keep(w);
    struct job j = new_job(w, want);
    for (int i = 0; i < LEN(launchers); i++)
        cr_expect_eq(run_processes(&j, 3, i, free_port(), run_job), 0, "%s", launchers[i][0]);
    free(want);
    delete_world(w);
}

/* Three processes give the bits of ranks in turns by both collectives; join: how one enters. */
static void check_apart(const char *name, bool (*join)(struct job *j)) {
    const struct shape s = {name, 3, 32, 16, 9, 3, 8, NULL, NULL};
    const int counts[] = {8, 0, 13};
    for (int m = 0; m < LEN(collectives); m++) {
        struct world *w = collective_world(&s, collectives[m], "");
        cr_assert(world_draw(w, counts, 3, MOERT_BF16) && world_forward(w) && world_download(w),
                  "%s", w->why);
        float *want = world_keep(w);
        struct job j = new_job(w, want);
        j.join = join;
        cr_expect_eq(run_processes(&j, 3, 0, free_port(), run_job), 0, "%s", collectives[m]);
        free(want);
        delete_world(w);
    }
}

Test(exchange, processes_exchange_by_collectives) {
    check_apart("capart", join_job);
}

/* A stand-in for NCCL, which dlopen then finds by its name. */
static void load_fake_nccl(void) {
    char source[] = "build/exchange/fake_nccl.c", library[] = "build/exchange/libnccl.so.2";
    mkdir("build", 0777);
    mkdir(folder, 0777);
    cr_assert_not(file_write(source, fake_nccl_source, strlen(fake_nccl_source)));
    cr_assert_eq(system("cc -std=gnu11 -O1 -shared -fPIC -Wl,-soname,libnccl.so.2 -o "
                        "build/exchange/libnccl.so.2 build/exchange/fake_nccl.c"),
                 0);
    void *l = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    cr_assert(l, "%s", dlerror());
    void *area = mmap(NULL, *(size_t *)dlsym(l, "fake_bytes"), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(area, MAP_FAILED);
    *(void **)dlsym(l, "fake_area") = area;
}

/* Every process says that it is a node. */
static bool join_far(struct job *j) {
    char node[32];
    snprintf(node, sizeof node, "node %d", (int)getpid());
    setenv("MOERT_NODE", node, 1);
    return join_job(j);
}

Test(exchange, processes_on_several_nodes_exchange_by_nccl) {
    load_fake_nccl();
    check_apart("far", join_far);
}

static bool refused(struct job *j) {
    return j->far && strstr(j->why, j->far);
}
Test(exchange, stores_do_not_reach_other_nodes) {
    static const struct shape s = {"apart", 3, 32, 16, 9, 3, 8, NULL, NULL};
    const int counts[] = {8, 0, 13};
    struct world *w = new_world(&s);
    cr_assert(world_draw(w, counts, 3, MOERT_BF16), "%s", w->why);
    struct job j = new_job(w, NULL);
    j.join = join_far;
    j.far = "by onesided, which needs each other's memory";
    cr_expect_eq(run_processes(&j, 3, 0, free_port(), refused), 0);
    delete_world(w);
}

/* Rank 3 answers no more; the others find it out, leave it out, and go on. */
static bool run_bereaved(struct job *j) {
    struct trial *t = &j->trial;
    int counts[4];
    if (j->rank == j->mute)
        return run_job(j);
    if (run_job(j) || moert_world_check(j->world) != MOERT_PEER)
        return false;
    memcpy(counts, j->local->tokens, sizeof counts);
    counts[j->mute] = 0;
    t->io.rank_tokens = counts;
    for (int i = 0; i < 3; i++)
        if (!job_good(j, i ? MOERT_OK : moert_exclude_rank(j->world, j->mute), "exclude") ||
            !job_good(j, moert_forward(j->layer, &t->io, NULL), "forward"))
            return false;
    int sample[64], n = trial_sample(t->tokens, 40, sample);
    struct trial_error e;
    return job_good(j, trial_download(t), "download") &&
           trial_compare(t, &j->local->ref, TRIAL_ROUTED, sample, n, &e) && trial_passes(&e);
}

Test(exchange, processes_go_on_without_one_that_is_gone) {
    struct world *w = bereaved_world("even");
    struct job j = new_job(w, NULL);
    j.cfg.timeout_ms = 1000;
    j.mute = 3;
    cr_expect_eq(run_processes(&j, 4, 0, free_port(), run_bereaved), 0);
    delete_world(w);
}

static moert_result meet(int ranks, int rank, const char *address, int timeout_ms) {
    moert_world_config cfg = MOERT_WORLD_CONFIG_INIT;
    moert_world *w;
    cfg.ranks = ranks;
    cfg.rank = rank;
    cfg.address = address;
    cfg.timeout_ms = timeout_ms;
    moert_result r = moert_world_processes(&cfg, &w);
    cr_expect_eq(w == NULL, r != MOERT_OK);
    moert_world_destroy(w);
    return r;
}

Test(exchange, processes_that_cannot_meet_say_why) {
    char address[32];
    no_launcher();
    FAILS(meet(0, 0, NULL, 50), MOERT_INVALID, "no launcher (torchrun, mpirun, srun)");
    FAILS(meet(2, 2, NULL, 50), MOERT_INVALID, "rank 2 of 2");
    FAILS(meet(2, 1, NULL, 50), MOERT_INVALID, "set MASTER_ADDR and MASTER_PORT");
    FAILS(meet(2, 1, "nowhere", 50), MOERT_INVALID, "\"nowhere\" is no address HOST:PORT");
    FAILS(meet(2, 1, "a:99999", 50), MOERT_INVALID, "no address");
    snprintf(address, sizeof address, "127.0.0.1:%d", free_port() + 1);
    FAILS(meet(2, 1, address, 50), MOERT_PEER, "rank 1 cannot reach rank 0 at 127.0.0.1:");
    FAILS(meet(3, 0, address, 50), MOERT_PEER, "have not come to 127.0.0.1:");
    cr_expect(strstr(moert_last_error(), ": 1, 2"), "%s", moert_last_error());
    setenv("WORLD_SIZE", "two", 1);
    setenv("RANK", "0", 1);
    FAILS(meet(0, 0, NULL, 50), MOERT_INVALID, "WORLD_SIZE is \"two\", expected 1 to 128");
    setenv("WORLD_SIZE", "2", 1);
    setenv("RANK", "2", 1);
    FAILS(meet(0, 0, NULL, 50), MOERT_INVALID, "RANK is \"2\", expected 0 to 1");
    setenv("RANK", "0", 1);
    setenv("WORLD_SIZE", "1", 1);
    cr_expect_eq(meet(0, 0, NULL, 50), MOERT_OK, "one rank meets nobody");
}

/* ---- planted faults ---- */

struct mutant {
    const char *what, *text, *instead; /* text occurs once in templates/exchange.cuh */
};
static const struct mutant mutants[] = {
    {"a place too far", "int place = base + below", "int place = base + 1 + below"},
    {"lanes counted from the wrong end", "mask & ~(0xffffffffu << threadIdx.x % 32)",
     "mask & (0xfffffffeu << threadIdx.x % 32)"},
    {"tokens that stay away counted, too", "to ? __popc(same) : 32 - __popc(same)",
     "__popc(same)"},
    {"only the last choice says where a token goes", "j, rank) || to;", "j, rank);"},
    {"another rank's slots sent along", "there ? slot[i] % a.params.slots",
     "true ? slot[i] % a.params.slots"},
    {"one weight for all choices", "a.topk_weight[t * kTopK + i]", "a.topk_weight[t * kTopK]"},
    {"all sources in one place", "? x.rank * x.stride + place", "? place"},
    {"no flag for who gets nothing", "dispatched[x.rank],",
     "dispatched[x.rank], !static_cast<int *>(a.ws[MOE_WS_TOKENS_TO])[r] ? 0 :"},
    {"the epoch stays where it was", "head->epoch = epoch;", ";"},
    {"a wait that does not look at the epoch",
     "~static_cast<moe_u64>(MOE_FLAG_TOKENS)) == wanted",
     "~static_cast<moe_u64>(MOE_FLAG_TOKENS)) != 0"},
    {"rows that nobody filled keep their slots", "ids[i] = -1;", ";"},
    {"a wait without an end", "clock_ns() - start > a.exchange.timeout", "false"},
    {"the block before the last raises the flags", "gridDim.x) - 1;", "gridDim.x) - 2;"},
    {"the counter of blocks is not reset", "*counter = 0;", ";"},
    {"results to the first choice", "* kTopK + j) * (kHidden / 8);",
     "* kTopK) * (kHidden / 8);"},
    {"results to the wrong token", "(static_cast<long long>(source) * kTopK + j)",
     "(static_cast<long long>(n % x.stride) * kTopK + j)"},
    {"results of an earlier batch", "combined[x.rank],", "combined[x.rank], ~0ull +"},
};
enum { NUM_MUTANTS = sizeof mutants / sizeof *mutants };

/* Puts the fault into the bundle's source, and its new hash into the manifest. */
static bool plant(struct world *w, const struct mutant *m) {
    struct arena a = {0};
    char *text, *manifest, hash[65];
    size_t len, bytes;
    char *source = arena_printf(&a, "%s/class0.cu", w->path);
    char *list = arena_printf(&a, "%s/MANIFEST", w->path);
    if (file_read(&a, source, 1 << 20, &text, &len) ||
        file_read(&a, list, 1 << 20, &manifest, &bytes))
        return world_no(w, "cannot read %s", w->path);
    char *at = strstr(text, m->text);
    if (!at || strstr(at + 1, m->text))
        return world_no(w, "its text is not there exactly once");
    char *changed =
        arena_printf(&a, "%.*s%s%s", (int)(at - text), text, m->instead, at + strlen(m->text));
    char *line = strstr(manifest, " class0.cu\n"), *begin = line;
    while (begin[-1] != '\n')
        begin--;
    rt_hash_hex(changed, strlen(changed), hash);
    char *whole = arena_printf(&a, "%.*sfile %s %zu%s", (int)(begin - manifest), manifest, hash,
                               strlen(changed), line);
    bool ok = !file_write(source, changed, strlen(changed)) &&
              !file_write(list, whole, strlen(whole));
    arena_free(&a);
    return ok || world_no(w, "cannot write %s", w->path);
}

/* A wait without its peers ends, and says so. */
static bool check_wait(struct world *w) {
    if (!world_good(w, moert_dispatch_send(w->layer[0], &w->trial[0].io, NULL), "send"))
        return false;
    return moert_dispatch_wait(w->layer[0], &w->trial[0].io, NULL) == MOERT_PEER ||
           world_no(w, "a wait ends before its peers have sent");
}

static bool check_counters(struct world *w) {
    for (int r = 0; r < w->c->ranks; r++)
        if (look(w, r).head->sent || look(w, r).head->returned)
            return world_no(w, "rank %d: a counter of blocks is not 0", r);
    return true;
}

enum verdict { GREEN, RED, BROKEN };

/* In a process of its own. */
static enum verdict judge(const struct mutant *m, int number) {
    char name[32];
    snprintf(name, sizeof name, "mutant%d", number);
    const struct shape s = {name, 4, 32, 16, 9, 3, 40, NULL, NULL};
    const int first[] = {40, 7, 33, 0}, second[] = {3, 0, 38, 35};
    struct world *w = calloc(1, sizeof *w);
    setenv("MOERT_CXXFLAGS", "-O0", 0);
    if (!w || !world_compile(w, &s, folder, "host") || (m && !plant(w, m))) {
        printf("%s: %s\n", m ? m->what : "unchanged", w ? w->why : "");
        fflush(stdout);
        return BROKEN;
    }
    bool ok = world_open(w, MOERT_HOST, 50);
    if (!ok) /* it must be a fault, not an error of the compiler */
        return BROKEN;
    ok = check_batch(w, first, 4, MOERT_BF16, 40) &&
         check_batch(w, second, 4, MOERT_FP32, 40) && check_counters(w) && check_wait(w);
    printf("%s: %s\n", m ? m->what : "unchanged", ok ? "green" : w->why);
    fflush(stdout);
    return ok ? GREEN : RED;
}

/* A crash and a minute without an end are red, too. */
static enum verdict judge_apart(const struct mutant *m, int number) {
    int status;
    fflush(NULL);
    pid_t pid = fork();
    if (!pid) {
        for (int n = 1; n < 32; n++)
            signal(n, SIG_DFL);
        alarm(number < 0 || m->instead[0] != 'f' ? 60 : 5);
        _exit((int)judge(m, number));
    }
    waitpid(pid, &status, 0);
    return WIFSIGNALED(status) ? RED : (enum verdict)WEXITSTATUS(status);
}

Test(exchange, the_kernels_as_they_are_pass_what_planted_faults_must_not) {
    cr_expect_eq(judge_apart(NULL, -1), GREEN);
}

Test(exchange, every_planted_fault_is_red) {
    for (int i = 0; i < NUM_MUTANTS; i++) {
        enum verdict v = judge_apart(&mutants[i], i);
        cr_expect_eq(v, RED, "%s: %s", mutants[i].what,
                     v == GREEN ? "nothing noticed it" : "was not tried");
    }
}
