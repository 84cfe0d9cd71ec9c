/* What the compiler reads: text, files, diagnostics, YAML and JSON, clusters, deployments.
 *
 * tests/golden/err holds malformed inputs, each beside the exact text that must reach stderr
 * (X.yaml or X.json, X.err). A first line "# args: ..." is a command line. MOEC_GOLDEN=1 rewrites
 * the .err files. */
#include "../compiler/moec.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <glob.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
}

static void tear_down(void) {
    arena_free(&arena);
}

TestSuite(front, .init = set_up, .fini = tear_down);
TestSuite(golden, .init = set_up, .fini = tear_down, .timeout = 300);

/* ---- helpers ---- */

/* What diag_print writes. */
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

static struct node *parse(const char *text) {
    forget();
    return yaml_parse(&arena, &diags, "t.yaml", text, strlen(text));
}

static struct node *accept(const char *text) {
    struct node *n = parse(text);
    cr_assert(n && !diags.first, "refused: %s\n%s", text, printed());
    return n;
}

static void expect_at(const struct node *n, int line, int col) {
    cr_expect(n->loc.line == line && n->loc.col == col, "%s: %d:%d, not %d:%d", n->text,
              n->loc.line, n->loc.col, line, col);
}

/* A command line as cmd_build would understand it; only what golden inputs need. */
static struct overrides parse_args(const char *line) {
    struct overrides o = {.set = arena_array(&arena, const char *, 16)};
    char *rest = arena_strdup(&arena, line);
    for (char *word; (word = strsep(&rest, " "));) {
        char *value = strsep(&rest, " ");
        cr_assert(value, "args: %s needs a value", word);
        if (!strcmp(word, "--model"))
            o.model = value;
        else if (!strcmp(word, "--target"))
            o.targets = value;
        else if (!strcmp(word, "--policy"))
            o.policy = value;
        else if (!strcmp(word, "--ep"))
            o.ep = atoi(value);
        else if (!strcmp(word, "--start"))
            o.start = value;
        else if (!strcmp(word, "--moves"))
            o.improve = true, o.moves = atoi(value);
        else if (!strcmp(word, "--set"))
            o.set[o.num_set++] = value;
        else
            cr_assert(false, "args: unknown %s", word);
    }
    return o;
}

static struct overrides overrides_of(const char *path) {
    static const char mark[] = "# args: ";
    char *text;
    size_t len;
    cr_assert_eq(file_read(&arena, path, 1 << 20, &text, &len), 0, "%s", path);
    if (strncmp(text, mark, sizeof mark - 1))
        return (struct overrides){0};
    text[strcspn(text, "\n")] = 0;
    return parse_args(text + sizeof mark - 1);
}

static struct deployment *read_with(const char *path, const char *args) {
    struct overrides o = *args ? parse_args(args) : (struct overrides){0};
    forget();
    return deployment_read(&arena, &diags, path, &o);
}

/* Reads a file that must be fine; diagnostics may hold warnings and notes. */
static struct deployment *deploy(const char *path, const char *args) {
    struct deployment *dep = read_with(path, args);
    cr_assert(dep && !diags.errors, "%s %s:\n%s", path, args, printed());
    return dep;
}

/* A file in a folder of its own that sees the golden inputs' shared files. */
static const char *scratch(const char *text) {
    static char dir[] = "/tmp/moec-front-XXXXXX";
    static bool made;
    if (!made) {
        char target[PATH_MAX], link[sizeof dir + 8];
        cr_assert(mkdtemp(dir) && realpath("tests/golden/err/shared", target));
        snprintf(link, sizeof link, "%s/shared", dir);
        cr_assert_eq(symlink(target, link), 0);
        made = true;
    }
    const char *path = arena_printf(&arena, "%s/x.yaml", dir);
    if (!text) {
        cr_assert_eq(dir_remove(dir), 0);
        return NULL;
    }
    FILE *f = fopen(path, "w");
    cr_assert(f && fputs(text, f) >= 0 && !fclose(f));
    return path;
}

static struct deployment *deploy_text(const char *text) {
    return deploy(scratch(text), "");
}

/* ---- util ---- */

Test(front, arena_memory_is_zeroed_aligned_and_apart) {
    char *last = NULL;
    for (size_t n = 0; n < 3000; n += 7) {
        char *p = arena_alloc(&arena, n);
        cr_assert(p != last && (uintptr_t)p % 16 == 0);
        for (size_t i = 0; i < n; i++)
            cr_assert_eq(p[i], 0);
        memset(p, 0xff, n);
        last = p;
    }
    char *large = arena_alloc(&arena, 1 << 20);
    cr_assert(large[0] == 0 && large[(1 << 20) - 1] == 0);
}

Test(front, text_grows_and_json_is_escaped) {
    struct buf b = {.arena = &arena};
    for (int i = 0; i < 1000; i++)
        buf_printf(&b, "%03d,", i);
    cr_expect_eq(b.len, 4000);
    cr_expect(!strncmp(b.data + 3996, "999,", 5));
    b = (struct buf){.arena = &arena};
    buf_printf(&b, "%600d|", 7);
    cr_expect_eq(b.len, 601);
    b = (struct buf){.arena = &arena};
    buf_json_string(&b, "a\"b\\c\n\t\x01é");
    cr_expect_str_eq(b.data, "\"a\\\"b\\\\c\\n\\t\\u0001é\"");
}

Test(front, files_are_replaced_whole_and_limits_hold) {
    char dir[] = "/tmp/moec-files-XXXXXX", *text;
    size_t len;
    cr_assert(mkdtemp(dir));
    const char *deep = path_join(&arena, dir, "a/b"), *file = path_join(&arena, deep, "f");
    cr_expect_eq(dir_make(deep), 0);
    cr_expect_eq(dir_make(deep), 0);
    cr_expect_eq(file_write(file, "one", 3), 0);
    cr_expect_eq(file_write(file, "second", 6), 0);
    cr_expect_eq(file_read(&arena, file, 6, &text, &len), 0);
    cr_expect(len == 6 && !strcmp(text, "second"));
    cr_expect_eq(file_read(&arena, file, 5, &text, &len), EFBIG);
    cr_expect_eq(file_read(&arena, dir, 5, &text, &len), EISDIR);
    cr_expect_eq(file_read(&arena, path_join(&arena, dir, "no"), 5, &text, &len), ENOENT);
    cr_expect_eq(dir_make(path_join(&arena, file, "x")), ENOTDIR);
    cr_expect_eq(file_write(path_join(&arena, file, "x"), "y", 1), ENOTDIR);
    cr_expect_eq(file_write(deep, "y", 1),
                 EISDIR); /* rename fails: the temporary file must go */
    glob_t left;
    cr_expect_eq(glob(arena_printf(&arena, "%s/a/*.tmp", dir), 0, NULL, &left), GLOB_NOMATCH);
    cr_expect_eq(dir_remove(dir), 0);
    cr_expect_eq(dir_remove(dir), ENOENT);
}

Test(front, paths_hashes_and_near_words) {
    static const char *const names[] = {"num_slots", "backend", "WIDEEP", "max_num_tokens"};
    char hex[65];
    cr_expect_str_eq(path_join(&arena, "a/b", "c"), "a/b/c");
    cr_expect_str_eq(path_join(&arena, "/", "c"), "/c");
    cr_expect_str_eq(path_join(&arena, ".", "c"), "c");
    cr_expect_str_eq(path_join(&arena, "a", "/c"), "/c");
    cr_expect_str_eq(path_dir(&arena, "a/b/c"), "a/b");
    cr_expect_str_eq(path_dir(&arena, "c"), ".");
    cr_expect_str_eq(path_dir(&arena, "/c"), "/");
    hash_hex("abc", 3, hex); /* RFC 7693's input, 256 bits */
    cr_expect_str_eq(hex, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
    cr_expect_str_eq(nearest("num_slot", names, 4), "num_slots");
    cr_expect_str_eq(nearest("bakcend", names, 4), "backend");
    cr_expect_str_eq(nearest("wideep", names, 4), "WIDEEP");
    static const char *const targets[] = {"sm_80", "sm_90a"};
    cr_expect_str_eq(nearest("sm_90", targets, 2), "sm_90a");
    cr_expect_null(nearest("slots", names, 4));
    static const char *const policy[] = {"balanced"};
    cr_expect_str_eq(nearest("belancd", policy, 1), "balanced", "two of seven");
    cr_expect_null(nearest("belencd", policy, 1));
    cr_expect_null(nearest("", names, 4));
}

/* ---- diagnostics ---- */

Test(front, caret_stands_under_the_byte_that_is_meant) {
    static const char text[] = "a: 1\n\té: \x1b[1mx\xff\r\nlast";
    struct source s = {"dir/t.yaml", text, sizeof text - 1};
    diag_error(&diags, ((struct loc){&s, 2, 4}), "%s", "colon\nhere");
    diag_add(&diags, DIAG_NOTE, (struct loc){&s, 1, 1}, "first");
    diag_add(&diags, DIAG_WARNING, (struct loc){&s, 3, 99}, "past the end");
    diag_error(&diags, (struct loc){0}, "nowhere");
    cr_expect_str_eq(printed(), "dir/t.yaml:2:4: error: colon?here\n"
                                "     2 | \té: ?[1mx?\n"
                                "       | \t ^\n"
                                "dir/t.yaml:1:1: note: first\n"
                                "     1 | a: 1\n"
                                "       | ^\n"
                                "dir/t.yaml:3:99: warning: past the end\n"
                                "     3 | last\n"
                                "       |     ^\n"
                                "moec: error: nowhere\n");
    cr_expect_eq(diags.errors, 2);
}

Test(front, long_lines_are_cut_around_the_caret) {
    char text[1000];
    memset(text, 'x', sizeof text);
    text[499] = '!';
    struct source s = {"t.json", text, sizeof text};
    diag_error(&diags, ((struct loc){&s, 1, 500}), "far");
    const char *out = printed(), *line = strchr(out, '\n') + 1, *caret = strchr(line, '\n') + 1;
    cr_expect_lt(strlen(line), 260);
    cr_expect_eq(strchr(line, '!') - line, strchr(caret, '^') - caret);
}

Test(front, errors_stop_at_a_hundred_and_say_so) {
    for (int i = 0; i < 150; i++) {
        diag_error(&diags, (struct loc){0}, "e%d", i);
        diag_add(&diags, DIAG_NOTE, (struct loc){0}, "n%d", i);
    }
    const char *out = printed();
    cr_expect(strstr(out, "e99\n") && strstr(out, "n99\n") && strstr(out, "too many errors"));
    cr_expect(!strstr(out, "e100\n") && !strstr(out, "n100\n"));
    cr_expect_eq(diags.errors, 150);
}

/* ---- YAML and JSON ---- */

Test(front, every_node_knows_its_place) {
    struct node *n = accept("a: 1\nb:\n  - x\n  - \"é\\t\": y\n    z:\nc: |\n  text\n");
    expect_at(n, 1, 1);
    expect_at(n->keys[1], 2, 1);
    expect_at(n->items[1], 3, 3);
    expect_at(n->items[1]->items[0], 3, 5);
    struct node *inner = n->items[1]->items[1];
    expect_at(inner->keys[0], 4, 5);
    expect_at(inner->items[0], 4, 13); /* a column counts bytes */
    expect_at(inner->keys[1], 5, 5);
    cr_expect(node_is_null(inner->items[1]) && inner->keys[0]->quoted);
    cr_expect(n->items[2]->quoted && !strcmp(n->items[2]->text, "text\n"));
}

Test(front, json_surrogates_are_read_and_places_hold_behind_them) {
    struct node *n = accept("{\"\\ud83d\\ude00\": [\"a\\uD83D\\uDE00\", \"\\\\ud83d\"],\n"
                            " \"x\\u00e9\": \"\\\"\\ud83d\\ude01\", \"y\": 1}");
    cr_expect_str_eq(n->keys[0]->text, "\U0001f600");
    cr_expect_str_eq(n->items[0]->items[0]->text, "a\U0001f600");
    cr_expect_str_eq(n->items[0]->items[1]->text, "\\ud83d");
    cr_expect_str_eq(n->items[1]->text, "\"\U0001f601");
    expect_at(n->items[0]->items[1], 1, 36);
    expect_at(n->keys[1], 2, 2);
    expect_at(n->keys[2], 2, 31);
    n = accept("\xef\xbb\xbf{\"a\": \"\\ud83d\\ude00\"}");
    cr_expect_str_eq(n->items[0]->text, "\U0001f600");
}

Test(front, text_need_not_end_in_nul) {
    char *text =
        malloc(7); /* the end of the block is the end of the text: seen by sanitizers */
    memcpy(text, "{\"a\":1}", 7);
    struct node *n = yaml_parse(&arena, &diags, "t", text, 7);
    cr_expect(n && n->count == 1);
    cr_expect_null(yaml_parse(&arena, &diags, "t", text, 6));
    free(text);
}

Test(front, limits_hold) {
    struct buf deep = {.arena = &arena}, wide = {.arena = &arena}, fat = {.arena = &arena};
    for (int i = 0; i < 64; i++)
        buf_add(&deep, "[", 1);
    for (int i = 0; i < 64; i++)
        buf_add(&deep, "]", 1);
    cr_expect(parse(deep.data));
    cr_expect_null(parse(arena_printf(&arena, "[%s]", deep.data)));
    char *megabyte = arena_alloc(&arena, (1 << 20) + 1);
    memset(megabyte, 'x', 1 << 20);
    cr_expect(parse(megabyte));
    buf_printf(&fat, "- a\n- %sx\n", megabyte);
    cr_expect_null(parse(fat.data));
    cr_expect(strstr(printed(), "t.yaml:2:3: error: a value of 1048577 bytes"));
    buf_add(&wide, "[", 1);
    for (int i = 0; i < (4 << 20); i++)
        buf_add(&wide, "1,", 2);
    buf_add(&wide, "]", 1);
    cr_expect_null(parse(wide.data));
    cr_expect(strstr(printed(), "more than 4194304 values"));
    char *huge = calloc(1, (64 << 20) + 1);
    cr_expect_null(yaml_parse(&arena, &diags, "huge", huge, (64 << 20) + 1));
    cr_expect(strstr(printed(), "huge:1:1: error: the file is larger than 64 MiB"));
    free(huge);
}

Test(front, many_duplicate_keys_are_found_in_order) {
    struct buf b = {.arena = &arena};
    for (int i = 0; i < 20000; i++)
        buf_printf(&b, "k%d: 0\n", i % 19990);
    cr_expect_null(parse(b.data));
    cr_expect_eq(diags.errors, 10);
    cr_expect(diags.first->loc.line == 19991 && diags.first->next->loc.line == 1);
}

static bool reads_int(const char *text, int *v) {
    struct node *n = accept(arena_printf(&arena, "v: %s", text));
    return node_int(&diags, n->items[0], "v", -5, 1LL << 40, v);
}

Test(front, whole_numbers_only) {
    static const char *const bad[] = {"1e3",
                                      "2.0",
                                      "\"5\"",
                                      "'5'",
                                      "0x10",
                                      "0o7",
                                      "010",
                                      "1_00",
                                      "2147483648",
                                      "-6",
                                      "",
                                      "~",
                                      "true",
                                      "[1]",
                                      "{}",
                                      "5 6",
                                      "- 5",
                                      "5-",
                                      "99999999999999999999",
                                      "+",
                                      "-"};
    int v;
    cr_expect(reads_int("0", &v) && v == 0);
    cr_expect(reads_int("-5", &v) && v == -5);
    cr_expect(reads_int("+7", &v) && v == 7);
    cr_expect(reads_int("2147483647", &v) && v == INT_MAX);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (parse(arena_printf(&arena, "v: %s", bad[i])))
            cr_expect(!reads_int(bad[i], &v) && diags.errors == 1, "'%s' was taken", bad[i]);
}

static bool reads_double(const char *text, double *v) {
    struct node *n = accept(arena_printf(&arena, "v: %s", text));
    return node_double(&diags, n->items[0], "v", -1e300, 1e300, v);
}

Test(front, finite_numbers_only) {
    static const char *const bad[] = {".inf",  "-.inf", ".nan", "nan", "inf", "1e400",
                                      "0x1p3", "\"1\"", "1,5",  ".",   "1e",  "e5",
                                      "",      "[1.0]", "1.5f", "--1", "1 2"};
    double v;
    cr_expect(reads_double("1e3", &v) && v == 1000);
    cr_expect(reads_double("-2.5E-1", &v) && v == -0.25);
    cr_expect(reads_double(".5", &v) && v == 0.5);
    cr_expect(reads_double("7", &v) && v == 7);
    cr_expect(reads_double("3.", &v) && v == 3);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_expect(!reads_double(bad[i], &v) && diags.errors == 1, "'%s' was taken", bad[i]);
}

Test(front, words_are_what_they_look_like) {
    static const char *const names[] = {"one", "two", "three"};
    struct node *n =
        accept("[true, FALSE, yes, 1, \"true\", null, \"null\", word, \"\", thre]");
    const char *s;
    bool b;
    int e;
    cr_expect(node_bool(&diags, n->items[0], "b", &b) && b);
    cr_expect(node_bool(&diags, n->items[1], "b", &b) && !b);
    for (int i = 2; i < 6; i++)
        cr_expect(!node_bool(&diags, n->items[i], "b", &b), "item %d", i);
    cr_expect(node_is_null(n->items[5]) && !node_is_null(n->items[6]));
    cr_expect(!node_string(&diags, n->items[5], "s", &s));
    cr_expect(node_string(&diags, n->items[6], "s", &s) && !strcmp(s, "null"));
    cr_expect(!node_string(&diags, n->items[8], "s", &s));
    cr_expect(!node_enum(&diags, n->items[9], "e", names, 3, &e));
    cr_expect(strstr(diags.last->text, "did you mean 'three'?"));
    cr_expect(node_kind_is(&diags, n, "l", NODE_LIST) &&
              !node_kind_is(&diags, n, "l", NODE_MAP));
}

Test(front, keys_never_read_are_errors) {
    static const char *const legal[] = {"alpha", "beta"};
    struct node *n = accept("{alpha: 1, bata: 2, gamma: 3}");
    cr_expect(map_get(n, "alpha") == n->items[0] && !map_get(n, "beta"));
    cr_expect(!map_unused(&diags, n, "it", legal, 2));
    cr_expect_eq(diags.errors, 2);
    cr_expect_str_eq(diags.first->text, "unknown key 'bata' in it; did you mean 'beta'?");
    cr_expect_str_eq(diags.last->text, "unknown key 'gamma' in it; it takes alpha or beta");
}

/* ---- clusters and deployments ---- */

Test(front, shipped_files_read_without_a_word) {
    glob_t g;
    cr_assert_eq(glob("plans/*.yaml", 0, NULL, &g), 0);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        deploy(g.gl_pathv[i], "");
        cr_expect_null(diags.first, "%s", printed());
    }
    globfree(&g);
    cr_assert_eq(glob("plans/clusters/*-*.yaml", 0, NULL, &g), 0);
    cr_expect_geq(g.gl_pathc, 8);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        struct deployment *dep =
            deploy("plans/tiny.yaml", arena_printf(&arena, "--set cluster=%s", g.gl_pathv[i]));
        cr_expect(dep->cluster->gpu && dep->cluster->sms && dep->cluster->nic_gbps > 0);
        cr_expect_null(diags.first, "%s", printed());
    }
    globfree(&g);
}

Test(front, only_a_model_is_required) {
    struct deployment *dep = deploy_text("model: shared/model.yaml\n");
    cr_expect_eq(dep->cluster->ranks, 1);
    cr_expect_null(dep->cluster->gpu);
    cr_expect_eq(dep->num_slots, 0);
    cr_expect_eq(dep->max_num_tokens, 8192);
    cr_expect_eq(dep->dispatch, DISPATCH_BALANCED);
    cr_expect_str_eq(dep->policy, "robust");
    cr_expect(dep->deterministic_combine);
    for (int i = 0; i < MOE_TARGET_COUNT; i++)
        cr_expect(dep->targets[i]);
    scratch(NULL);
}

/* Nodes of 8, or of the most ranks below that which divide them all. */
Test(front, nodes_divide_the_ranks) {
    static const int ranks[] = {1, 4, 8, 12, 13, 32, 36}, per_node[] = {1, 4, 8, 6, 1, 8, 6};
    for (int i = 0; i < 7; i++) {
        struct deployment *dep = deploy_text(
            arena_printf(&arena, "model: shared/model.yaml\ncluster: {ranks: %d}\n", ranks[i]));
        cr_assert(dep, "%s", printed());
        cr_expect_eq(dep->cluster->ranks_per_node, per_node[i], "%d ranks: nodes of %d",
                     ranks[i], dep->cluster->ranks_per_node);
        cr_expect_eq(dep->cluster->nvlink_domain, per_node[i]);
    }
    scratch(NULL);
}

Test(front, every_key_arrives) {
    struct deployment *dep = deploy_text(
        "model: shared/model.yaml\ncluster: {gpu: b200, ranks: 4, nic_gbps: 50, name: mine}\n"
        "target: host\nloads: []\npolicy: trtllm\ndispatch: share\nmoe_config:\n"
        "  backend: WIDEEP\n  max_num_tokens: 36\n  use_low_precision_moe_combine: false\n"
        "  disable_finalize_fusion: false\n  load_balancer: {num_slots: 12, ep_size: 4}\n");
    cr_expect_null(diags.first, "%s", printed());
    cr_expect_str_eq(dep->model->name, "small");
    cr_expect_str_eq(dep->cluster->name, "mine");
    cr_expect(dep->cluster->nic_gbps == 50 && dep->cluster->memory_tbps == 8);
    cr_expect_eq(dep->cluster->target, MOE_TARGET_SM_100A);
    cr_expect(dep->cluster->ranks_per_node == 4 && dep->cluster->nvlink_domain == 8);
    cr_expect(dep->targets[MOE_TARGET_HOST] && !dep->targets[MOE_TARGET_SM_100A]);
    cr_expect_str_eq(dep->policy, "trtllm");
    cr_expect_eq(dep->dispatch, DISPATCH_SHARE);
    cr_expect(dep->max_num_tokens == 36 && dep->num_slots == 12 && !dep->deterministic_combine);
    scratch(NULL);
}

Test(front, the_clusters_gpu_is_the_default_target) {
    struct deployment *dep = deploy_text("model: shared/model.yaml\ncluster: {gpu: l40s}\n");
    for (int i = 0; i < MOE_TARGET_COUNT; i++)
        cr_expect_eq(dep->targets[i], i == MOE_TARGET_SM_89);
    scratch(NULL);
}

Test(front, options_file_with_moe_config_alone) {
    struct deployment *dep = deploy(
        scratch("moe_config: {backend: CUTLASS, max_num_tokens: null, load_balancer: null}\n"),
        "--model plans/models/qwen3-30b.yaml --ep 8 --target host,sm_90a --policy even");
    cr_expect(dep->cluster->ranks == 8 && !dep->cluster->gpu && dep->max_num_tokens == 8192);
    cr_expect_str_eq(dep->model->name, "qwen3-30b");
    cr_expect_str_eq(dep->policy, "even");
    cr_expect(dep->targets[MOE_TARGET_HOST] && dep->targets[MOE_TARGET_SM_90A]);
    cr_expect(diags.first && diags.first->severity == DIAG_NOTE && !diags.first->next);
    scratch(NULL);
}

Test(front, model_files_and_configs_are_deployments) {
    struct deployment *dep =
        deploy("plans/models/qwen3-30b.yaml", "--ep 4 --set moe_config.max_num_tokens=64");
    cr_expect(dep->cluster->ranks == 4 && dep->max_num_tokens == 64);
    cr_expect_str_eq(dep->model->name, "qwen3-30b");
    dep = deploy("tests/configs/qwen3-30b.json", "");
    cr_expect_eq(dep->model->num_experts, 128);
}

Test(front, set_reaches_into_named_files) {
    struct deployment *dep =
        deploy(scratch("model: shared/model.yaml\ncluster: shared/cluster.yaml\n"
                       "moe_config: {load_balancer: shared/balancer.yaml}\n"),
               "--ep 2 --set moe_config.load_balancer.num_slots=16 --set cluster.memory_gb=9");
    cr_expect(dep->cluster->ranks == 2 && dep->num_slots == 16 && dep->cluster->memory_gb == 9);
    cr_expect_str_eq(dep->cluster->gpu, "h200");
    dep = deploy("plans/tiny.yaml", "--set cluster=plans/clusters/h200-8.yaml --ep 2");
    cr_expect(dep->cluster->gpu && dep->cluster->ranks == 2);
    scratch(NULL);
}

Test(front, a_table_beside_the_cluster_names_more_gpus) {
    char dir[] = "/tmp/moec-gpus-XXXXXX";
    cr_assert(mkdtemp(dir));
    static const char table[] = "x1: {target: sm_120a, sms: 3, memory_gb: 1}\n";
    cr_assert_eq(file_write(path_join(&arena, dir, "gpus.yaml"), table, sizeof table - 1), 0);
    cr_assert_eq(file_write(path_join(&arena, dir, "c.yaml"), "gpu: x1\n", 8), 0);
    struct deployment *dep =
        deploy("plans/tiny.yaml", arena_printf(&arena, "--set cluster=%s/c.yaml", dir));
    cr_expect(dep->cluster->sms == 3 && dep->cluster->target == MOE_TARGET_SM_120A);
    dep = deploy("plans/tiny.yaml",
                 arena_printf(&arena, "--set cluster=%s/c.yaml --set cluster.gpu=h200", dir));
    cr_expect_eq(dep->cluster->sms, 132);
    dir_remove(dir);
}

Test(front, assignments_arrive_in_layer_order) {
    struct deployment *dep = deploy_text(
        "model: shared/model.yaml\ncluster: {ranks: 2}\nmoe_config:\n  load_balancer:\n"
        "    num_slots: 10\n    initial_global_assignments:\n"
        "      3: [3, 1, 2, 0, 4, 5, 6, 7, 0, 1]\n      1: [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]\n"
        "      2: [7, 1, 2, 3, 4, 5, 6, 0, 0, 1]\n");
    cr_assert_eq(dep->num_assignments, 3);
    for (int i = 0; i < 3; i++)
        cr_expect_eq(dep->assignments[i].layer, i + 1);
    cr_expect_eq(dep->assignments[1].expert_of_slot[0], 7);
    cr_expect_eq(dep->assignments[2].expert_of_slot[9], 1);
    cr_expect(diags.first->severity == DIAG_NOTE &&
              strstr(diags.first->text, "policy places MTP layers: 4"));
    scratch(NULL);
}

Test(front, a_second_gpu_gives_the_memory_that_one_lacks) {
    struct overrides o = {.ep = 2};
    const char *set[] = {"cluster.gpu=l40s"};
    o.set = set;
    o.num_set = 1;
    forget();
    struct deployment *dep = deployment_read(&arena, &diags, "plans/models/qwen3-30b.yaml", &o);
    cr_assert(dep && plan_make(&arena, &diags, dep, 1), "%s", printed());
    cr_expect_null(diags.first);
}

/* ---- golden errors ---- */

static glob_t golden_inputs(void) {
    glob_t g;
    cr_assert_eq(glob("tests/golden/err/*.yaml", 0, NULL, &g), 0);
    cr_assert_eq(glob("tests/golden/err/*.json", GLOB_APPEND, NULL, &g), 0);
    return g;
}

/* Every error names a place, except those about the command line itself. */
static void check_places(const char *path) {
    for (const struct diag *g = diags.first; g; g = g->next)
        cr_expect(g->loc.source ? g->loc.line > 0 && g->loc.col > 0
                                : !strncmp(g->text, "--", 2) || strstr(g->text, "too many"),
                  "%s: no place: %s", path, g->text);
}

Test(golden, malformed_inputs_give_exactly_these_errors) {
    bool rewrite = getenv("MOEC_GOLDEN");
    glob_t g = golden_inputs();
    cr_expect_geq(g.gl_pathc, 60);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        const char *path = g.gl_pathv[i];
        struct overrides o = overrides_of(path);
        forget();
        struct deployment *dep = deployment_read(&arena, &diags, path, &o);
        cr_expect((!dep || !plan_make(&arena, &diags, dep, 1)) && diags.errors > 0,
                  "%s: accepted", path);
        check_places(path);
        const char *got = printed();
        const char *golden =
            arena_printf(&arena, "%.*s.err", (int)(strrchr(path, '.') - path), path);
        char *want = "";
        size_t len;
        if (rewrite)
            cr_assert_eq(file_write(golden, got, strlen(got)), 0);
        cr_expect_eq(file_read(&arena, golden, 1 << 20, &want, &len), 0, "%s", golden);
        cr_expect_str_eq(got, want, "%s:\n%s\nexpected:\n%s", path, got, want);
    }
    globfree(&g);
}

/* Runs moec build on a malformed input, its output in dir; moec plan when the arguments are only
 * its. Returns the exit code. */
static int build_golden(const char *path, const char *dir) {
    const char *b = getenv("B");
    char *text, *rest;
    size_t len;
    struct buf line = {.arena = &arena};
    cr_assert_eq(file_read(&arena, path, 1 << 20, &text, &len), 0);
    bool args = !strncmp(text, "# args: ", 8);
    if (args)
        text[strcspn(text, "\n")] = 0;
    bool plan = args && (strstr(text, "--start ") || strstr(text, "--moves "));
    buf_printf(&line, "%s/moec %s %s -o %s/bundle", b ? b : "build", plan ? "plan" : "build",
               path, dir);
    if (args) {
        rest = text + 8;
        for (char *word; (word = strsep(&rest, " "));)
            buf_printf(&line, " '%s'", word);
    }
    buf_printf(&line, " >%s.out 2>%s.err", dir, dir);
    int status = system(line.data);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

Test(golden, the_command_exits_with_1_and_writes_nothing) {
    char dir[] = "/tmp/moec-golden-XXXXXX", *got, *want;
    size_t len;
    glob_t g = golden_inputs(), written;
    if (getenv("MOEC_GOLDEN"))
        cr_skip_test("the expected texts are being rewritten");
    cr_assert(mkdtemp(dir));
    for (size_t i = 0; i < g.gl_pathc; i++) {
        const char *path = g.gl_pathv[i];
        cr_expect_eq(build_golden(path, dir), 1, "%s", path);
        cr_expect_eq(glob(arena_printf(&arena, "%s/*", dir), GLOB_PERIOD, NULL, &written), 0);
        cr_expect_eq(written.gl_pathc, 2, "%s left %s", path,
                     written.gl_pathv[2]); /* . and .. */
        globfree(&written);
        cr_assert_eq(
            file_read(&arena, arena_printf(&arena, "%s.out", dir), 1 << 20, &got, &len), 0);
        cr_expect_eq(len, 0, "%s: stdout: %s", path, got);
        cr_assert_eq(
            file_read(&arena, arena_printf(&arena, "%s.err", dir), 1 << 20, &got, &len), 0);
        path = arena_printf(&arena, "%.*s.err", (int)(strrchr(path, '.') - path), path);
        cr_assert_eq(file_read(&arena, path, 1 << 20, &want, &len), 0);
        cr_expect_str_eq(got, want, "%s:\n%s\nexpected:\n%s", path, got, want);
    }
    globfree(&g);
    cr_expect_eq(dir_remove(dir), 0);
    cr_expect(!unlink(arena_printf(&arena, "%s.out", dir)) &&
              !unlink(arena_printf(&arena, "%s.err", dir)));
}

/* ---- broken inputs ---- */

static uint32_t random_state = 12345;

static uint32_t random_below(uint32_t n) {
    random_state = random_state * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)random_state * n) >> 32);
}

/* Cuts, flips, swaps and doubles bytes. */
static size_t mutate(char *out, const char *text, size_t len) {
    static const char marks[] = "{}[]:,\"'-#&*!|>%@\\\t\n ~0\x80\xff";
    memcpy(out, text, len);
    for (uint32_t n = 1 + random_below(3); n && len > 1; n--) {
        uint32_t at = random_below((uint32_t)len), from = random_below((uint32_t)len);
        switch (random_below(5)) {
        case 0:
            len = at;
            break;
        case 1:
            out[at] ^= (char)(1 << random_below(8));
            break;
        case 2:
            out[at] = marks[random_below(sizeof marks - 1)];
            break;
        case 3:
            memmove(out + at, out + at + 1, --len - at);
            break;
        default:
            out[at] = out[from];
        }
    }
    return len;
}

static void read_mutant(const char *path, const char *text, size_t len) {
    struct overrides none = {0};
    FILE *f = fopen(path, "w");
    cr_assert(f && fwrite(text, 1, len, f) == len && !fclose(f));
    set_up();
    struct deployment *dep = deployment_read(&arena, &diags, path, &none);
    if (!dep != (diags.errors > 0))
        cr_expect(false, "%d errors, %s, for\n%.*s", diags.errors, dep ? "accepted" : "refused",
                  (int)len, text);
    for (const struct diag *g = diags.first; g; g = g->next)
        if (g->loc.source)
            cr_assert(g->loc.line > 0 && g->loc.col > 0);
    printed();
    arena_free(&arena);
}

Test(golden, mutants_of_every_input_end_in_a_plan_or_an_error) {
    enum { MUTANTS = 60 };
    struct arena outer = {0};
    const char *path = arena_strdup(&outer, scratch(""));
    arena_free(&arena);
    glob_t g = golden_inputs();
    cr_assert_eq(glob("plans/*.yaml", GLOB_APPEND, NULL, &g), 0);
    cr_assert_eq(glob("plans/models/*.yaml", GLOB_APPEND, NULL, &g), 0);
    cr_assert_eq(glob("tests/configs/*.json", GLOB_APPEND, NULL, &g), 0);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        char *text;
        size_t len;
        cr_assert_eq(file_read(&outer, g.gl_pathv[i], 1 << 20, &text, &len), 0);
        char *copy = arena_alloc(&outer, len + 1);
        for (int n = 0; n < MUTANTS; n++)
            read_mutant(path, copy, mutate(copy, text, len));
    }
    globfree(&g);
    set_up();
    scratch(NULL);
    arena_free(&outer);
}
