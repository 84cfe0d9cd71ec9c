// The kernels that choose replicas, on the host target, against plain code and the compiler's split.
#include "../runtime/loadstats.h"
#include "assign_checks.h"
#include "kernels.h"

#include <criterion/criterion.h>
#include <time.h>

TestSuite(assign, .timeout = 300);

enum { NONE = -7 };

static struct arena arena;

static void open_kernels(struct kernels *k, int experts, int topk) {
    struct buf source;
    char path[128];
    snprintf(path, sizeof path, "build/assign-%d-%d-%d.cpp", (int)getpid(), experts, topk);
    cr_assert(assign_source(&arena, experts, topk, &source));
    cr_assert_eq(file_write(path, source.data, source.len), 0);
    bool ok = kernels_open(k, path, "-O1");
    remove(path);
    remove(arena_printf(&arena, "%s.so", path));
    cr_assert(ok, "%s: %s", path, k->why);
    remove(arena_printf(&arena, "%s.log", path));
}

static void launch(struct kernels *k, const char *kernel, int grid, int block, size_t smem,
                   const struct moe_args *args) {
    char error[256] = "";
    unsigned size[3] = {(unsigned)grid, 1, 1};
    cr_assert_eq(
        k->launch(kernel, size, (unsigned)block, (unsigned)smem, args, 2, error, sizeof error),
        0, "%s", error);
}

/* Memory that ends where something else begins. */
struct guarded {
    int32_t *data;
    size_t n;
};
static struct guarded guarded(size_t n) {
    struct guarded g = {malloc(sizeof(int32_t) * (n + 8)), n};
    for (size_t i = 0; i < n + 8; i++)
        g.data[i] = 0x5a5a5a5a;
    return g;
}
static void release(struct guarded *g) {
    for (size_t i = g->n; i < g->n + 8; i++)
        cr_assert_eq(g->data[i], 0x5a5a5a5a, "written beyond the end");
    free(g->data);
}

/* One rank's launches. */
struct rig {
    struct kernels *k;
    struct assign_trial *t;
    struct moe_args args;
    struct moe_assign assign;
    struct guarded target, parts, sums, total, begin, ends;
    int done, blocks;
};

static void rig_open(struct rig *r, struct kernels *k, struct assign_trial *t) {
    int entries = t->tokens * t->topk;
    *r = (struct rig){.k = k, .t = t};
    r->blocks = (entries + MOE_ASSIGN_PART - 1) / MOE_ASSIGN_PART;
    r->blocks += !r->blocks;
    r->target = guarded((size_t)entries);
    r->parts = guarded((size_t)(r->blocks * t->experts));
    r->sums = guarded((size_t)t->experts);
    memset(r->sums.data, 0, sizeof(int32_t) * (size_t)t->experts);
    r->total = guarded((size_t)t->experts);
    r->begin = guarded((size_t)t->experts);
    r->ends = guarded((size_t)t->tables.filled);
    r->assign = (struct moe_assign){.target = r->target.data,
                                    .first_slot = t->tables.first_slot,
                                    .slot_list = t->tables.slot_list,
                                    .share_end = t->tables.share_end,
                                    .pairs = t->tables.pairs,
                                    .part_counts = r->parts.data,
                                    .sums = r->sums.data,
                                    .total = r->total.data,
                                    .counts = t->counts,
                                    .begin = r->begin.data,
                                    .ends = r->ends.data,
                                    .done = &r->done,
                                    .rows = t->tables.rows,
                                    .ranks = t->ranks,
                                    .slots = t->tables.filled,
                                    .equal_ranks = !t->speed,
                                    .none = NONE};
}
static void rig_close(struct rig *r) {
    release(&r->target);
    release(&r->parts);
    release(&r->sums);
    release(&r->total);
    release(&r->begin);
    release(&r->ends);
    cr_assert_eq(r->done, 0);
}

static void rig_rank(struct rig *r, int rank) {
    r->assign.rank = rank;
    r->assign.offset = rank;
    r->args.fill = &r->assign;
    r->args.num_tokens = r->t->tokens;
    r->args.params.slots = r->t->slots;
    r->args.topk_idx = r->t->ids + (size_t)rank * (size_t)(r->t->tokens * r->t->topk);
}

static void run_replica(struct rig *r, int mode) {
    static const char *const names[] = {"moe_replica<0>", "moe_replica<1>", "moe_replica<2>"};
    launch(r->k, names[mode], r->blocks, MOE_ASSIGN_PART, 36 * (size_t)r->t->experts, &r->args);
}
static void run_tally(struct rig *r) {
    launch(r->k, "moe_tally<0>", r->blocks, 256, 4 * ((size_t)r->t->experts + 1), &r->args);
}
static void run_split(struct rig *r) {
    launch(r->k, "moe_split<0>", 1, 1024,
           4 * (size_t)(2 * r->t->experts + 3 * r->t->tables.filled + r->t->ranks), &r->args);
}

static void zipf(double *load, int n, double exponent, int shuffle) {
    for (int e = 0; e < n; e++)
        load[e] = pow(1 + (e * (2 * shuffle + 1) + shuffle) % n, -exponent);
}

struct shape {
    int experts, ranks, slots, tokens, topk;
    double exponent;
    bool speeds;
};
static const struct shape shapes[] = {
    {256, 4, 72, 300, 8, 0.8, false}, {5, 3, 3, 700, 2, 0.7, false},
    {1, 2, 1, 65, 1, 0, true},        {1000, 5, 220, 128, 8, 1, false},
    {130, 7, 24, 129, 6, 0.5, true},  {16, 16, 4, 64, 4, 1.2, false},
    {12, 1, 12, 33, 3, 0.4, false}};

static void each_rank(struct kernels *k, struct assign_trial *t, double *gap, double *off) {
    struct rig r;
    int32_t *ends = malloc(sizeof *ends * (size_t)t->tables.filled);
    rig_open(&r, k, t);
    for (int rank = 0; rank < t->ranks; rank++) {
        rig_rank(&r, rank);
        run_replica(&r, MOE_ASSIGN_ROUNDROBIN);
        cr_expect(assign_check_turns(t, rank, rank, NONE, r.target.data), "%s", t->why);
        run_tally(&r);
        run_replica(&r, MOE_ASSIGN_SHARE);
        cr_expect(assign_check_shares(t, rank, NONE, r.target.data, off), "%s", t->why);
        cr_expect(!memcmp(r.total.data, t->counts + rank * t->experts, 4 * (size_t)t->experts),
                  "rank %d is counted wrong", rank);
        run_split(&r);
        cr_expect(!rank || !memcmp(ends, r.ends.data, 4 * (size_t)t->tables.filled),
                  "rank %d splits differently", rank);
        memcpy(ends, r.ends.data, 4 * (size_t)t->tables.filled);
        cr_expect(assign_check_split(t, ends, 5e-3, gap), "%s", t->why);
        run_replica(&r, MOE_ASSIGN_BALANCED);
        cr_expect(assign_check_parts(t, rank, NONE, ends, r.target.data), "%s", t->why);
    }
    free(ends);
    rig_close(&r);
}

Test(assign, every_entry_goes_where_it_should) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *s = &shapes[i];
        struct assign_trial t = {s->experts, s->ranks, s->slots, s->tokens, s->topk};
        double load[1000], batch[1000], speed[16], gap = 0, off = 0;
        struct kernels k;
        for (int r = 0; r < s->ranks; r++)
            speed[r] = 1 + assign_roll();
        zipf(load, s->experts, s->exponent, 3);
        zipf(batch, s->experts, s->exponent * 0.9, i % 2 ? 3 : 5);
        cr_assert(assign_open(&t, load, batch, s->speeds ? speed : NULL, i % 2 ? 30 : 0));
        open_kernels(&k, s->experts, s->topk);
        each_rank(&k, &t, &gap, &off);
        printf("%d experts on %d ranks: fullest rank %.1e over the compiler's split, shares "
               "off by "
               "%.1f tokens\n",
               s->experts, s->ranks, gap, off);
        assign_close(&t);
        dlclose(k.library);
    }
    arena_free(&arena);
}

/* ---- batches of DeepSeek-V3 ---- */

enum { LAYERS = 58, SETS = 5 };
#ifdef __SANITIZE_ADDRESS__
enum { STEP = 20 };
#else
enum { STEP = 2 };
#endif
static double loads[SETS][LAYERS][256];

static void read_loads(void) {
    static const char *const names[SETS] = {"prefill_in512", "prefill_in1024", "prefill_in2048",
                                            "decode_in1000out1000", "decode_in2000out100"};
    for (int w = 0; w < SETS; w++) {
        char path[300];
        snprintf(path, sizeof path, "../shared/data/loads/deepseek-v3/%s.csv", names[w]);
        FILE *f = fopen(path, "r");
        if (!f)
            cr_skip_test("%s is not here", path);
        for (int i = 0; i < LAYERS * 256; i++)
            cr_assert_eq(fscanf(f, "%lf%*c", &loads[w][i / 256][i % 256]), 1);
        fclose(f);
    }
}

/* A rank's counts, as many as tokens * topk; ids are not needed. */
static void draw_counts(struct assign_trial *t, const double *load) {
    struct assign_trial all = *t;
    all.ids = malloc(sizeof *all.ids * (size_t)(t->ranks * t->tokens * t->topk));
    assign_draw(&all, load, 0);
    free(all.ids);
}

Test(assign, batches_are_split_as_well_as_the_compiler_does) {
    static const int shape[][3] = {{16, 17, 256}, {32, 9, 32},  {32, 9, 256},
                                   {32, 10, 256}, {72, 4, 128}, {64, 5, 128}};
    struct kernels k;
    read_loads();
    open_kernels(&k, 256, 8);
    printf("the fullest rank over that of the compiler's split, %d layers:\n", LAYERS / STEP);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        double sum = 0, worst = 0, rows = 0;
        int n = 0;
        for (int l = 0; l < LAYERS; l += STEP, n++) {
            struct assign_trial t = {256, shape[i][0], shape[i][1], shape[i][2], 8};
            double gap;
            struct rig r;
            cr_assert(assign_open(&t, loads[l % SETS][l], loads[l % SETS][l], NULL, 0));
            draw_counts(&t, loads[(l + l / SETS % 2 * 2) % SETS][l]);
            rig_open(&r, &k, &t);
            rig_rank(&r, 0);
            run_split(&r);
            cr_expect(assign_check_split(&t, r.ends.data, 1e-2, &gap), "%s", t.why);
            sum += gap;
            worst = fmax(worst, gap);
            rows += t.tables.rows;
            rig_close(&r);
            assign_close(&t);
        }
        printf("  %d slots on %d ranks, %d tokens on each: mean %.1e, worst %.1e; %.1f rows\n",
               shape[i][0] * shape[i][1], shape[i][0], shape[i][2], sum / n, worst, rows / n);
        double token = 1.0 / (shape[i][2] * 8);
        cr_expect(sum / n <= 1e-3 + 0.5 * token || n < 20);
        cr_expect_leq(worst, 4e-3 + 2 * token);
    }
    arena_free(&arena);
}

Test(assign, no_tokens_are_assigned_too) {
    struct assign_trial t = {16, 4, 6, 0, 4};
    double load[16];
    struct kernels k;
    struct rig r;
    zipf(load, 16, 0.5, 3);
    cr_assert(assign_open(&t, load, load, NULL, 0));
    open_kernels(&k, 16, 4);
    rig_open(&r, &k, &t);
    rig_rank(&r, 1);
    run_tally(&r);
    for (int e = 0; e < t.experts; e++)
        cr_expect_eq(r.total.data[e], 0);
    run_split(&r);
    for (int i = 0; i < t.tables.filled; i++)
        cr_expect_eq(r.ends.data[i], 0);
    run_replica(&r, MOE_ASSIGN_BALANCED);
    rig_close(&r);
    assign_close(&t);
    arena_free(&arena);
}

Test(assign, factors_decay_as_the_runtimes_do_for_any_number_of_experts) {
    static const int experts[] = {1, 5, 130, 1000};
    for (int i = 0; i < 4; i++) {
        int E = experts[i];
        struct kernels k;
        struct guarded factor = guarded((size_t)E);
        float *device = (float *)factor.data, host[1000] = {0};
        int32_t *counts = malloc(sizeof *counts * (size_t)(3 * E)), sum[1000];
        memset(device, 0, sizeof *device * (size_t)E);
        open_kernels(&k, E, 1);
        for (int n = 0; n < 40; n++) {
            memset(sum, 0, sizeof sum);
            for (int j = 0; j < 3 * E; j++)
                sum[j % E] += counts[j] = (int32_t)(assign_roll() * 5000);
            struct moe_assign s = {
                .factor = device, .counts = counts, .ranks = 3, .decay = RT_DECAY};
            struct moe_args args = {.fill = &s};
            launch(&k, "moe_factor<0>", (E + 255) / 256, 256, 0, &args);
            rt_load_decay(host, sum, E, RT_DECAY);
        }
        cr_expect(!memcmp(device, host, sizeof *device * (size_t)E), "%d experts", E);
        release(&factor);
        free(counts);
        dlclose(k.library);
    }
    arena_free(&arena);
}

/* The rows of pairs: no rank twice in one, every expert's replicas connected. */
Test(assign, rows_of_pairs_share_no_rank_and_leave_none_out) {
    for (int round = 0; round < 40; round++) {
        int R = 2 + (int)(assign_roll() * 40), S = 1 + (int)(assign_roll() * 12);
        int E = R * S - (int)(assign_roll() * R * S * 0.8), at = 0;
        int32_t *slot = malloc(sizeof *slot * (size_t)(R * S));
        struct rt_assign t;
        for (int r = 0; r < R; r++) /* an expert on every rank at most once, some slots empty */
            for (int j = 0; j < S; j++)
                slot[r * S + j] = at < R * S - R / 2 && j < E ? (at++ * 7) % E : -1;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < S; j++)
                for (int i = 0; i < j; i++)
                    if (slot[r * S + i] == slot[r * S + j])
                        slot[r * S + j] = -1;
        cr_assert_eq(rt_assign_make(E, R, S, slot, NULL, NULL, &t), MOERT_OK);
        int *root = malloc(sizeof *root * (size_t)(t.filled + 1));
        for (int i = 0; i < t.filled; i++)
            root[i] = i;
        for (int row = 0; row < t.rows; row++) {
            bool used[64] = {0};
            for (int i = 0; i < MOE_ASSIGN_LANES; i++) {
                struct moe_pair p = t.pairs[row * MOE_ASSIGN_LANES + i];
                if (p.a == p.b)
                    continue;
                cr_assert(!used[p.rank_a] && !used[p.rank_b] && p.rank_a != p.rank_b);
                used[p.rank_a] = used[p.rank_b] = true;
                cr_assert_eq(t.slot_list[p.a] / S, p.rank_a);
                cr_assert_eq(t.slot_list[p.b] / S, p.rank_b);
                cr_assert_eq(slot[t.slot_list[p.a]], slot[t.slot_list[p.b]]);
                for (int from = root[p.b], k = 0; k < t.filled; k++)
                    if (root[k] == from)
                        root[k] = root[p.a];
            }
        }
        for (int e = 0; e < E; e++)
            for (int i = t.first_slot[e]; i < t.first_slot[e + 1]; i++) {
                cr_assert_eq(slot[t.slot_list[i]], e);
                cr_assert(i == t.first_slot[e] || t.slot_list[i] > t.slot_list[i - 1]);
                cr_assert_eq(root[i], root[t.first_slot[e]], "replicas of %d are not connected",
                             e);
            }
        free(root);
        free(slot);
        rt_assign_free(&t);
    }
}

Test(assign, nvrtc_compiles_the_kernels) {
    struct diags d = {.arena = &arena};
    static const enum moe_target targets[] = {MOE_TARGET_SM_80, MOE_TARGET_SM_90A};
    static const char *const names[] = {
#define X(name) #name,
        ASSIGN_KERNELS(X)
#undef X
    };
    enum { KERNELS = sizeof names / sizeof *names };
    struct compile_job jobs[2 * KERNELS];
    struct buf source;
    int major, minor;
    if (!nvrtc_version(&major, &minor))
        cr_skip_test("no NVRTC");
    cr_assert(assign_source(&arena, 1000, 6, &source));
    for (int i = 0; i < 2 * KERNELS; i++)
        jobs[i] = (struct compile_job){.source = source.data,
                                       .source_name = "assign.cu",
                                       .expression = names[i % KERNELS],
                                       .target = targets[i / KERNELS]};
    bool ok = nvrtc_compile(&arena, &d, jobs, 2 * KERNELS, 2, NULL, NULL);
    diag_print(&d, stderr);
    cr_assert(ok);
    for (int i = 0; i < 2 * KERNELS; i++)
        cr_expect_gt(jobs[i].cubin_len, 0);
    arena_free(&arena);
}
