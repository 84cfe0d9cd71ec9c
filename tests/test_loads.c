/* Recorded loads: every format read and written, what is wrong with them, moec stats.
 *
 * tests/golden/loads holds malformed files, each beside the exact text that must reach stderr
 * when it is read for shared/model.yaml. MOEC_GOLDEN=1 rewrites the .err files. */
#include "../compiler/loads.h"

#include <criterion/criterion.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;
static char dir[32]; /* of the test's own files */

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    strcpy(dir, "/tmp/moec-loads-XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void tear_down(void) {
    dir_remove(dir);
    arena_free(&arena);
}

TestSuite(loads, .init = set_up, .fini = tear_down, .timeout = 120);

/* ---- helpers ---- */

static const char *printed(void) {
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    diag_print(&diags, f);
    fclose(f);
    const char *copy = arena_strdup(&arena, text);
    free(text);
    return copy;
}

static void forget(void) {
    diags = (struct diags){.arena = &arena};
}

static const char *in_dir(const char *name) {
    return arena_printf(&arena, "%s/%s", dir, name);
}

static const char *file(const char *name, const char *text) {
    const char *path = in_dir(name);
    cr_assert_eq(file_write(path, text, strlen(text)), 0);
    return path;
}

static struct model *small_model(void) {
    struct model *m = model_read(&arena, &diags, "tests/golden/loads/shared/model.yaml");
    cr_assert(m, "%s", printed());
    return m;
}

static struct loads *read_with(const char *path, const struct model *m,
                               const struct loads_options *o) {
    static const struct loads_options all;
    forget();
    return loads_read(&arena, &diags, &path, NULL, 1, m, o ? o : &all);
}

static struct loads *accept(const char *path, const struct model *m) {
    struct loads *l = read_with(path, m, NULL);
    cr_assert(l, "%s refused:\n%s", path, printed());
    return l;
}

static void expect_counts(const struct loads *l, int workload, int layer, int n,
                          const double *want) {
    int row = loads_layer(l, layer);
    cr_assert(row >= 0 && l->experts == n, "no layer %d", layer);
    for (int e = 0; e < n; e++)
        cr_expect_eq(l->workloads[workload].count[row * n + e], want[e],
                     "workload %d, layer %d, expert %d: %g, not %g", workload, layer, e,
                     l->workloads[workload].count[row * n + e], want[e]);
}
#define EXPECT4(l, w, layer, a, b, c, d) \
    expect_counts(l, w, layer, 4, (const double[]){a, b, c, d})

/* An error must be there that has the words. */
static void refuse(const char *path, const struct model *m, const struct loads_options *o,
                   const char *words) {
    cr_expect_null(read_with(path, m, o), "%s accepted", path);
    cr_expect(strstr(printed(), words), "%s: expected '%s' in:\n%s", path, words, printed());
}

/* A safetensors file byte by byte: entries of the JSON header, then the data. */
static void write_safetensors(const char *path, const char *header, const void *data,
                              size_t bytes) {
    FILE *f = fopen(path, "wb");
    size_t n = strlen(header);
    cr_assert(f);
    for (int i = 0; i < 8; i++)
        fputc((int)(n >> 8 * i & 255), f);
    fwrite(header, 1, n, f);
    fwrite(data, 1, bytes, f);
    cr_assert_eq(fclose(f), 0);
}

enum { ITERATIONS = 3, FIRST_ITERATION = 50, LAYERS = 3, RANKS = 2 };

static int64_t recorded(int rank, int iteration, int layer, int e) {
    return 1000 * rank + 100 * iteration + 10 * layer + e;
}

/* int64 [n] per iteration and layer 1..3, as the upstream recorder writes it. */
static void write_rank(const char *folder, int rank, int n) {
    struct buf header = {.arena = &arena}, data = {.arena = &arena};
    buf_printf(&header, "{");
    for (int i = 0; i < ITERATIONS; i++)
        for (int l = 1; l <= LAYERS; l++) {
            buf_printf(&header, "%s\"%d_%d\":{\"dtype\":\"I64\",\"shape\":[%d],",
                       i + l > 1 ? "," : "", FIRST_ITERATION + i, l, n);
            buf_printf(&header, "\"data_offsets\":[%zu,%zu]}", data.len,
                       data.len + 8 * (size_t)n);
            for (int e = 0; e < n; e++) {
                int64_t v = recorded(rank, i, l, e);
                buf_add(&data, &v, sizeof v);
            }
        }
    buf_printf(&header, "}");
    write_safetensors(arena_printf(&arena, "%s/rank%d.safetensors", folder, rank), header.data,
                      data.data, data.len);
}

static const char *write_folder(const char *name, int n) {
    const char *folder = in_dir(name);
    cr_assert_eq(dir_make(folder), 0);
    file(arena_printf(&arena, "%s/meta_info.json", name),
         arena_printf(&arena, "{\"num_experts\": %d, \"num_experts_per_token\": 2}", n));
    for (int rank = 0; rank < RANKS; rank++)
        write_rank(folder, rank, n);
    return folder;
}

/* ---- reading ---- */

Test(loads, a_csv_is_one_line_per_moe_layer) {
    const char *path = file("a.csv", "1,2,3,4\n 5, 6 ,7,8\r\n9,10,11.5,1e3");
    struct loads *l = accept(path, small_model());
    cr_expect_eq(l->num_layers, 4); /* 1, 2, 3 and the MTP layer */
    cr_expect_eq(l->num_workloads, 1);
    cr_expect_str_eq(l->workloads[0].name, "a.csv");
    cr_expect_eq(l->workloads[0].weight, 1);
    EXPECT4(l, 0, 1, 1, 2, 3, 4);
    EXPECT4(l, 0, 2, 5, 6, 7, 8);
    EXPECT4(l, 0, 3, 9, 10, 11.5, 1000);
    EXPECT4(l, 0, 4, 0, 0, 0, 0);
    cr_expect_eq(loads_layer(l, 0), -1);
    cr_expect_eq(loads_layer(l, 5), -1);
    cr_expect(strstr(printed(), "note: MTP layers are not recorded and weigh evenly: 4"));
    l = accept(path, NULL);
    cr_expect_eq(l->num_layers, 3);
    EXPECT4(l, 0, 0, 1, 2, 3, 4);
    cr_expect_null(diags.first, "%s", printed());
}

Test(loads, mtp_layers_and_empty_dense_layers_may_be_recorded) {
    struct model *m = small_model();
    struct loads *l = accept(file("all.csv", "1,1,1,1\n2,2,2,2\n3,3,3,3\n4,4,4,4\n"), m);
    EXPECT4(l, 0, 4, 4, 4, 4, 4);
    cr_expect_null(diags.first, "%s", printed());
    l = accept(file("dense.csv", "0,0,0,0\n1,1,1,1\n2,2,2,2\n3,3,3,3\n"), m);
    EXPECT4(l, 0, 1, 1, 1, 1, 1);
    EXPECT4(l, 0, 3, 3, 3, 3, 3);
    EXPECT4(l, 0, 4, 0, 0, 0, 0);
}

Test(loads, a_layer_without_tokens_draws_a_warning) {
    accept(file("zero.csv", "1,1,1,1\n0,0,0,0\n3,3,3,3\n"), small_model());
    cr_expect(strstr(printed(), "warning: layers without tokens weigh evenly: 2\n"), "%s",
              printed());
}

Test(loads, sglang_counts_are_summed_over_steps) {
    struct model *m = small_model();
    const char *path =
        file("s.json", "{\"rank\": 0, \"logical_count\": [[[1,2,3,4],[5,6,7,8],[9,10,11,12]],"
                       "[[10,20,30,40],[50,60,70,80],[90,100,110,120]],"
                       "[[100,0,0,0],[0,0,0,0],[0,0,0,0]]]}");
    struct loads *l = accept(path, m);
    EXPECT4(l, 0, 1, 111, 22, 33, 44);
    EXPECT4(l, 0, 3, 99, 110, 121, 132);
    struct loads_options o = {.iter_start = 1, .iter_stop = 2};
    l = read_with(path, m, &o);
    cr_assert(l, "%s", printed());
    EXPECT4(l, 0, 1, 10, 20, 30, 40);
    o = (struct loads_options){.window = 2};
    l = read_with(path, m, &o);
    cr_assert(l && l->num_workloads == 2, "%s", printed());
    EXPECT4(l, 0, 1, 11, 22, 33, 44);
    EXPECT4(l, 1, 1, 100, 0, 0, 0);
    o = (struct loads_options){.iter_start = 1, .iter_stop = 4};
    refuse(path, m, &o, "iterations 1 to 3 are asked for, but 0 to 2 are there");
}

Test(loads, sglang_counts_of_one_step_may_lie_in_maps) {
    struct loads *l = accept(file("n.json", "{\"x\": 1, \"last\": {\"logical_count\": "
                                            "[[1,2,3,4],[5,6,7,8],[9,10,11,12]]}}"),
                             small_model());
    EXPECT4(l, 0, 2, 5, 6, 7, 8);
}

Test(loads, our_own_form_carries_layers_name_and_weight) {
    const char *path = file("own.json", "{\"moec_loads\": 1, \"model\": \"small\", \"name\": "
                                        "\"chat\", \"weight\": 2.5, \"layers\": [1, 2, 3, 4], "
                                        "\"experts\": 4, \"top_k\": 2, \"counts\": [[1,2,3,4],"
                                        "[5,6,7,8],[9,10,11,12],[13,14,15,16]]}");
    struct loads *l = accept(path, small_model());
    cr_expect_str_eq(l->workloads[0].name, "chat");
    cr_expect_eq(l->workloads[0].weight, 2.5);
    cr_expect_eq(l->experts_per_token, 2);
    EXPECT4(l, 0, 4, 13, 14, 15, 16);
    cr_expect_null(diags.first, "%s", printed());
    l = accept(path, NULL);
    cr_expect_eq(l->layers[0], 1);
}

Test(loads, a_trtllm_folder_is_summed_over_ranks_and_iterations) {
    const char *path = write_folder("stat", 4);
    struct loads *l = accept(path, small_model());
    cr_expect_eq(l->workloads[0].ranks, RANKS);
    cr_expect_eq(l->experts_per_token, 2);
    for (int layer = 1; layer <= LAYERS; layer++) {
        double want[4] = {0};
        for (int r = 0; r < RANKS; r++)
            for (int i = 0; i < ITERATIONS; i++)
                for (int e = 0; e < 4; e++)
                    want[e] += (double)recorded(r, i, layer, e);
        expect_counts(l, 0, layer, 4, want);
    }
    l = accept(path, NULL);
    cr_expect_eq(l->num_layers, LAYERS);
    cr_expect_eq(l->layers[0], 1);
}

Test(loads, iterations_of_a_trtllm_folder_are_half_open_and_make_windows) {
    const char *path = write_folder("stat", 4);
    struct loads_options o = {.iter_start = 51, .iter_stop = 52};
    struct loads *l = read_with(path, NULL, &o);
    cr_assert(l, "%s", printed());
    EXPECT4(l, 0, 1, 1220, 1222, 1224, 1226);
    o = (struct loads_options){.window = 1};
    l = read_with(path, NULL, &o);
    cr_assert(l && l->num_workloads == ITERATIONS);
    EXPECT4(l, 1, 1, 1220, 1222, 1224, 1226);
    o = (struct loads_options){.iter_start = 49, .iter_stop = 52};
    refuse(path, NULL, &o, "iterations 49 to 51 are asked for, but 50 to 52 are there");
    o = (struct loads_options){.iter_start = 53};
    refuse(path, NULL, &o, "are asked for");
}

Test(loads, slots_that_an_eplb_recorded_are_mapped_back) {
    int slots[LAYERS][6] = {{0, 1, 2, 3, 0, 1}, {3, 3, 3, 2, 1, 0}, {0, 1, 2, 3, 3, 0}};
    struct assignment as[LAYERS];
    for (int l = 0; l < LAYERS; l++)
        as[l] = (struct assignment){.layer = l + 1, .expert_of_slot = slots[l]};
    struct loads_options o = {.assignments = as,
                              .num_assignments = LAYERS,
                              .num_slots = 6,
                              .iter_start = 50,
                              .iter_stop = 51};
    const char *path = write_folder("stat", 6);
    struct model *m = small_model();
    struct loads *l = read_with(path, m, &o);
    cr_assert(l, "%s", printed());
    /* Slot s of layer l counts 2 * (10 l + s) + 1000. */
    EXPECT4(l, 0, 1, 1020 + 1028, 1022 + 1030, 1024, 1026);
    EXPECT4(l, 0, 2, 1050, 1048, 1046, 1040 + 1042 + 1044);
    refuse(path, m, NULL, "these are slots, and its file is needed");
    o.num_assignments = 2;
    refuse(path, m, &o, "layer 3 is recorded in slots, but the load balancer assigns none");
}

Test(loads, an_incomplete_trtllm_folder_is_refused) {
    const char *path = write_folder("stat", 4);
    refuse(in_dir("none"), NULL, NULL, "cannot read");
    rename(in_dir("stat/rank0.safetensors"), in_dir("stat/rank2.safetensors"));
    refuse(path, NULL, NULL, "rank0.safetensors is missing: there are 2 of 3");
    unlink(in_dir("stat/rank2.safetensors"));
    unlink(in_dir("stat/rank1.safetensors"));
    refuse(path, NULL, NULL, "no rank0.safetensors");
    unlink(in_dir("stat/meta_info.json"));
    refuse(path, NULL, NULL, "meta_info.json");
}

/* Writes rank 0 alone with this header and 64 bytes of data, and reads the folder. */
static void refuse_rank(const char *header, const char *words) {
    int64_t data[8] = {1, 2, 3, 4, 5, 6, 7, -8};
    write_folder("stat", 4);
    unlink(in_dir("stat/rank1.safetensors"));
    write_safetensors(in_dir("stat/rank0.safetensors"), header, data, sizeof data);
    refuse(in_dir("stat"), NULL, NULL, words);
}

Test(loads, wrong_tensors_of_a_trtllm_folder_are_refused) {
#define T(name, type, shape, from, to) \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":[" from "," to \
    "]}"
    refuse_rank(
        "{" T("0_1", "I64", "[4]", "0", "32") "," T("0_2", "I64", "[4]", "32", "64") "}",
        "tensor 0_2, entry 3: -8 is no count of tokens");
    refuse_rank(
        "{" T("0_1", "I64", "[4]", "0", "32") "," T("1_2", "I64", "[4]", "32", "64") "}",
        "no tensor 0_2");
    refuse_rank(
        "{" T("0_1", "I64", "[4]", "0", "32") "," T("2_1", "I64", "[4]", "32", "64") "}",
        "no tensor 1_1");
    refuse_rank("{" T("0_1", "F64", "[8]", "0", "64") "}", "has type F64; counts are I64");
    refuse_rank("{" T("0_1", "I64", "[8]", "0", "64") "}", "must have shape [4]");
    refuse_rank("{" T("0_1", "I64", "[2,4]", "0", "64") "}", "must have shape [4]");
    refuse_rank("{" T("layer1", "I64", "[8]", "0", "64") "}", "expected a name like 12_3");
    refuse_rank("{" T("00_1", "I64", "[8]", "0", "64") "}", "expected a name like 12_3");
    refuse_rank("{" T("0_1", "I64", "[8]", "0", "128") "}", "rank0.safetensors: error:");
    refuse_rank("{" T("0_1", "I64", "[8]", "0", "64"), "rank0.safetensors: error:");
    refuse_rank("{}", "rank0.safetensors: error:");
#undef T
}

Test(loads, ranks_of_a_trtllm_folder_must_hold_the_same) {
    int64_t data[12] = {0};
    const char *one = "{\"50_1\":{\"dtype\":\"I64\",\"shape\":[4],\"data_offsets\":[0,32]}}";
    const char *path = write_folder("stat", 4);
    write_safetensors(in_dir("stat/rank1.safetensors"), one, data, 32);
    refuse(path, NULL, NULL, "rank1.safetensors: error: no tensor 50_2");
    write_safetensors(in_dir("stat/rank0.safetensors"), one, data, 32);
    write_rank(path, 1, 4);
    refuse(path, NULL, NULL, "rank1.safetensors: error: tensor '50_2' is not in");
}

Test(loads, a_truncated_rank_file_is_refused) {
    const char *path = write_folder("stat", 4);
    struct stat st;
    cr_assert_eq(stat(in_dir("stat/rank1.safetensors"), &st), 0);
    for (off_t n = 0; n < st.st_size; n += n < 64 ? 1 : 37) {
        write_rank(path, 1, 4);
        cr_assert_eq(truncate(in_dir("stat/rank1.safetensors"), n), 0);
        refuse(path, NULL, NULL, "rank1.safetensors: error:");
    }
}

Test(loads, a_sum_that_no_longer_is_exact_is_refused) {
    refuse(file("big.json", "{\"logical_count\": [[[9e11]],[[9e11]]]}"), NULL, NULL,
           "more than 1e+12 tokens in sum");
}

Test(loads, bytes_that_are_no_text_are_named) {
    char torch[] = "PK\3\4 and so on";
    cr_assert_eq(file_write(in_dir("x.pt"), torch, sizeof torch), 0);
    refuse(in_dir("x.pt"), NULL, NULL, "a PyTorch file: save its logical_count as JSON");
    write_folder("stat", 4);
    refuse(in_dir("stat/rank0.safetensors"), NULL, NULL, "give the folder");
}

Test(loads, inputs_without_a_model_must_have_one_shape) {
    const char *paths[] = {file("a.csv", "1,2\n3,4\n"), file("b.csv", "5,6\n7,8\n"),
                           file("c.csv", "5,6,7\n7,8,9\n")};
    struct loads_options o = {0};
    struct loads *l = loads_read(&arena, &diags, paths, NULL, 2, NULL, &o);
    cr_assert(l && l->num_workloads == 2, "%s", printed());
    cr_expect_eq(l->workloads[1].input, 1);
    cr_expect_eq(l->workloads[1].count[3], 8);
    cr_expect_null(loads_read(&arena, &diags, paths, NULL, 3, NULL, &o));
    cr_expect(strstr(printed(), "c.csv:1:1: error: layers 0-1 and 3 experts are recorded here"),
              "%s", printed());
}

/* ---- golden errors ---- */

Test(golden, malformed_loads_give_exactly_these_errors) {
    bool rewrite = getenv("MOEC_GOLDEN");
    struct loads_options o = {0};
    glob_t g;
    struct model *m;
    arena = (struct arena){0};
    forget();
    m = small_model();
    cr_assert_eq(glob("tests/golden/loads/*.csv", 0, NULL, &g), 0);
    cr_assert_eq(glob("tests/golden/loads/*.json", GLOB_APPEND, NULL, &g), 0);
    cr_expect_geq(g.gl_pathc, 35);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        const char *path = g.gl_pathv[i], *want = "";
        forget();
        cr_expect_null(loads_read(&arena, &diags, &path, NULL, 1, m, &o), "%s: accepted", path);
        const char *got = printed(), *golden = arena_printf(&arena, "%s.err", path);
        size_t len;
        if (rewrite)
            cr_assert_eq(file_write(golden, got, strlen(got)), 0);
        cr_expect_eq(file_read(&arena, golden, 1 << 20, (char **)&want, &len), 0, "%s", golden);
        cr_expect_str_eq(got, want, "%s:\n%s\nexpected:\n%s", path, got, want);
    }
    globfree(&g);
    arena_free(&arena);
}
