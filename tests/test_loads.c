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
    refuse(path, NULL, NULL, "a folder without meta_info.json is no TensorRT-LLM recording");
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

/* Flips, drops and doubles bytes; the result is read or refused, and nothing else. */
static void mutate(char *text, size_t *len, uint64_t *state) {
    for (int n = 0; n < 3; n++) {
        *state = *state * 6364136223846793005 + 1442695040888963407;
        size_t at = (size_t)(*state >> 33) % *len;
        if (*state >> 60 < 8)
            text[at] = "0123456789-,.[]{}\":eEnN\n \377"[(*state >> 27) % 26];
        else if (*state >> 60 < 11)
            text[at] ^= (char)(1 << (*state >> 24 & 7));
        else if (*state >> 60 < 14 && *len > 16)
            *len = at < 16 ? 16 : at;
    }
}

Test(loads, damaged_files_are_read_or_refused) {
    struct model *m = small_model();
    write_folder("stat", 4);
    const char *own = "{\"moec_loads\":1,\"layers\":[1,2,3],\"experts\":4,\"counts\":"
                      "[[1,2,3,4],[5,6,7,8],[9,10,11,12]]}";
    const char *sglang = "{\"logical_count\":[[[1,2,3,4],[5,6,7,8],[9,10,11,12]]]}";
    const char *const victims[] = {file("a.csv", "1,2,3,4\n5,6,7,8\n9,10,11,12\n"),
                                   file("own.json", own), file("s.json", sglang),
                                   in_dir("stat/rank1.safetensors"),
                                   in_dir("stat/meta_info.json")};
    uint64_t state = 1;
    int refused = 0, runs = 0;
    for (int v = 0; v < 5; v++) {
        char *text, *copy;
        size_t len, cut;
        cr_assert_eq(file_read(&arena, victims[v], 1 << 20, &text, &len), 0);
        copy = arena_alloc(&arena, len + 1);
        for (int i = 0; i < 300; i++, runs++) {
            struct arena keep = arena;
            arena = (struct arena){0};
            memcpy(copy, text, cut = len);
            mutate(copy, &cut, &state);
            cr_assert_eq(file_write(victims[v], copy, cut), 0);
            struct loads *l = read_with(v < 3 ? victims[v] : in_dir("stat"), m, NULL);
            cr_assert(!l == (diags.errors > 0), "%s", printed());
            refused += !l;
            arena_free(&arena);
            arena = keep;
        }
        cr_assert_eq(file_write(victims[v], text, len), 0);
    }
    cr_expect(refused > runs / 4 && refused < runs, "%d of %d refused", refused, runs);
}

/* ---- moec stats ---- */

static char output[1 << 20]; /* of the last command, stdout and stderr */

/* Exit status of moec stats with these arguments. */
static int stats(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static int stats(const char *fmt, ...) {
    char args[2048];
    const char *b = getenv("B");
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(args, sizeof args, fmt, ap);
    va_end(ap);
    cr_assert(n > 0 && n < (int)sizeof args);
    FILE *pipe =
        popen(arena_printf(&arena, "%s/moec stats %s 2>&1", b ? b : "build", args), "r");
    cr_assert(pipe);
    output[fread(output, 1, sizeof output - 1, pipe)] = 0;
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* The end of it: Criterion's own protocol hangs on messages over 4 KiB. */
static const char *said(void) {
    size_t len = strlen(output);
    return len > 1500 ? output + len - 1500 : output;
}

static void run_stats(const char *args) {
    cr_assert_eq(stats("%s", args), 0, "moec stats %s: %s", args, said());
}
#define STATS(...) run_stats(arena_printf(&arena, __VA_ARGS__))

/* A key of the JSON that show printed, dotted, with list positions as numbers. */
static double figure(const char *dotted) {
    char *rest = arena_strdup(&arena, dotted);
    struct node *n = yaml_parse(&arena, &diags, "output", output, strlen(output));
    cr_assert(n, "%s", said());
    for (char *part; (part = strsep(&rest, "."));) {
        struct node *next = NULL;
        if (n->kind == NODE_MAP)
            next = map_get(n, part);
        else if (n->kind == NODE_LIST && atoi(part) < n->count)
            next = n->items[atoi(part)];
        cr_assert(next, "no %s of %s in %s", part, dotted, said());
        n = next;
    }
    return strtod(n->text, NULL);
}

static void expect_figure(const char *dotted, double want) {
    double got = figure(dotted);
    cr_expect(got - want < 1e-12 * (1 + want) && want - got < 1e-12 * (1 + want),
              "%s: %.17g, not %.17g", dotted, got, want);
}

static void expect_same(const struct loads *a, const struct loads *b, const char *what) {
    cr_assert(a->num_layers == b->num_layers && a->experts == b->experts &&
                  a->num_workloads == b->num_workloads,
              "%s", what);
    for (int i = 0; i < a->num_layers; i++)
        cr_assert_eq(a->layers[i], b->layers[i], "%s", what);
    for (int w = 0; w < a->num_workloads; w++)
        for (int i = 0; i < a->num_layers * a->experts; i++)
            cr_assert_eq(a->workloads[w].count[i], b->workloads[w].count[i], "%s: %d", what, i);
}

Test(loads, every_form_converts_into_every_other_without_loss) {
    static const char model[] = "tests/golden/loads/shared/model.yaml";
    struct model *m = small_model();
    const char *csv = file("first.csv", "1,2,3,4\n5,0,7,999999999999\n9,10,11,123456789\n");
    struct loads *want = accept(csv, m);
    for (int from = 0; from < LOADS_FORMAT_COUNT; from++) {
        const char *a = arena_printf(&arena, "%s/from.%d", dir, from);
        STATS("convert %s --model %s --to %s -o %s", csv, model, loads_format_names[from], a);
        expect_same(want, accept(a, m), loads_format_names[from]);
        for (int to = 0; to < LOADS_FORMAT_COUNT; to++) {
            const char *b = arena_printf(&arena, "%s/%d.%d", dir, from, to);
            STATS("convert %s --model %s --to %s -o %s", a, model, loads_format_names[to], b);
            expect_same(want, accept(b, m),
                        arena_printf(&arena, "%s to %s", loads_format_names[from],
                                     loads_format_names[to]));
        }
    }
}

Test(loads, iterations_stay_apart_when_converted_so) {
    struct loads_options each = {.window = 1};
    const char *path = write_folder("stat", 4);
    struct loads *want = read_with(path, NULL, &each);
    cr_assert(want && want->num_workloads == ITERATIONS, "%s", printed());
    STATS("convert %s --every 1 --to trtllm -o %s/again", path, dir);
    expect_same(want, read_with(in_dir("again"), NULL, &each), "trtllm");
    STATS("convert %s --every 1 --to sglang --model tests/golden/loads/shared/model.yaml"
          " -o %s/again.json",
          path, dir);
    struct model *m = small_model();
    want = read_with(path, m, &each);
    expect_same(want, read_with(in_dir("again.json"), m, &each), "sglang");
    cr_expect_eq(stats("convert %s --every 1 --to csv -o %s/x.csv", path, dir), 1);
    cr_expect(strstr(output, "holds one workload, but there are 3"), "%s", said());
}

Test(loads, fractions_survive_and_are_rounded_only_for_trtllm) {
    const char *csv = file("f.csv", "0.1,1e-3,12345.678901234567,3\n");
    struct loads *want = accept(csv, NULL);
    STATS("convert %s --to json -o %s/f.json", csv, dir);
    expect_same(want, accept(in_dir("f.json"), NULL), "json");
    STATS("convert %s --to trtllm --top-k 2 -o %s/f", csv, dir);
    cr_expect(strstr(output, "warning:") && strstr(output, "counts were rounded"), "%s",
              said());
    EXPECT4(accept(in_dir("f"), NULL), 0, 0, 0, 0, 12346, 3);
    cr_expect_eq(stats("convert %s --to trtllm -o %s/g", csv, dir), 1);
    cr_expect(strstr(output, "give --top-k or --model"), "%s", said());
    cr_expect_eq(stats("convert %s --to trtllm --top-k 2 -o %s/f", csv, dir), 1);
    cr_expect(strstr(output, "is not empty"), "%s", said());
}

Test(loads, merge_adds_with_weights) {
    const char *a = file("a.csv", "1,2,3,4\n5,6,7,8\n"),
               *b = file("b.csv", "10,0,0,1\n0,0,2,0\n");
    STATS("merge %s %s -o %s/m.json", a, b, dir);
    struct loads *l = accept(in_dir("m.json"), NULL);
    EXPECT4(l, 0, 0, 11, 2, 3, 5);
    EXPECT4(l, 0, 1, 5, 6, 9, 8);
    STATS("merge %s %s -o %s/m.json --weights 2,0.5", a, b, dir);
    l = accept(in_dir("m.json"), NULL);
    EXPECT4(l, 0, 0, 7, 4, 6, 8.5);
    file("w.json", "{\"moec_loads\":1,\"layers\":[0,1],\"experts\":4,\"weight\":3,"
                   "\"counts\":[[1,1,1,1],[0,0,0,1]]}");
    STATS("merge %s %s/w.json -o %s/m.json", a, dir, dir);
    l = accept(in_dir("m.json"), NULL);
    EXPECT4(l, 0, 0, 4, 5, 6, 7);
    EXPECT4(l, 0, 1, 5, 6, 7, 11);
    cr_expect_eq(stats("merge %s %s -o %s/m.json --weights 1", a, b, dir), 2);
    cr_expect(strstr(output, "--weights: 1 numbers for 2 inputs"), "%s", said());
}

/* 2 ranks: loads 10 and 26, then 3 and 7. */
static const char two_layers[] = "1,9,20,6\n0,3,3,4\n";

Test(loads, show_judges_ranks) {
    const char *path = file("a.csv", two_layers);
    STATS("show %s --ep 2 --json --per-expert", path);
    expect_figure("ranks", 2);
    expect_figure("slots_per_rank", 2);
    expect_figure("inputs.0.counts", 46);
    expect_figure("inputs.0.layers.0.mean", 18);
    expect_figure("inputs.0.layers.0.std", 8);
    expect_figure("inputs.0.layers.0.max_over_mean", 26. / 18);
    expect_figure("inputs.0.layers.0.imbalance", 26. / 18 - 1);
    expect_figure("inputs.0.layers.0.rank_loads.1", 26);
    expect_figure("inputs.0.layers.0.slots.max_over_mean", 20 / 9.);
    expect_figure("inputs.0.layers.0.expert_loads.1", 9);
    expect_figure("inputs.0.layers.1.max_over_mean", 1.4);
    expect_figure("inputs.0.max_over_mean", (26. / 18 + 1.4) / 2);
    expect_figure("inputs.0.sum_of_max", 33. / 23);
    STATS("show %s --ep 2 --per-expert", path);
    cr_expect(strstr(output, "      0            18             8    1.4444     0.4444"
                             "         2.2222   2 2.22x, 1 1.00x, 3 0.67x, 0 0.11x\n"),
              "%s", said());
    cr_expect(strstr(output, "sum of the layers' max over sum of their mean: 1.4348\n"), "%s",
              said());
}

Test(loads, show_takes_every_expert_alone_without_ranks) {
    STATS("show %s --json", file("a.csv", two_layers));
    expect_figure("ranks", 4);
    expect_figure("inputs.0.layers.0.max_over_mean", 20 / 9.);
}

Test(loads, experts_that_do_not_divide_leave_the_last_rank_short) {
    STATS("show %s --ep 2 --json", file("a.csv", "1,2,3,4,5\n"));
    expect_figure("slots_per_rank", 3);
    expect_figure("inputs.0.layers.0.rank_loads.0", 6);
    expect_figure("inputs.0.layers.0.rank_loads.1", 9);
}

Test(loads, show_projects_on_a_load_balancer_file) {
    const char *path = file("a.csv", two_layers);
    const char *slots = file("b.yaml", "num_slots: 6\nlayer_updates_per_iter: 0\n"
                                       "initial_global_assignments:\n"
                                       "  0: [2, 0, 1, 2, 1, 3]\n  1: [0, 1, 2, 3, 3, 3]\n");
    STATS("show %s --ep 2 --placement %s --json", path, slots);
    /* Layer 0: 10 + 1 + 4.5, 10 + 4.5 + 6; layer 1: 0 + 3 + 3, 4/3 * 3. */
    expect_figure("inputs.0.layers.0.rank_loads.0", 15.5);
    expect_figure("inputs.0.layers.0.rank_loads.1", 20.5);
    expect_figure("inputs.0.layers.1.rank_loads.1", 4);
    expect_figure("inputs.0.layers.1.max_over_mean", 6. / 5);
    cr_expect_eq(stats("show %s --placement %s", path, slots), 1);
    cr_expect(strstr(output, "6 slots, but on how many ranks is not said: give --ep"), "%s",
              said());
    cr_expect_eq(stats("show %s --ep 4 --placement %s", path, slots), 1);
    cr_expect(strstr(output, "6 slots are not divisible by 4 ranks"), "%s", said());
}

Test(loads, show_projects_on_the_json_of_a_plan) {
    const char *plan = file("p.json", "{\"model\":\"m\",\"ranks\":2,\"slots_per_rank\":3,"
                                      "\"layers\":[{\"layer\":0,\"expert_of_slot\":"
                                      "[2,0,1,3,-1,2],\"imbalance\":1}]}");
    STATS("show %s --placement %s --json", file("a.csv", "1,9,20,6\n"), plan);
    expect_figure("inputs.0.layers.0.rank_loads.0", 20);
    expect_figure("inputs.0.layers.0.rank_loads.1", 16);
    cr_expect_eq(stats("show %s --placement %s", file("b.csv", two_layers), plan), 1);
    cr_expect(strstr(output, "p.json:1:1: error: layer 1 is recorded, but not placed"), "%s",
              said());
}

static void refuse_placement(const char *text, const char *words) {
    const char *path = file("bad.yaml", text);
    cr_expect_eq(stats("show %s --ep 2 --placement %s", file("a.csv", "1,9,20,6\n"), path), 1);
    cr_expect(strstr(output, words), "expected '%s': %s", words, said());
}

Test(loads, a_placement_that_cannot_be_is_refused) {
    refuse_placement("num_slots: 4\n", "bad.yaml:1:1: error: no 'initial_global_assignments'");
    refuse_placement("num_slots: 4\ninitial_global_assignments: {0: [0, 1, 2]}\n",
                     "bad.yaml:2:33: error: layer 0: 3 slots are listed, but there are 4");
    refuse_placement("num_slots: 4\ninitial_global_assignments: {0: [0, 1, 2, 2]}\n",
                     "layer 0: expert 3 is in no slot");
    refuse_placement("num_slots: 4\ninitial_global_assignments: {0: [0, 1, 2, 4]}\n",
                     "layer 0, slot 3: expert 4 out of 0..3");
    refuse_placement("num_slots: 4\ninitial_global_assignments: {0: [0, 1, 2, -1]}\n",
                     "layer 0, slot 3 must be between 0 and 1023, but is -1");
    refuse_placement(
        "num_slots: 4\nep_size: 4\ninitial_global_assignments: {0: [0, 1, 2, 3]}\n",
        "placed on 4 ranks, not on the 2 of --ep");
    refuse_placement("num_slot: 4\n", "no 'num_slots'");
}

Test(loads, figures_of_iterations_are_averaged_as_upstream_does) {
    const char *path = write_folder("stat", 4);
    STATS("show %s --every 1 --json", path);
    expect_figure("ranks", RANKS);
    expect_figure("inputs.0.windows", ITERATIONS);
    double ratio = 0;
    for (int i = 0; i < ITERATIONS; i++) {
        double load[2] = {0}; /* experts 0, 1 and 2, 3 */
        for (int r = 0; r < RANKS; r++)
            for (int e = 0; e < 4; e++)
                load[e / 2] += (double)recorded(r, i, 1, e);
        ratio += 2 * load[1] / (load[0] + load[1]) / ITERATIONS;
    }
    expect_figure("inputs.0.layers.0.max_over_mean", ratio);
}

Test(loads, recorded_slots_are_mapped_back_by_the_balancers_file) {
    const char *path = write_folder("stat", 6);
    const char *slots = file("b.yaml", "num_slots: 6\ninitial_global_assignments:\n"
                                       "  1: [0, 1, 2, 3, 0, 1]\n  2: [3, 3, 3, 2, 1, 0]\n"
                                       "  3: [0, 1, 2, 3, 3, 0]\n");
    STATS("convert %s --recorded-with %s --to json -o %s/m.json", path, slots, dir);
    struct loads *l = accept(in_dir("m.json"), NULL);
    cr_expect_eq(l->experts, 4);
    double sum = 0, want = 0;
    for (int e = 0; e < 4; e++)
        sum += l->workloads[0].count[e];
    for (int r = 0; r < RANKS; r++)
        for (int i = 0; i < ITERATIONS; i++)
            for (int s = 0; s < 6; s++)
                want += (double)recorded(r, i, 1, s);
    cr_expect_eq(sum, want);
    file("b.yaml", "num_slots: 6\nlayer_updates_per_iter: 2\ninitial_global_assignments:\n"
                   "  1: [0, 1, 2, 3, 0, 1]\n");
    cr_expect_eq(stats("show %s --recorded-with %s", path, slots), 1);
    cr_expect(strstr(output, "slots changed their experts while recording"), "%s", said());
}

/* Tokens of one layer choose {0, 1}, {0, 1}, {1, 2}, {3, padding}. */
static void write_raw(const char *folder, const char *type, int wide) {
    static const int ids[8] = {0, 1, 1, 0, 1, 2, 3, 4};
    char data[64] = {0};
    for (int i = 0; i < 8; i++)
        data[i * wide] = (char)ids[i];
    const char *header = arena_printf(&arena,
                                      "{\"7_1\":{\"dtype\":\"%s\",\"shape\":[4,2],"
                                      "\"data_offsets\":[0,%d]}}",
                                      type, 8 * wide);
    for (int rank = 0; rank < 2; rank++)
        write_safetensors(arena_printf(&arena, "%s/rank%d_raw.safetensors", folder, rank),
                          header, data, (size_t)(8 * wide));
}

Test(loads, experts_chosen_together_are_counted_from_raw_ids) {
    const char *path = write_folder("stat", 4);
    static const char *const types[] = {"I32", "I64"};
    for (int i = 0; i < 2; i++) {
        write_raw(path, types[i], i ? 8 : 4);
        STATS("show %s --cooccurrence --pairs 2", path);
        cr_expect(strstr(output, "2 ids name no expert"), "%s", said());
        cr_expect(strstr(output, "0+1             4 tokens  50.00%  1.33 times chance\n"), "%s",
                  said());
        STATS("show %s --cooccurrence --json 2>/dev/null;:", path);
    }
    expect_figure("inputs.0.layers.0.tokens", 8);
    expect_figure("inputs.0.layers.0.pairs.0.a", 0);
    expect_figure("inputs.0.layers.0.pairs.0.b", 1);
    expect_figure("inputs.0.layers.0.pairs.0.lift", 4 * 8. / (4 * 6));
    expect_figure("inputs.0.layers.0.pairs.1.tokens", 2);
    write_raw(path, "I16", 2);
    cr_expect_eq(stats("show %s --cooccurrence", path), 1);
    cr_expect(strstr(output, "has type I16; ids are I32 or I64"), "%s", said());
    unlink(in_dir("stat/rank0_raw.safetensors"));
    cr_expect_eq(stats("show %s --cooccurrence", path), 1);
    cr_expect(strstr(output, "rank0_raw.safetensors is missing"), "%s", said());
    cr_expect_eq(stats("show %s --cooccurrence", file("a.csv", two_layers)), 1);
    cr_expect(strstr(output, "is no folder of a TensorRT-LLM recording"), "%s", said());
}

Test(loads, options_of_another_verb_are_wrong_usage) {
    static const char *const wrong[] = {"",
                                        "dance",
                                        "show",
                                        "show a.csv --seed 1",
                                        "merge a.csv",
                                        "convert a.csv b.csv --to csv -o x",
                                        "convert a.csv -o x",
                                        "convert a.csv --to xml -o x",
                                        "synth",
                                        "synth -o x",
                                        "synth -o x --experts 8",
                                        "synth -o x --experts 8 --layers 2 --kind pareto",
                                        "synth a.csv -o x --experts 8 --layers 2",
                                        "synth -o x --experts 2000 --layers 2",
                                        "show a.csv --ep 0"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(stats("%s ", wrong[i]), 2, "moec stats %s: %s", wrong[i], said());
}

/* ---- synth ---- */

enum { S_EXPERTS = 256, S_LAYERS = 6, S_WINDOWS = 8, S_SIZE = S_LAYERS * S_EXPERTS };

static double *made(enum synth_kind kind, uint64_t seed, long long tokens, double skew) {
    struct synth s = {kind, skew, S_EXPERTS, 8, S_LAYERS, tokens, seed};
    double *count = arena_array(&arena, double, S_WINDOWS *S_SIZE);
    synth_run(&s, S_WINDOWS, count);
    return count;
}

static double max_over_mean(const double *count) {
    double max = 0, sum = 0;
    for (int e = 0; e < S_EXPERTS; e++) {
        max = count[e] > max ? count[e] : max;
        sum += count[e];
    }
    return max / sum * S_EXPERTS;
}

/* Cosine of two rows about their mean. */
static double correlation(const double *a, const double *b) {
    double ma = 0, mb = 0, ab = 0, aa = 0, bb = 0;
    for (int e = 0; e < S_EXPERTS; e++) {
        ma += a[e] / S_EXPERTS;
        mb += b[e] / S_EXPERTS;
    }
    for (int e = 0; e < S_EXPERTS; e++) {
        ab += (a[e] - ma) * (b[e] - mb);
        aa += (a[e] - ma) * (a[e] - ma);
        bb += (b[e] - mb) * (b[e] - mb);
    }
    return ab * ab / (aa * bb) * (ab < 0 ? -1 : 1);
}

Test(loads, made_up_loads_are_the_same_on_every_machine) {
    static const char *const hashes[SYNTH_KIND_COUNT] = {
        "540d8080f410390f", "bbd8870364bfac8d", "b9f67efe6b55e89e", "02a1341c98e671f3"};
    char hash[65];
    for (int kind = 0; kind < SYNTH_KIND_COUNT; kind++) {
        double *count = made((enum synth_kind)kind, 1, 1 << 20, -1);
        int32_t *whole = arena_array(&arena, int32_t, S_WINDOWS * S_SIZE);
        for (int i = 0; i < S_WINDOWS * S_SIZE; i++) {
            whole[i] = (int32_t)count[i];
            cr_assert_eq(whole[i], count[i]);
        }
        hash_hex(whole, sizeof *whole * S_WINDOWS * S_SIZE, hash);
        hash[16] = 0;
        cr_expect_str_eq(hash, hashes[kind], "%s: %s", synth_kind_names[kind], hash);
    }
}

Test(loads, made_up_layers_have_one_sum_and_no_expert_has_a_token_twice) {
    static const struct {
        long long tokens;
        double skew;
    } cases[] = {{1 << 20, -1}, {100, -1}, {1, -1}, {5000, 0}, {5000, 3}, {2000000000, 8}};
    for (int kind = 0; kind < SYNTH_KIND_COUNT; kind++)
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            double *count = made((enum synth_kind)kind, 7, cases[c].tokens, cases[c].skew);
            for (int row = 0; row < S_WINDOWS * S_LAYERS; row++) {
                double sum = 0;
                for (int e = 0; e < S_EXPERTS; e++) {
                    double v = count[row * S_EXPERTS + e];
                    cr_assert(v >= 0 && v <= (double)cases[c].tokens, "%s: %g of %lld",
                              synth_kind_names[kind], v, cases[c].tokens);
                    sum += v;
                }
                cr_assert_eq(sum, 8.0 * (double)cases[c].tokens);
            }
        }
}

Test(loads, made_up_loads_are_as_uneven_as_recorded_ones) {
    static const struct {
        enum synth_kind kind;
        double least, most;
    } cases[] = {{SYNTH_zipf, 7, 10},
                 {SYNTH_lognormal, 3, 10},
                 {SYNTH_drift, 3, 10},
                 {SYNTH_mixture, 2, 8}};
    for (int c = 0; c < 4; c++) {
        double *count = made(cases[c].kind, 3, 1 << 20, -1), mean = 0;
        for (int row = 0; row < S_LAYERS; row++)
            mean += max_over_mean(count + row * S_EXPERTS) / S_LAYERS;
        cr_expect(mean > cases[c].least && mean < cases[c].most, "%s: max/mean %.2f",
                  synth_kind_names[cases[c].kind], mean);
        cr_expect_lt(correlation(count, count + S_EXPERTS), 0.1); /* another layer */
    }
    cr_expect_gt(max_over_mean(made(SYNTH_lognormal, 3, 1 << 20, 1.5)),
                 max_over_mean(made(SYNTH_lognormal, 3, 1 << 20, 0.3)));
    cr_expect_lt(max_over_mean(made(SYNTH_zipf, 3, 1 << 20, 0)), 1.05);
}

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

Test(loads, zipf_loads_follow_its_law) {
    double *count = made(SYNTH_zipf, 1, 2000000000, 0.5);
    qsort(count, S_EXPERTS, sizeof *count, descending);
    for (int i = 1; i < S_EXPERTS; i++) { /* (i + 1)^-1/2 */
        double square = count[i] / count[0] * (count[i] / count[0]) * (i + 1);
        cr_expect(square > 0.999 && square < 1.001, "expert %d: %.6f", i, square);
    }
}

Test(loads, made_up_windows_change_as_their_kind_says) {
    double *still = made(SYNTH_lognormal, 5, 1 << 20, -1);
    double *drift = made(SYNTH_drift, 5, 1 << 20, -1),
           *mix = made(SYNTH_mixture, 5, 1 << 20, -1);
    int last = (S_WINDOWS - 1) * S_SIZE;
    cr_expect_gt(correlation(still, still + last), 0.99);
    cr_expect_gt(correlation(drift, drift + S_SIZE), 0.5);
    cr_expect_lt(correlation(drift, drift + last), correlation(drift, drift + S_SIZE));
    double least = 1;
    for (int w = 1; w < S_WINDOWS; w++) {
        double c = correlation(mix, mix + w * S_SIZE);
        least = c < least ? c : least;
    }
    cr_expect_lt(least, 0.5);
    double *other = made(SYNTH_lognormal, 6, 1 << 20, -1);
    cr_expect_lt(correlation(still, other), 0.1);
}

Test(loads, synth_writes_files_that_read_back) {
    STATS("synth --experts 16 --layers 3 --top-k 2 --tokens 1000 -o %s/one.json", dir);
    struct loads *l = accept(in_dir("one.json"), NULL);
    cr_expect(l->num_layers == 3 && l->experts == 16 && l->experts_per_token == 2);
    STATS("synth --model tests/golden/loads/shared/model.yaml --kind drift --windows 3 --seed 9"
          " -o %s/many",
          dir);
    struct model *m = small_model();
    const char *paths[3];
    for (int i = 0; i < 3; i++)
        paths[i] = arena_printf(&arena, "%s/many/window-%03d.json", dir, i);
    struct loads_options o = {0};
    l = loads_read(&arena, &diags, paths, NULL, 3, m, &o);
    cr_assert(l && l->num_workloads == 3, "%s", printed());
    cr_expect_null(diags.first, "%s", printed());
    cr_expect_eq(stats("synth --experts 4 --layers 1 --top-k 5 -o %s/x", dir), 1);
    cr_expect(strstr(output, "--top-k: 5 of 4 experts"), "%s", said());
}

/* ---- real recordings ---- */

Test(loads, recordings_of_deepseek_v3_are_read_for_its_model) {
    glob_t g;
    if (glob("../shared/data/loads/deepseek-v3/*.csv", 0, NULL, &g))
        cr_skip_test("no recordings in ../shared/data/loads");
    struct model *m = model_read(&arena, &diags, "plans/models/deepseek-v3.yaml");
    struct loads_options o = {0};
    cr_assert(m, "%s", printed());
    forget();
    struct loads *l = loads_read(&arena, &diags, (const char *const *)g.gl_pathv, NULL,
                                 (int)g.gl_pathc, m, &o);
    cr_assert(l, "%s", printed());
    cr_expect_eq(l->num_workloads, (int)g.gl_pathc);
    cr_expect_eq(l->workloads[0].count[(size_t)loads_layer(l, 3) * 256], 807392);
    globfree(&g);
}

Test(loads, a_path_that_cannot_be_read_is_named_where_it_stands) {
    struct node *n = yaml_parse(&arena, &diags, "d.yaml", "loads: [nope.csv]\n", 18);
    struct loads_options o = {0};
    const char *path = "nope.csv";
    cr_assert(n && n->count == 1);
    cr_expect_null(loads_read(&arena, &diags, &path, &n->items[0]->items[0]->loc, 1, NULL, &o));
    cr_expect(strstr(printed(), "d.yaml:1:9: error: cannot read nope.csv: No such file"), "%s",
              printed());
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
