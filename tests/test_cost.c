/* The cost model against arithmetic by hand, against measurements and against common sense; then
 * the commands that use it.
 *
 * tests/golden/cost holds command lines (X.args), each beside its output (X.out). MOEC_GOLDEN=1
 * rewrites the outputs. */
#define _GNU_SOURCE 1
#include "../compiler/moec.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;
static char dir[64];    // this test's own folder, removed at the end
static char *out, *err; // of the last command

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    strcpy(dir, "/tmp/moec-cost-XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void tear_down(void) {
    dir_remove(dir);
    arena_free(&arena);
}

TestSuite(cost, .init = set_up, .fini = tear_down, .timeout = 120);

/* ---- helpers ---- */

static char *in_dir(const char *name) {
    return arena_printf(&arena, "%s/%s", dir, name);
}

static char *read_text(const char *path) {
    char *text;
    size_t len;
    cr_assert_eq(file_read(&arena, path, 64 << 20, &text, &len), 0, "%s", path);
    return text;
}

static void redirect(int fd, const char *path) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || dup2(file, fd) < 0)
        _exit(99);
}

static const struct {
    const char *name;
    int (*run)(int, char **);
} commands[] = {
#define X(name, what) {#name, cmd_##name},
    MOEC_COMMANDS(X)
#undef X
};

/* `moec LINE` in a child; its exit code, with out and err set. Every @ is this test's folder. */
static int run(const char *line) {
    char *argv[64], *save, *words = arena_strdup(&arena, line);
    int argc = 0, status;
    for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save))
        argv[argc++] = *w == '@' ? in_dir(w + 1) : w;
    argv[argc] = NULL;
    fflush(NULL);
    pid_t pid = fork();
    cr_assert(pid >= 0);
    if (!pid) {
        redirect(1, in_dir("stdout"));
        redirect(2, in_dir("stderr"));
        optind = 0;
        int code = 98;
        for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
            if (!strcmp(commands[i].name, argv[0]))
                code = commands[i].run(argc, argv);
        fflush(NULL);
        _exit(code);
    }
    cr_assert(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    out = read_text(in_dir("stdout"));
    err = read_text(in_dir("stderr"));
    return WEXITSTATUS(status);
}

/* What a command printed as JSON. */
static struct node *json(const char *line) {
    cr_assert_eq(run(line), 0, "moec %s: %.1500s", line, err);
    struct node *n = yaml_parse(&arena, &diags, "stdout", out, strlen(out));
    cr_assert(n, "moec %s is no JSON: %.1000s", line, out);
    return n;
}

static double number(struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    cr_assert(n && n->kind == NODE_SCALAR, "no %s", key);
    return strtod(n->text, NULL);
}

static const char *text(struct node *map, const char *key) {
    struct node *n = map_get(map, key);
    cr_assert(n && n->kind == NODE_SCALAR, "no %s", key);
    return n->text;
}

static struct model *model_named(const char *name) {
    struct model *m =
        model_read(&arena, &diags, arena_printf(&arena, "plans/models/%s.yaml", name));
    cr_assert(m);
    return m;
}

static struct cluster *cluster_of(const char *yaml) {
    struct node *n = yaml_parse(&arena, &diags, "c", yaml, strlen(yaml));
    struct cluster *c = n ? cluster_read(&arena, &diags, n) : NULL;
    cr_assert(c);
    return c;
}

/* E experts of a model on a cluster, in order. */
static struct cost_setup setup_of(const struct model *m, const struct cluster *c) {
    struct deployment dep = {
        .model = (struct model *)m, .cluster = (struct cluster *)c, .max_num_tokens = 1 << 22};
    struct cost_setup s;
    cost_setup(&s, &dep);
    return s;
}

static struct cost cost_of(const struct cost_setup *s, int tokens) {
    struct cost c;
    cost_layers(s, 1, tokens, &c);
    return c;
}

static void near(double got, double want, double tolerance, const char *what) {
    cr_expect(fabs(got - want) <= tolerance * fabs(want), "%s: %g, expected %g", what, got,
              want);
}

/* ---- by hand ---- */

/* Two ranks of four slots, top-2 of 8 experts; every figure a round number. */
static struct model hand_model(void) {
    return (struct model){.num_moe_layers = 3,
                          .hidden_size = 1000,
                          .moe_intermediate_size = 2000,
                          .num_experts = 8,
                          .num_experts_per_tok = 2,
                          .router = {.n_group = 1, .topk_group = 1}};
}

Test(cost, a_small_case_by_hand) {
    struct model m = hand_model();
    struct cluster c = {.memory_tbps = 1, .bf16_tflops = 100, .nvlink_gbps = 100};
    c.ranks = c.nvlink_domain = 2;
    struct cost_setup s = setup_of(&m, &c);
    struct cost one = cost_of(&s, 3);
    /* 6 tokens over both ranks each miss an expert with 6/8: 4 slots x (1 - 0.75^6) */
    double hit = 4 * (1 - pow(0.75, 6));
    near(one.hit, hit, 1e-12, "hit");
    near(one.rows, 6, 1e-12, "rows");
    near(one.weight_bytes, hit * 12e6 + 4 * 8000, 1e-12, "weights: 3 x 1000 x 2000 in bf16");
    near(one.activation_bytes, (6 + 3) * 2000 * 2, 1e-12, "rows and tokens, in and out");
    near(one.flop, 2 * (6 * 6e6 + 3 * 8000), 1e-12, "FLOP");
    near(one.memory_us, (hit * 12e6 + 32000 + 36000) / 0.917e6, 1e-12, "bytes at 0.917 TB/s");
    near(one.compute_us, (1.17 * one.flop + 2 * 106 * hit * 6e6) / 78.8e6, 1e-12,
         "FLOP at 78.8 TFLOP/s, 1.17 and 106 rows of waste");
    near(one.gemm_us, fmax(one.memory_us, one.compute_us), 1e-12, "the larger");
    near(one.combine_us, 3 * 3 * 2000 / 0.917e6, 1e-12, "two rows read, one written");
    near(one.launch_us, 25, 1e-12, "five launches");
    /* a rank has one of a token's two experts unless both are on the other: 1 - 4/8 x 3/7 */
    double distinct = 2 * (1 - 4 / 8. * 3 / 7.);
    near(cost_distinct(&s), distinct, 1e-12, "distinct ranks");
    double moved = 3 * (distinct * 2080 + 2 * 2000) / 2, gathered = 3 * (2080 + 2000);
    near(one.exchange_us[MOE_EXCHANGE_ONESIDED], 2 * 16.2 + moved / 77e3, 1e-12, "one-sided");
    near(one.exchange_us[MOE_EXCHANGE_ALLGATHER], 2 * 7.6 + gathered / 77e3, 1e-12,
         "allgather");
    near(one.exchange_us[MOE_EXCHANGE_ALLTOALL], 3 * 7.6 + moved / 77e3, 1e-12, "alltoall");
    cr_expect_eq(one.exchange, MOE_EXCHANGE_ALLGATHER);
    near(one.layer_us,
         one.gemm_us + one.combine_us + 25 + one.exchange_us[MOE_EXCHANGE_ALLGATHER], 1e-12,
         "sum");
}

Test(cost, links_between_nodes_by_hand) {
    struct model m = hand_model();
    struct cluster c = {
        .memory_tbps = 1, .bf16_tflops = 100, .nvlink_gbps = 100, .nic_gbps = 10};
    c.ranks = 4;
    c.nvlink_domain = 2;
    struct cost_setup s = setup_of(&m, &c);
    struct cost one = cost_of(&s, 100);
    double distinct = 4 * (1 - 6 / 8. * 5 / 7.);
    double peer = 100 * (distinct * 2080 + 2 * 2000) / 4;
    near(one.exchange_us[MOE_EXCHANGE_ALLTOALL], 3 * (6 + 0.8 * 4 + 10) + 2 * peer / 7.2e3,
         1e-12, "two ranks over the NIC");
    /* each remote token enters a domain of two ranks once */
    near(one.exchange_us[MOE_EXCHANGE_ALLGATHER], 2 * 19.2 + 100 * 4080 * 2 / 2 / 7.2e3, 1e-12,
         "allgather");
    cr_expect(one.exchange_us[MOE_EXCHANGE_ONESIDED] < 0, "no stores to another node's memory");
    near(cost_migration_us(&s, 3), 10 + 3 * 12e6 / 7.2e3, 1e-12, "three slots over the NIC");
    c.nvlink_domain = 4;
    near(cost_migration_us(&s, 3), 3 * 12e6 / 77e3, 1e-12, "three slots over NVLink");
}

Test(cost, ranks_of_a_placement_by_hand) {
    struct model m = hand_model();
    m.num_experts = 3;
    int slots[] = {0, 1, 0, 2};
    double load[] = {4, 1, 3}, rows[2], hit[2], share[] = {0.75, 1, 0.25, 1};
    struct cost_setup s = {.model = &m, .ranks = 2, .slots_per_rank = 2};
    s.expert_of_slot = slots;
    s.load = load;
    cost_ranks(&s, 5, rows, hit); /* p: 1, 0.25, 0.75 */
    near(rows[0], 10 * (0.5 + 0.25), 1e-12, "rows of rank 0");
    near(rows[1], 10 * (0.5 + 0.75), 1e-12, "rows of rank 1");
    near(hit[0], 2 - pow(0.5, 10) - pow(0.75, 10), 1e-12, "hit on rank 0");
    s.share_of_slot = share;
    cost_ranks(&s, 5, rows, hit);
    near(rows[0], 10 * (0.75 + 0.25), 1e-12, "rows with shares");
    near(hit[1], 2 - pow(0.75, 10) - pow(0.25, 10), 1e-12, "hit with shares");
    double given[] = {1, 3};
    s.rank_load = given;
    cost_ranks(&s, 5, rows, hit);
    near(rows[1], 10 * 2 * 0.75, 1e-12, "rows as the dispatcher splits them");
    /* nine of ten choices are more than one of a token's two: it is chosen once by each */
    s.rank_load = NULL;
    s.share_of_slot = NULL;
    load[0] = 9;
    load[1] = 1;
    load[2] = 0;
    cost_ranks(&s, 5, rows, hit);
    near(rows[1], 10 * 0.5, 1e-12, "an expert is chosen once");
}

/* Expert 0 is on both ranks; workload b is only expert 0. */
Test(cost, a_placement_weighs_workloads_as_its_dispatcher_splits_them) {
    struct model m = hand_model();
    struct cluster c = {.ranks = 2, .memory_tbps = 1, .bf16_tflops = 100, .nvlink_gbps = 100};
    c.nvlink_domain = 2;
    m.num_experts = 3;
    m.num_experts_per_tok = 1;
    int layer = 7, slots[] = {0, 1, 0, 2};
    double a[] = {4, 1, 3}, b[] = {1, 0, 0}, none[] = {0, 0, 0};
    const int *all[] = {slots};
    struct workload w[] = {{.name = "a", .weight = 3, .count = a},
                           {.name = "b", .weight = 1, .count = b},
                           {.name = "c", .weight = 0, .count = a}};
    struct loads loads = {.num_layers = 1, .experts = 3, .layers = &layer, .num_workloads = 3};
    struct cost_placement p = {.num_layers = 1, .ranks = 2, .slots_per_rank = 2};
    struct cost_setup base = setup_of(&m, &c), *s;
    struct cost mean;
    loads.workloads = w;
    p.layers = &layer;
    p.expert_of_slot = all;
    p.loads = &loads;
    p.dispatch = DISPATCH_EVEN;
    cr_assert_eq(cost_placed(&arena, &base, &p, &s), 2);
    cost_layers(s, 2, 8, &mean);
    near(mean.imbalance, (3 * 1.25 + 1) / 4, 1e-9, "3 and 5 of 8, weight 3; even, weight 1");
    p.dispatch = DISPATCH_BALANCED;
    cr_assert_eq(cost_placed(&arena, &base, &p, &s), 2);
    cost_layers(s, 2, 8, &mean);
    near(mean.imbalance, 1, 1e-4, "expert 0 makes up for 1 and 2");
    double *load = cost_load(&arena, &loads, 7);
    near(load[0], (3 * 0.5 + 1) / 4, 1e-12, "shares, by weight");
    near(load[2], 3 * 0.375 / 4, 1e-12, "shares, by weight");
    cr_expect_null(cost_load(&arena, &loads, 8));
    for (int i = 0; i < 3; i++)
        w[i].count = none;
    cr_expect_null(cost_load(&arena, &loads, 7));
    cr_assert_eq(cost_placed(&arena, &base, &p, &s), 2);
    cost_layers(s, 2, 8, &mean);
    near(mean.imbalance, 1, 1e-9, "a layer without tokens weighs evenly");
}

/* A placement in order with equal loads is what is assumed without one. */
Test(cost, a_placement_in_order_changes_nothing) {
    struct cluster *c = cluster_of("gpu: h200\nranks: 8\n");
    struct cost_setup s = setup_of(model_named("qwen3-235b"), c), t = s;
    int *slots = arena_array(&arena, int, 128);
    for (int i = 0; i < 128; i++)
        slots[i] = i;
    t.expert_of_slot = slots;
    for (int tokens = 1; tokens < 5000; tokens *= 3)
        near(cost_of(&t, tokens).layer_us, cost_of(&s, tokens).layer_us, 1e-9, "layer");
}

Test(cost, distinct_ranks_of_a_token_as_counted_by_others) {
    static const struct {
        int ranks;
        double grouped, plain;
    } known[] = {{8, 3.63, 5.29}, {16, 5.34, 6.52}, {32, 6.59, 7.27}};
    struct cluster *c = cluster_of("gpu: h200\nranks: 64\n");
    struct model *m = model_named("deepseek-v3");
    struct cost_setup s = setup_of(m, c);
    for (int grouped = 1; grouped >= 0; grouped--) {
        if (!grouped)
            m->router.topk_group = m->router.n_group;
        for (size_t i = 0; i < 3; i++) {
            s.ranks = known[i].ranks;
            near(cost_distinct(&s), grouped ? known[i].grouped : known[i].plain, 2e-3,
                 arena_printf(&arena, "%d ranks, grouped %d", s.ranks, grouped));
        }
    }
    s.ranks = 1;
    near(cost_distinct(&s), 1, 1e-12, "one rank");
    m->router.topk_group = 4;
    near(cost_distinct(&s), 1, 1e-12, "one rank with groups");
    /* two groups each, none, one or both kept with 15, 40, 15 of 70: 32 of 128 or 64 of 128 */
    double one = 1, both = 1;
    for (int i = 0; i < 8; i++) {
        one *= (96. - i) / (128 - i);
        both *= (64. - i) / (128 - i);
    }
    s.ranks = 4;
    near(cost_distinct(&s), 4 * (40 / 70. * (1 - one) + 15 / 70. * (1 - both)), 1e-12,
         "4 ranks");
}

/* Groups help only while they lie whole on ranks: in order, and as many ranks as fit. */
Test(cost, groups_count_only_for_experts_in_order) {
    struct model m = hand_model();
    struct cluster c = {.ranks = 4, .nvlink_domain = 4};
    m.router.n_group = 2;
    struct cost_setup s = setup_of(&m, &c);
    /* a kept group of 4 experts on two ranks: a rank of it is missed with 2/4 x 1/3 */
    near(cost_distinct(&s), 4 * 0.5 * (1 - 1 / 6.), 1e-12, "in order");
    int order[] = {0, 1, 2, 3, 4, 5, 6, 7}, other[] = {0, 1, 2, 3, 4, 5, 7, 6};
    s.expert_of_slot = order;
    near(cost_distinct(&s), 4 * 0.5 * (1 - 1 / 6.), 1e-12, "a placement in order");
    s.expert_of_slot = other;
    near(cost_distinct(&s), 4 * (1 - 6 / 8. * 5 / 7.), 1e-12, "any placement");
    s.expert_of_slot = NULL;
    s.ranks = 3;
    near(cost_distinct(&s), 3 * (1 - (8 - 8 / 3.) / 8 * (7 - 8 / 3.) / 7), 1e-12, "3 ranks");
    s.ranks = 6; /* 8 experts in 12 slots, the last four empty */
    s.slots_per_rank = 2;
    double alike = cost_distinct(&s);
    int behind[] = {0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1};
    s.expert_of_slot = behind;
    near(cost_distinct(&s), alike, 1e-12, "empty slots behind");
    cr_expect_lt(alike, 6 * (1 - (8 - 8 / 6.) / 8 * (7 - 8 / 6.) / 7));
}

Test(cost, memory_of_a_rank_by_hand) {
    struct model m = hand_model();
    struct cluster c = {.ranks = 2, .memory_gb = 80};
    struct cost_setup s = setup_of(&m, &c);
    struct cost_memory mem;
    s.max_num_tokens = 11; /* six on the larger rank */
    m.shared.intermediate_size = 500;
    cost_memory(&s, &mem);
    near(mem.weights, 3 * (4 * 12e6 + 3e6 + 4 * 8000), 1e-12, "three layers of four slots");
    near(mem.workspace, 2 * (6 * 1000 + 12 * 3000 + 6 * 500), 1e-12, "rows of six tokens");
    near(mem.exchange, 2 * 6 * 2080 + 2 * 12 * 1000, 1e-12, "records of both, results");
    near(mem.capacity, 80e9, 1e-12, "capacity");
    static const double gb[] = {1, 0.95};
    static const int few[] = {4,
                              1}; /* 1 GB less 144 MB, 0.95 GB less 36 MB: the first has less */
    c.rank_memory_gb = gb;
    cost_memory(&s, &mem);
    near(mem.capacity, 0.95e9, 1e-12, "the smaller rank");
    c.rank_slots = few;
    cost_memory(&s, &mem);
    near(mem.capacity, 1e9, 1e-12, "the rank with more slots");
    near(mem.weights, 3 * (4 * 12e6 + 3e6 + 4 * 8000), 1e-12, "its slots");
    s.ranks = 1;
    cost_memory(&s, &mem);
    cr_expect_eq(mem.exchange, 0);
}

Test(cost, a_slot_is_the_record_that_plans_lay_out) {
    glob_t g;
    struct overrides none = {0};
    cr_assert_eq(glob("plans/models/*.yaml", 0, NULL, &g), 0);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        struct deployment *dep = deployment_read(&arena, &diags, g.gl_pathv[i], &none);
        cr_assert(dep);
        struct plan *p = plan_make(&arena, &diags, dep, 1);
        struct cost_setup s;
        cost_setup(&s, dep);
        cr_expect_eq((long long)cost_slot_bytes(&s), p->classes[0].slot_bytes, "%s",
                     g.gl_pathv[i]);
    }
    cr_expect(g.gl_pathc >= 17);
    globfree(&g);
}

/* ---- measurements ---- */

/* The best public kernels on one H200, in us from routed input to combined output: bf16, then fp8
 * with two GEMMs alone from 2048 tokens. The model must be within a quarter. */
Test(cost, layers_take_what_was_measured) {
    static const struct {
        int hidden, inter, experts, topk, tokens;
        double bf16;
    } seen[] = {{2048, 768, 128, 8, 8, 135},     {2048, 768, 128, 8, 32, 254},
                {2048, 768, 128, 8, 128, 308},   {2048, 768, 128, 8, 512, 348},
                {2048, 768, 128, 8, 2048, 446},  {2048, 768, 128, 8, 8192, 1113},
                {7168, 2048, 32, 8, 1, 196},     {7168, 2048, 32, 8, 8, 585},
                {7168, 2048, 32, 8, 32, 670},    {7168, 2048, 32, 8, 128, 720},
                {7168, 2048, 32, 8, 512, 951},   {7168, 2048, 32, 8, 2048, 2679},
                {7168, 2048, 32, 8, 8192, 9120}, {7168, 2048, 9, 1, 512, 237},
                {7168, 2048, 9, 1, 2048, 375},   {7168, 2048, 9, 1, 8192, 1187},
                {4096, 1536, 128, 8, 32, 907},   {4096, 1536, 128, 8, 128, 1127},
                {4096, 1536, 128, 8, 512, 1334}, {4096, 1536, 128, 8, 2048, 1821},
                {4096, 14336, 8, 2, 8, 568},     {4096, 14336, 8, 2, 128, 730},
                {4096, 14336, 8, 2, 512, 874},   {4096, 14336, 8, 2, 2048, 2470},
                {5120, 8192, 16, 1, 8, 390},     {5120, 8192, 16, 1, 128, 970},
                {5120, 8192, 16, 1, 2048, 1387}, {5120, 8192, 16, 1, 8192, 3610}};
    struct cluster *c = cluster_of("gpu: h200\n");
    double sum = 0;
    int n = sizeof seen / sizeof *seen;
    for (int i = 0; i < n; i++) {
        struct model m = {.hidden_size = seen[i].hidden,
                          .moe_intermediate_size = seen[i].inter,
                          .num_experts = seen[i].experts,
                          .num_experts_per_tok = seen[i].topk,
                          .num_moe_layers = 1,
                          .router = {.n_group = 1, .topk_group = 1}};
        struct cost_setup s = setup_of(&m, c);
        struct cost one = cost_of(&s, seen[i].tokens);
        near(one.layer_us, seen[i].bf16, 0.25,
             arena_printf(&arena, "%d x %d, %d experts, %d tokens", m.hidden_size,
                          m.moe_intermediate_size, m.num_experts, seen[i].tokens));
        sum += fabs(one.layer_us / seen[i].bf16 - 1);
    }
    cr_expect(sum / n < 0.08, "mean deviation %.3f", sum / n);
}

/* DeepSeek-V3's shape in bf16 on GB200, dispatch and combine together. */
Test(cost, exchange_takes_what_was_published) {
    static const struct {
        int ranks, tokens;
        double us;
    } seen[] = {{8, 128, 31.7 + 38.1}, {8, 2048, 312 + 323}, {64, 128, 41.6 + 44.5}};
    struct cluster *c = cluster_of("gpu: gb200\nranks: 64\n");
    struct model *m = model_named("deepseek-v3");
    m->router.topk_group = m->router.n_group;
    struct cost_setup s = setup_of(m, c);
    s.fp8 = false;
    for (size_t i = 0; i < 3; i++) {
        s.ranks = seen[i].ranks;
        s.slots_per_rank = 256 / s.ranks;
        near(cost_of(&s, seen[i].tokens).exchange_us[MOE_EXCHANGE_ONESIDED], seen[i].us, 0.25,
             arena_printf(&arena, "%d ranks, %d tokens", s.ranks, seen[i].tokens));
    }
}

/* ---- common sense ---- */

static const char *const deployments[] = {
    "plans/deepseek-v3-ep32.yaml", "plans/kimi-k2-nvl72.yaml", "plans/qwen3-30b-1gpu.yaml"};

static struct cost_setup deployed(const char *path) {
    struct overrides none = {0};
    struct cost_setup s;
    struct deployment *dep = deployment_read(&arena, &diags, path, &none);
    cr_assert(dep);
    cost_setup(&s, dep);
    return s;
}

/* Through every place where a batch is split into one more pass. */
Test(cost, more_tokens_are_never_faster) {
    for (size_t i = 0; i < sizeof deployments / sizeof *deployments; i++) {
        struct cost_setup s = deployed(deployments[i]);
        double last = 0, hit = 0;
        for (int t = 1; t < 3000; t++) {
            struct cost c = cost_of(&s, t);
            /* passes are even: the last may be up to a token per pass smaller */
            cr_assert(c.layer_us >= last * (1 - 1e-12), "%s: %d tokens: %g after %g",
                      deployments[i], t, c.layer_us, last);
            cr_assert(c.passes > 1 || c.hit >= hit - 1e-9);
            last = c.layer_us;
            hit = c.hit;
        }
    }
}

Test(cost, more_imbalance_is_never_faster) {
    for (size_t i = 0; i < sizeof deployments / sizeof *deployments; i++)
        for (int t = 1; t <= 4096; t *= 4) {
            struct cost_setup s = deployed(deployments[i]);
            double first = cost_of(&s, t).layer_us, last = 0;
            for (s.imbalance = 1; s.imbalance < 6; s.imbalance += 0.25) {
                double us = cost_of(&s, t).layer_us;
                cr_assert(us >= last, "%s: imbalance %g", deployments[i], s.imbalance);
                last = us;
            }
            cr_expect(last > first, "%s: imbalance costs nothing at %d tokens", deployments[i],
                      t);
        }
}

/* A rank that gets more of the same tokens takes longer, and the others do not matter. */
Test(cost, the_slowest_rank_sets_the_time) {
    struct cluster *c = cluster_of("gpu: h200\nranks: 4\n");
    struct cost_setup s = setup_of(model_named("mixtral-8x7b"), c);
    int slots[] = {0, 1, 2, 3, 4, 5, 6, 7};
    double load[8] = {1, 1, 1, 1, 1, 1, 1, 1}, last = 0;
    s.expert_of_slot = slots;
    s.load = load;
    for (int i = 0; i < 6; i++, load[5] *= 1.3) {
        struct cost one = cost_of(&s, 2048);
        cr_expect(one.gemm_us > last, "load %g", load[5]);
        last = one.gemm_us;
        near(one.imbalance, fmax(load[5] + 1, 2) * 4 / (load[5] + 7), 1e-9, "imbalance");
    }
}

/* By hand: 300 is three blocks of 128, 160 two, so that a weight of an expert has six scales. */
Test(cost, fp8_takes_what_its_records_and_buffers_take) {
    struct cluster *c = cluster_of("gpu: h200\n");
    struct model *m = model_named("mixtral-8x7b");
    struct cost_memory mem;
    m->hidden_size = 304;
    m->moe_intermediate_size = 160;
    m->num_moe_layers = 1;
    struct cost_setup s = setup_of(m, c);
    cr_expect_not(s.fp8);
    s.fp8 = true;
    s.max_num_tokens = 5;
    near(cost_slot_bytes(&s), 3 * 304 * 160 + 256 + 256, 1e-12, "a slot");
    cost_memory(&s, &mem);
    near(mem.workspace, 5 * (304 + 12) + 10 * (2 * 304 + 5 * 160 + 8), 1e-12, "workspace");
    m->weights.format = MOE_FORMAT_FP8_TENSOR;
    cr_expect(setup_of(m, c).fp8);
    m->weights.format = MOE_FORMAT_FP8_BLOCK;
    m->weights.block[0] = m->weights.block[1] = 64;
    cr_expect_not(setup_of(m, c).fp8, "other blocks are multiplied out");
    m->weights.block[0] = m->weights.block[1] = 128;
    s = setup_of(m, c);
    struct cost fp8 = cost_of(&s, 65536), without;
    c->fp8_tflops = 0;
    without = cost_of(&s, 65536);
    cr_expect_gt(without.compute_us, 1.5 * fp8.compute_us, "a GPU without fp8 of its own");
}

Test(cost, what_a_cluster_lacks_is_named) {
    struct cluster c = {.memory_tbps = 1, .nvlink_domain = 2};
    struct model m = hand_model();
    struct cost_setup s = setup_of(&m, &(struct cluster){.ranks = 4});
    s.cluster = &c;
    cr_expect_str_eq(cost_lacks(&s), "bf16_tflops");
    s.fp8 = true;
    cr_expect_str_eq(cost_lacks(&s), "fp8_tflops");
    c.fp8_tflops = 1;
    cr_expect_str_eq(cost_lacks(&s), "nvlink_gbps");
    c.nvlink_gbps = 1;
    cr_expect_str_eq(cost_lacks(&s), "nic_gbps");
    s.ranks = 2;
    cr_expect_null(cost_lacks(&s));
    c.memory_tbps = 0;
    cr_expect_str_eq(cost_lacks(&s), "memory_tbps");
}

/* ---- moec simulate ---- */

Test(cost, simulate_sweeps_every_legal_combination) {
    struct node *root = json("simulate plans/deepseek-v3-ep32.yaml --json --tokens 1,64 --ep "
                             "16,32,48 --slots 288,320");
    struct node *points = map_get(root, "points"), *migration = map_get(root, "migration");
    cr_expect_eq(points->count, 5 * 2);
    cr_expect_eq(migration->count, 5);
    cr_expect(strstr(err, "320 slots are not divisible by 48 ranks"), "%s", err);
    cr_expect_eq(number(root, "layers"), 59);
    for (int i = 0; i < points->count; i++) {
        struct node *p = points->items[i];
        near(number(p, "step_us"), 59 * number(p, "layer_us"), 1e-5, "a step is 59 layers");
        near(number(p, "tokens_per_s_per_gpu"),
             number(p, "tokens") * 1e6 / number(p, "step_us"), 1e-5, "rate");
        cr_expect_str_eq(text(p, "fits"), "true");
    }
    for (int i = 0; i < migration->count; i++) {
        struct node *m = migration->items[i];
        near(number(m, "bytes"), 2 * 59 * 3 * (7168. * 2048 + 4 * 56 * 16), 1e-12,
             "two slots a layer, weights and scales in fp8");
    }
}

/* Each point that is not on the front has one that is at least as good in all three. */
Test(cost, pareto_points_are_not_beaten_and_all_others_are) {
    struct node *root = json("simulate plans/kimi-k2-nvl72.yaml --json --tokens 1,8,64,128,300 "
                             "--ep 8,24,48,64,72 --slots 384,576,1152");
    struct node *points = map_get(root, "points");
    int front = 0, n = points->count;
    for (int i = 0; i < n; i++) {
        struct node *p = points->items[i];
        bool beaten = strcmp(text(p, "fits"), "true") != 0;
        for (int j = 0; j < n; j++) {
            struct node *q = points->items[j];
            double rate = number(q, "tokens_per_s_per_gpu") - number(p, "tokens_per_s_per_gpu");
            double time = number(p, "step_us") - number(q, "step_us");
            double memory = 0;
            static const char *const parts[] = {"weight_memory_bytes", "workspace_bytes",
                                                "exchange_bytes"};
            for (int k = 0; k < 3; k++)
                memory += number(p, parts[k]) - number(q, parts[k]);
            beaten |= !strcmp(text(q, "fits"), "true") && rate >= 0 && time >= 0 &&
                      memory >= 0 && (rate > 0 || time > 0 || memory > 0);
        }
        front += !beaten;
        cr_expect_str_eq(text(p, "pareto"), beaten ? "false" : "true", "point %d", i);
    }
    cr_expect(front > 2 && front < n, "%d of %d", front, n);
}

Test(cost, simulate_says_what_is_wrong) {
    static const struct {
        const char *line, *why;
        int code;
    } wrong[] = {
        {"simulate plans/tiny.yaml", "without 'memory_tbps' of the cluster", 1},
        {"simulate plans/deepseek-v3-ep32.yaml --slots 290", "not divisible by 32 ranks", 1},
        {"simulate plans/deepseek-v3-ep32.yaml --slots 250", "cannot hold 256 experts", 1},
        {"simulate plans/deepseek-v3-ep32.yaml --slots 289,291", "no combination", 1},
        {"simulate plans/nothing.yaml", "plans/nothing.yaml", 1},
        {"simulate plans/tiny.yaml --tokens 0", "--tokens", 2},
        {"simulate plans/tiny.yaml --tokens ,", "--tokens", 2},
        {"simulate plans/tiny.yaml --imbalance 0.5", "--imbalance", 2},
        {"simulate plans/tiny.yaml --precision int3", "--precision", 2},
        {"simulate", "usage", 2},
        {"simulate plans/tiny.yaml plans/tiny.yaml", "usage", 2}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        cr_expect_eq(run(wrong[i].line), wrong[i].code, "moec %s", wrong[i].line);
        cr_expect(strstr(err, wrong[i].why), "moec %s: %.1000s", wrong[i].line, err);
        cr_expect_str_eq(out, "", "moec %s", wrong[i].line);
    }
    cr_expect_eq(run("simulate plans/tiny.yaml --set cluster.gpu=h200"), 0, "%s", err);
}

/* ---- moves ---- */

static void moves_of(const struct moves_problem *p, struct layer_moves *out) {
    moves_order(&arena, p, out);
}

static void expect_move(const struct layer_moves *l, int i, int slot, int expert, int from,
                        bool spare) {
    const struct move *m = &l->moves[i];
    cr_assert_lt(i, l->n);
    cr_expect(m->slot == slot && m->expert == expert && m->from_rank == from &&
                  m->spare == spare,
              "move %d: slot %d, expert %d, from %d, spare %d", i, m->slot, m->expert,
              m->from_rank, m->spare);
}

/* Two experts that change places need one spare slot: the second comes out of it. */
Test(cost, a_swap_goes_through_a_spare_slot) {
    int from[] = {0, 1, 2, 3}, to[] = {0, 2, 1, 3};
    struct moves_problem p = {4, 2, 2, 0, from, to, NULL};
    struct layer_moves l;
    moves_of(&p, &l);
    cr_assert_eq(l.n, 2);
    expect_move(&l, 0, 1, 2, 1, true);
    expect_move(&l, 1, 2, 1, 0, false);
    cr_expect(l.received[0] == 1 && l.received[1] == 1 && l.sent[0] == 1 && l.sent[1] == 1);
    near(l.before, 1, 1e-12, "before");
    near(l.after, 1, 1e-12, "after");
}

Test(cost, slots_of_a_rank_are_renumbered_not_moved) {
    int from[] = {0, 1, 2, 3, 4, 5}, to[] = {2, 0, 1, 5, 4, 3};
    struct moves_problem p = {6, 2, 3, 0, from, to, NULL};
    struct layer_moves l;
    moves_of(&p, &l);
    cr_expect_eq(l.n, 0);
    cr_expect_gt(l.renumbered, 0);
}

/* The hot expert's new replica comes first though its slot is last; from its own node if it can. */
Test(cost, the_heaviest_gain_comes_first) {
    int from[] = {0, 1, 2, -1, 3, -1, 4, 5}, to[] = {0, 1, 2, 5, 3, 4, 4, 5};
    double load[] = {1, 1, 1, 1, 2, 9};
    struct moves_problem p = {6, 4, 2, 2, from, to, load};
    struct layer_moves l;
    moves_of(&p, &l);
    cr_assert_eq(l.n, 2);
    expect_move(&l, 0, 3, 5, 3, false);
    expect_move(&l, 1, 5, 4, 3, false);
    near(l.before, 11 * 4 / 15., 1e-12, "before");
    near(l.moves[0].imbalance, 6.5 * 4 / 15., 1e-12, "after the first");
    near(l.after, 5.5 * 4 / 15., 1e-12, "after");
    cr_expect_eq(l.moves[0].replaces, -1);
    cr_expect_eq(l.dropped, 0);
}

/* A second copy on a rank comes from the first, whoever else has one. */
Test(cost, a_copy_on_the_same_rank_crosses_no_link) {
    int from[] = {0, 1, 1, 2}, to[] = {0, 0, 1, 2};
    struct moves_problem p = {3, 2, 2, 0, from, to, NULL};
    struct layer_moves l;
    moves_of(&p, &l);
    cr_assert_eq(l.n, 1);
    expect_move(&l, 0, 1, 0, 0, false);
    cr_expect(l.received[0] == 0 && l.sent[0] == 0);
    int twice[] = {0, 1, 2, 1, 1, 0}, more[] = {0, 1, 2, 1, 0, 0};
    struct moves_problem q = {3, 2, 3, 0, twice, more, NULL};
    moves_of(&q, &l);
    cr_assert_eq(l.n, 1);
    expect_move(&l, 0, 4, 0, 1, false);
}

static uint32_t random_state = 1;

static int random_below(int n) {
    random_state = random_state * 1664525u + 1013904223u;
    return (int)(((uint64_t)random_state * (uint64_t)n) >> 32);
}

/* Every expert once, the rest of the slots any expert or empty, in random places. */
static int *random_slots(int experts, int total) {
    int *slots = arena_array(&arena, int, total);
    for (int i = 0; i < total; i++)
        slots[i] = i < experts ? i : random_below(experts + 1) - 1;
    for (int i = total - 1; i > 0; i--) {
        int j = random_below(i + 1), t = slots[i];
        slots[i] = slots[j];
        slots[j] = t;
    }
    return slots;
}

static int count_of(const int *slots, int total, int e) {
    int n = 0;
    for (int i = 0; i < total; i++)
        n += slots[i] == e;
    return n;
}

/* Moves that no order can do without: of each rank's new experts those that it does not hold. */
static int fewest_moves(const struct moves_problem *p) {
    int s = p->slots_per_rank, n = 0;
    for (int r = 0; r < p->ranks; r++)
        for (int e = 0; e < p->experts; e++) {
            int more = count_of(p->to + r * s, s, e) - count_of(p->from + r * s, s, e);
            n += more > 0 ? more : 0;
        }
    return n;
}

/* Plays the moves on ranks that hold what they hold: each source has the expert when it is asked,
 * no expert is ever without a copy, at most one waits, and the end is the placement asked for. */
static void play(const struct moves_problem *p, const struct layer_moves *l) {
    int s = p->slots_per_rank, total = p->ranks * s, waiting = -1, waits_on = -1;
    int *has = arena_array(&arena, int, p->ranks * p->experts);
    for (int i = 0; i < total; i++)
        if (p->from[i] >= 0)
            has[i / s * p->experts + p->from[i]]++;
    for (int i = 0; i < l->n; i++) {
        const struct move *m = &l->moves[i];
        int rank = m->slot / s, copies = 0;
        cr_assert(has[m->from_rank * p->experts + m->expert] > 0 ||
                      (waiting == m->expert && waits_on == m->from_rank),
                  "move %d: rank %d has no expert %d", i, m->from_rank, m->expert);
        if (m->replaces >= 0)
            cr_assert(has[rank * p->experts + m->replaces]-- > 0);
        has[rank * p->experts + m->expert]++;
        waiting = waiting == m->expert ? -1 : waiting;
        for (int r = 0; m->replaces >= 0 && r < p->ranks; r++)
            copies += has[r * p->experts + m->replaces];
        cr_assert_eq(m->spare, m->replaces >= 0 && copies == 0, "move %d", i);
        if (m->spare) {
            cr_assert(waiting < 0, "two experts wait");
            waiting = m->replaces;
            waits_on = rank;
        }
    }
    cr_expect(waiting < 0);
    for (int r = 0; r < p->ranks; r++)
        for (int e = 0; e < p->experts; e++)
            cr_expect_geq(has[r * p->experts + e], count_of(p->to + r * s, s, e));
}

Test(cost, no_order_loses_an_expert) {
    for (int trial = 0; trial < 300; trial++) {
        int ranks = 1 + random_below(6), slots = 1 + random_below(5), total = ranks * slots;
        int experts = 1 + random_below(total);
        double *load = arena_array(&arena, double, experts);
        for (int e = 0; e < experts; e++)
            load[e] = random_below(10);
        int *from = random_slots(experts, total), *to = random_slots(experts, total);
        struct moves_problem p = {experts, ranks, slots, random_below(3), from, to, load};
        struct layer_moves l;
        moves_of(&p, &l);
        cr_expect_eq(l.n, fewest_moves(&p), "trial %d: %d moves", trial, l.n);
        play(&p, &l);
        int sent = 0, received = 0;
        for (int r = 0; r < ranks; r++) {
            sent += l.sent[r];
            received += l.received[r];
        }
        cr_expect_eq(sent, received);
    }
}

/* ---- moec diff ---- */

static const char small[] =
    "model: {name: small, num_hidden_layers: 2, hidden_size: 256, moe_intermediate_size: 96,\n"
    "  num_experts: 8, num_experts_per_tok: 2, router: {method: topk_softmax}}\n"
    "cluster: {gpu: h200, ranks: 2}\ntarget: host\n"
    "moe_config: {load_balancer: {num_slots: 10, initial_global_assignments: {\n"
    "  0: [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], 1: [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]}}}\n";
static const char layer_0[] = "[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]";

static void write_file(const char *name, const char *content) {
    cr_assert_eq(file_write(in_dir(name), content, strlen(content)), 0);
}

/* A placement of TensorRT-LLM with these slots in both layers of `small`. */
static void write_balancer(const char *name, const char *first, const char *second) {
    write_file(name, arena_printf(&arena,
                                  "num_slots: 10\nlayer_updates_per_iter: 0\n"
                                  "initial_global_assignments:\n  0: %s\n  1: %s\n",
                                  first, second));
}

Test(cost, diff_of_known_placements) {
    write_file("small.yaml", small);
    write_balancer("b.yaml", layer_0, "[7, 1, 2, 3, 4, 5, 6, 0, 1, 4]");
    struct node *root = json("diff @small.yaml @b.yaml --json");
    cr_expect_str_eq(text(root, "model"), "small");
    cr_expect_eq(number(root, "slot_bytes"), 3 * 256 * 96 * 2);
    /* rank 0 gains 7 for 0; rank 1 gains 4 for 7 */
    cr_expect_eq(number(root, "moves"), 2);
    cr_expect_eq(number(root, "between_ranks"), 2);
    cr_expect_eq(number(root, "bytes"), 2 * 147456);
    near(number(root, "us"), 147456 / (450e3 * 0.77), 1e-6, "one slot for each rank");
    struct node *layers = map_get(root, "layers");
    cr_assert_eq(layers->count, 2);
    cr_expect_eq(number(layers->items[0], "moves"), 0);
    struct node *order = map_get(layers->items[1], "order");
    cr_assert_eq(order->count, 2);
    for (int i = 0; i < 2; i++) {
        int e = (int)number(order->items[i], "expert");
        cr_expect(e == 7 || e == 4);
        cr_expect_eq(number(order->items[i], "rank"), e == 7 ? 0 : 1);
        cr_expect_eq(number(order->items[i], "slot"), e == 7 ? 0 : 4);
    }
    cr_expect_eq(number(layers->items[1], "imbalance_before"), 1);
}

Test(cost, diff_reads_every_form_of_a_placement) {
    static const char *const forms[] = {"yaml", "json", "trtllm", "sglang", "vllm"};
    write_file("small.yaml", small);
    cr_assert_eq(run("build @small.yaml -o @small.moe --json"), 0, "%s", err);
    for (int i = -1; i < 5; i++) {
        const char *file = "small.moe";
        if (i >= 0) {
            cr_assert_eq(run(arena_printf(&arena, "plan @small.yaml --format %s", forms[i])), 0,
                         "%s", err);
            write_file(file = forms[i], out);
        }
        struct node *root = json(arena_printf(&arena, "diff @%s @small.yaml --json", file));
        cr_expect_eq(number(root, "moves"), 0, "%s", file);
        cr_expect_eq(map_get(root, "layers")->count, 2, "%s", file);
        root = json(arena_printf(&arena, "diff @small.moe @%s --json", file));
        cr_expect_eq(number(root, "moves"), 0, "%s", file);
        cr_expect_eq(number(root, "slot_bytes"), 147456);
    }
    /* two files that name no model */
    struct node *root = json("diff @json @yaml --json");
    cr_expect_str_eq(text(root, "bytes"), "null");
    cr_expect_eq(number(root, "ranks"), 2);
    root = json("diff @trtllm @trtllm --ep 2 --json");
    cr_expect_str_eq(text(root, "model"), "null");
}

/* From five slots on a rank to four, and back. */
Test(cost, diff_of_fewer_slots_drops_copies) {
    write_file("small.yaml", small);
    write_file("narrow.json",
               "{\"model\": \"small\", \"ranks\": 2, \"slots_per_rank\": 4, \"layers\": ["
               "{\"layer\": 0, \"expert_of_slot\": [4, 1, 2, 3, 0, 5, 6, 7]},"
               "{\"layer\": 1, \"expert_of_slot\": [4, 7, 6, 5, 3, 2, 1, 0]}]}");
    struct node *root = json("diff @small.yaml @narrow.json --json");
    struct node *first = map_get(root, "layers")->items[0];
    cr_expect_eq(number(first, "moves"), 0);
    cr_expect_eq(number(first, "dropped"), 2);
    near(number(first, "imbalance_after"), 1, 1e-9, "four each");
    /* rank 0 gets 7, 6, 5 in the second layer, rank 1 gets 3 and 2 */
    struct node *second = map_get(root, "layers")->items[1];
    cr_expect_eq(number(second, "moves"), 5);
    near(number(root, "us"), 3 * 147456 / (450e3 * 0.77), 1e-6, "rank 0 gets most");
    root = json("diff @narrow.json @small.yaml --json");
    first = map_get(root, "layers")->items[0];
    cr_expect_eq(number(first, "moves"), 2);
    cr_expect_eq(number(first, "dropped"), 0);
    /* rank 0: 0, then 0 to 3; rank 1: 1, then 5 to 7 */
    near(number(root, "us"), 5 * 147456 / (450e3 * 0.77), 1e-6, "rank 0 gets most");
}

/* There and back again moves as many slots, and through a third placement no fewer. */
Test(cost, diff_there_and_back) {
    write_file("small.yaml", small);
    write_balancer("a.yaml", layer_0, layer_0);
    write_balancer("b.yaml", "[7, 1, 2, 3, 4, 5, 6, 0, 5, 4]",
                   "[0, 7, 1, 6, 2, 5, 3, 4, 0, 1]");
    write_balancer("c.yaml", "[5, 1, 2, 6, 4, 5, 6, 0, 7, 3]", layer_0);
    double ab = number(json("diff @a.yaml @b.yaml --ep 2 --json"), "moves");
    double ba = number(json("diff @b.yaml @a.yaml --ep 2 --json"), "moves");
    double bc = number(json("diff @b.yaml @c.yaml --ep 2 --json"), "moves");
    double ac = number(json("diff @a.yaml @c.yaml --ep 2 --json"), "moves");
    cr_expect_eq(ab, ba);
    cr_expect_leq(ac, ab + bc);
    cr_expect_gt(ab, 0);
}

/* Expert 4 alone has tokens: with one replica more its rank has half. */
Test(cost, diff_weighs_moves_by_recorded_loads) {
    write_file("small.yaml", small);
    write_file("loads.csv", "0,0,0,0,100,0,0,0\n1,1,1,1,1,1,1,1\n");
    write_balancer("a.yaml", "[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]", layer_0);
    write_balancer("b.yaml", "[0, 1, 2, 3, 4, 5, 6, 7, 0, 4]", layer_0);
    struct node *layer =
        map_get(json("diff @a.yaml @b.yaml --ep 2 --loads @loads.csv --json"), "layers")
            ->items[0];
    near(number(layer, "imbalance_before"), 2, 1e-9, "before");
    near(number(layer, "imbalance_after"), 1, 1e-9, "after");
}

Test(cost, diff_says_what_does_not_match) {
    static const struct {
        const char *line, *why;
        int code;
    } wrong[] = {
        {"diff plans/deepseek-v3-ep32.yaml plans/qwen3-30b-1gpu.yaml", "is for deepseek-v3", 1},
        {"diff @small.yaml @four.yaml", "has 2 ranks, but", 1},
        {"diff @a.yaml @b.yaml", "how many ranks", 1},
        {"diff @small.yaml @short.yaml", "missing layers: 1", 1},
        {"diff @short.yaml @a.yaml --ep 2", "layer 1 is no MoE layer", 1},
        {"diff @a.yaml @short.yaml --ep 2", "missing layers: 1", 1},
        {"diff @small.yaml @lost.yaml", "expert 7 is in no slot", 1},
        {"diff @small.yaml @nothing.yaml", "nothing.yaml", 1},
        {"diff @small.yaml @", "MANIFEST", 1},
        {"diff @small.yaml @a.yaml --layer 2", "has no MoE layer 2", 1},
        {"diff @small.yaml @a.yaml --loads @nothing.csv", "nothing.csv", 1},
        {"diff @sglang.json @sglang.json", "give --model", 1},
        {"diff @none.json @none.json", "has no layers", 1},
        {"diff @odd.json @odd.json", "", 1},
        {"diff @small.yaml", "usage", 2},
        {"diff @small.yaml @a.yaml --ep 0", "--ep", 2}};
    write_file("small.yaml", small);
    char *four = arena_strdup(&arena, small);
    memcpy(strstr(four, "ranks: 2"), "ranks: 4", 8);
    strcpy(strstr(four, "moe_config"), "policy: even\n");
    write_file("four.yaml", four);
    write_balancer("a.yaml", layer_0, layer_0);
    write_balancer("b.yaml", layer_0, layer_0);
    write_file(
        "short.yaml",
        arena_printf(&arena, "num_slots: 10\ninitial_global_assignments:\n  0: %s\n", layer_0));
    write_balancer("lost.yaml", layer_0, "[0, 1, 2, 3, 4, 5, 6, 6, 0, 1]");
    write_file("none.json", "{\"model\":\"n\",\"ranks\":1,\"slots_per_rank\":1,\"layers\":[]}");
    write_file("odd.json", "{\"ranks\":2,\"slots_per_rank\":1,\"layers\":[{\"layer\":\"x\","
                           "\"expert_of_slot\":[0,-7]},3]}");
    write_file("sglang.json", "{\"physical_to_logical_map\": [[0, 1]]}");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        cr_expect_eq(run(wrong[i].line), wrong[i].code, "moec %s", wrong[i].line);
        cr_expect(strstr(err, wrong[i].why), "moec %s: %.1000s", wrong[i].line, err);
        cr_expect_str_eq(out, "", "moec %s", wrong[i].line);
    }
}

/* ---- moec explain ---- */

/* 64 experts on 8 ranks, `slots` slots, the loads of loads.csv. */
static void write_hot(const char *name, int slots, const char *rest) {
    write_file(name, arena_printf(&arena,
                                  "model: {name: hot, num_hidden_layers: 2, hidden_size: 4096, "
                                  "moe_intermediate_size: 1536,\n  num_experts: 64, "
                                  "num_experts_per_tok: 4, router: {method: topk_softmax}}\n"
                                  "moe_config: {max_num_tokens: 16384, load_balancer: "
                                  "{num_slots: %d}}\n%s",
                                  slots, rest));
}

/* Two layers; expert e of the first has 1000 / (e + 1) tokens, or all have as many. */
static void write_loads(bool hot) {
    struct buf b = {.arena = &arena};
    for (int layer = 0; layer < 2; layer++)
        for (int e = 0; e < 64; e++)
            buf_printf(&b, "%d%s", hot && !layer ? 1000 / (e + 1) : 100, e < 63 ? "," : "\n");
    write_file("loads.csv", b.data);
}

static struct node *balance_of(struct node *root) {
    return map_get(map_get(root, "classes")->items[0], "balance");
}

static const char on_h200[] = "cluster: {gpu: h200, ranks: 8}\nloads: loads.csv\n";

Test(cost, explain_says_when_balancing_is_worth_it) {
    write_loads(true);
    write_hot("hot.yaml", 72, on_h200);
    struct node *root = json("explain @hot.yaml --json"), *b = balance_of(root);
    cr_expect_str_eq(text(b, "verdict"), "worth_it");
    cr_expect_eq(number(b, "redundant_slots"), 8);
    cr_expect_eq(number(b, "redundant_bytes"), 2 * 3. * 4096 * 1536 * 2);
    struct node *ways = map_get(b, "ways"), *steps = map_get(b, "steps");
    double in_order = 0, all = 0;
    for (int e = 0; e < 64; e++) {
        in_order += e < 8 ? 1000 / (e + 1) : 0;
        all += 1000 / (e + 1);
    }
    in_order = in_order * 8 / all;
    near(number(map_get(root, "loads")->items[0], "imbalance_in_order"), (in_order + 1) / 2,
         1e-5, "mean of a hot and an even layer");
    near(number(map_get(ways, "in_order"), "imbalance"), (in_order + 1) / 2, 1e-5, "the same");
    double planned = number(map_get(ways, "planned"), "imbalance");
    struct node *rearranged = map_get(ways, "rearranged");
    cr_expect_lt(planned, 1.1);
    cr_expect_eq(number(map_get(ways, "planned"), "slots_per_rank"), 9);
    cr_expect_eq(number(rearranged, "slots_per_rank"), 8);
    cr_expect_gt(number(rearranged, "imbalance"), planned);
    cr_expect_lt(number(rearranged, "imbalance"), (in_order + 1) / 2);
    bool reached = false;
    for (int i = 0; i < steps->count; i++) {
        struct node *s = steps->items[i];
        double gain = 1 - number(s, "planned_us") / number(s, "in_order_us");
        near(number(s, "gain"), gain, 1e-3, "gain");
        reached |= number(s, "tokens") == number(b, "worth_from_tokens");
        cr_expect(!reached || gain >= 0.01);
        cr_expect_gt(number(s, "rearranged_us"), 0);
    }
    cr_expect(reached);
    struct node *hottest = map_get(map_get(root, "layers")->items[0], "hottest");
    cr_expect_eq(number(hottest->items[0], "expert"), 0);
    near(number(hottest->items[0], "share"), 1000 / all, 1e-5, "share");
    cr_expect_gt(number(hottest->items[0], "slots"), 1);
}

Test(cost, explain_says_when_balancing_is_not_worth_it) {
    static const struct {
        bool hot;
        int slots;
        const char *rest, *verdict;
    } cases[] = {
        {false, 72, "cluster: {gpu: h200, ranks: 8}\nloads: loads.csv\n", "not_worth_it"},
        {true, 72, "cluster: {gpu: h200, ranks: 8}\n", "no_loads"},
        {true, 72, "cluster: {ranks: 8}\nloads: loads.csv\n", "no_gpu"},
        {true, 64, "cluster: {gpu: h200}\nloads: loads.csv\n", "one_rank"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_loads(cases[i].hot);
        write_hot("hot.yaml", cases[i].slots, cases[i].rest);
        struct node *b = balance_of(json("explain @hot.yaml --json"));
        cr_expect_str_eq(text(b, "verdict"), cases[i].verdict);
        cr_expect_str_eq(text(b, "worth_from_tokens"), "null");
        cr_expect_eq(run("explain @hot.yaml --layer 1"), 0);
        cr_expect(strstr(out, "verdict:"));
    }
}

/* A bundle holds no loads; with the same ones it tells the same of every key. */
Test(cost, explain_judges_a_bundle_by_loads_as_it_judges_its_file) {
    write_loads(true);
    write_hot("hot.yaml", 64, arena_printf(&arena, "%starget: host\n", on_h200));
    cr_assert_eq(run("build @hot.yaml -o @hot.moe"), 0, "%s", err);
    cr_assert_eq(run("explain @hot.yaml --json"), 0, "%s", err);
    const char *file = out;
    cr_assert_eq(run("explain @hot.moe --loads @loads.csv --json"), 0, "%s", err);
    cr_expect(strstr(file, "\"verdict\":\"worth_it\""));
    if (strcmp(file, out))
        cr_expect(false, "they differ: %.300s", out);
    cr_assert_eq(run("explain @hot.moe --json"), 0, "%s", err);
    cr_expect(strstr(out, "\"verdict\":\"no_loads\""));
    cr_expect_eq(run("explain @hot.yaml --loads @loads.csv"), 1);
    cr_expect(strstr(err, "belongs to a bundle"), "%s", err);
    cr_expect_eq(run("explain @hot.moe --loads @nothing.csv"), 1);
}

/* Two commands, one model. */
Test(cost, explain_and_simulate_agree) {
    write_loads(true);
    write_hot("hot.yaml", 72, on_h200);
    struct node *steps = map_get(balance_of(json("explain @hot.yaml --json")), "steps");
    for (int i = 0; i < steps->count; i++) {
        int tokens = (int)number(steps->items[i], "tokens");
        struct node *point =
            map_get(json(arena_printf(&arena, "simulate @hot.yaml --json --tokens %d", tokens)),
                    "points")
                ->items[0];
        near(number(point, "step_us"), number(steps->items[i], "planned_us"), 1e-4, "step");
        cr_expect_str_eq(text(point, "exchange"), text(steps->items[i], "exchange"));
    }
    cr_expect_eq(run("simulate @hot.yaml --imbalance 2"), 1);
    cr_expect(strstr(err, "--imbalance: it follows"), "%s", err);
}

/* ---- golden ---- */

static void check_golden(const char *path) {
    char *line = read_text(path);
    line[strcspn(line, "\n")] = 0;
    char *want = arena_printf(&arena, "%.*s.out", (int)(strlen(path) - 5), path);
    cr_expect_eq(run(line), 0, "moec %s: %.1000s", line, err);
    if (getenv("MOEC_GOLDEN"))
        cr_assert_eq(file_write(want, out, strlen(out)), 0);
    else if (strcmp(out, read_text(want)))
        cr_expect(false, "moec %s: not what %s has; see git diff after make golden", line,
                  want);
}

Test(golden, costs_are_what_they_were, .init = set_up, .fini = tear_down) {
    glob_t g;
    cr_assert_eq(glob("tests/golden/cost/*.args", 0, NULL, &g), 0);
    for (size_t i = 0; i < g.gl_pathc; i++)
        check_golden(g.gl_pathv[i]);
    globfree(&g);
}
