/* From a deployment to a bundle: placement, layout, launch lists, plan.cuh, flattened source,
 * NVRTC, cache, and what is written.
 *
 * tests/golden/plan holds deployments, each beside the plan.cuh of its class. MOEC_GOLDEN=1
 * rewrites them. Commands run in child processes, each with the cache folder it is given. */
#define _GNU_SOURCE 1
#include "../compiler/moec.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <regex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;
static char dir[64];         // this test's own folder, removed at the end
static char output[1 << 18]; // of the last command, stdout and stderr

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    strcpy(dir, "/tmp/moec-build-XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void tear_down(void) {
    dir_remove(dir);
    arena_free(&arena);
}

TestSuite(build, .init = set_up, .fini = tear_down, .timeout = 600);

/* ---- helpers ---- */

static void need_nvrtc(void) {
    int major, minor;
    if (!nvrtc_version(&major, &minor))
        cr_skip_test("no NVRTC here");
}

static char *in_dir(const char *name) {
    return arena_printf(&arena, "%s/%s", dir, name);
}

static void write_text(const char *path, const char *text) {
    cr_assert_eq(file_write(path, text, strlen(text)), 0, "%s", path);
}

static char *read_text(const char *path) {
    char *text;
    size_t len;
    cr_assert_eq(file_read(&arena, path, 64 << 20, &text, &len), 0, "%s", path);
    return text;
}

static struct plan *plan_of_file(const char *path) {
    struct overrides none = {0};
    struct deployment *dep = deployment_read(&arena, &diags, path, &none);
    if (!dep)
        diag_print(&diags, stderr);
    cr_assert(dep, "%s", path);
    return plan_make(&arena, &diags, dep, 1);
}

static struct plan *plan_of(const char *text) {
    char *path = in_dir("deployment.yaml");
    write_text(path, text);
    return plan_of_file(path);
}

/* A deployment of a small model; rest is text after the model, in YAML. */
static char *small(int experts, const char *rest) {
    return arena_printf(&arena,
                        "model:\n  name: small\n  num_hidden_layers: 2\n  moe_layers: all\n"
                        "  hidden_size: 128\n  moe_intermediate_size: 64\n  num_experts: %d\n"
                        "  num_experts_per_tok: 2\n  router: {method: softmax_topk}\n%s",
                        experts, rest);
}

static struct plan *plan_of_model(const char *model, const char *targets) {
    struct overrides o = {.targets = targets};
    struct deployment *dep = deployment_read(&arena, &diags, model, &o);
    cr_assert(dep, "%s", model);
    return plan_make(&arena, &diags, dep, 1);
}

static glob_t models(void) {
    glob_t g;
    cr_assert_eq(glob("plans/models/*.yaml", 0, NULL, &g), 0);
    return g;
}

/* Starts `moec COMMAND LINE` with a cache folder; its output goes to a file. */
static pid_t start(const char *cache, const char *out, const char *line) {
    char *argv[32], *save, *words = arena_strdup(&arena, line);
    int argc = 0;
    for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save))
        argv[argc++] = w;
    argv[argc] = NULL;
    fflush(NULL);
    pid_t pid = fork();
    cr_assert(pid >= 0);
    if (pid)
        return pid;
    int fd = open(out, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    setenv("XDG_CACHE_HOME", cache, 1);
    int code = strcmp(argv[0], "cache") ? cmd_build(argc, argv) : cmd_cache(argc, argv);
    fflush(NULL);
    _exit(code);
}

static int end(pid_t pid) {
    int status;
    cr_assert_eq(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Exit code of a command; its output in output[]. */
static int moec(const char *cache, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static int moec(const char *cache, const char *fmt, ...) {
    char line[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    int code = end(start(cache, in_dir("output"), line));
    snprintf(output, sizeof output, "%s", read_text(in_dir("output")));
    return code;
}

static int shell(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static int shell(const char *fmt, ...) {
    char line[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    int status = system(line);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* The number after "key": in output[]. */
static double figure(const char *text, const char *key) {
    const char *at = strstr(text, arena_printf(&arena, "\"%s\": ", key));
    cr_assert(at, "no %s in %s", key, text);
    return atof(at + strlen(key) + 4);
}

/* A cache that outlives the tests, so that kernels of other runs need not be compiled again. */
static const char *kept_cache(void) {
    char here[PATH_MAX];
    cr_assert(getcwd(here, sizeof here));
    char *cache = arena_printf(&arena, "%s/build/test-cache", here);
    cr_assert_eq(dir_make(cache), 0);
    return cache;
}

/* ---- placement ---- */

static void expect_slots(const struct plan *p, int layer, const int *want, int n) {
    const struct moe_plan_class *c = &p->classes[0];
    cr_assert_eq(c->ranks * c->slots_per_rank, n);
    for (int s = 0; s < n; s++)
        cr_expect_eq(p->tables[p->layers[layer].expert_of_slot + s], want[s], "slot %d", s);
}

Test(build, experts_in_order_fill_the_ranks) {
    struct plan *p = plan_of(small(8, "cluster: {ranks: 4}\n"));
    static const int want[] = {0, 1, 2, 3, 4, 5, 6, 7};
    expect_slots(p, 0, want, 8);
    expect_slots(p, 1, want, 8);
    cr_expect_eq(p->classes[0].max_replicas, 1);
    cr_expect_eq(p->classes[0].max_tokens, 8192 / 4);
}

Test(build, the_first_ranks_hold_one_more_and_empty_slots_come_last_of_a_rank) {
    struct plan *p = plan_of(small(10, "cluster: {ranks: 4}\n"));
    static const int want[] = {0, 1, 2, 3, 4, 5, 6, 7, -1, 8, 9, -1};
    expect_slots(p, 0, want, 12);
}

Test(build, spare_slots_start_again_at_expert_0) {
    struct plan *p = plan_of(small(8, "cluster: {ranks: 4}\npolicy: even\n"
                                      "moe_config: {load_balancer: {num_slots: 12}}\n"));
    static const int want[] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3};
    expect_slots(p, 1, want, 12);
    cr_expect_eq(p->classes[0].max_replicas, 2);
}

Test(build, trtllm_starts_a_rank_at_its_share_of_the_experts) {
    struct plan *p = plan_of(small(8, "cluster: {ranks: 4}\npolicy: trtllm\n"
                                      "moe_config: {load_balancer: {num_slots: 12}}\n"));
    static const int want[] = {0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0};
    expect_slots(p, 0, want, 12);
    p = plan_of(small(10, "cluster: {ranks: 4}\npolicy: trtllm\n"
                          "moe_config: {load_balancer: {num_slots: 12}}\n"));
    static const int uneven[] = {0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9};
    expect_slots(p, 0, uneven, 12);
}

Test(build, a_given_assignment_is_kept) {
    struct plan *p = plan_of(
        small(4, "cluster: {ranks: 2}\n"
                 "moe_config: {load_balancer: {num_slots: 6, initial_global_assignments:"
                 " {0: [3, 2, 1, 3, 0, 3], 1: [0, 1, 2, 3, 0, 1]}}}\n"));
    static const int want[2][6] = {{3, 2, 1, 3, 0, 3}, {0, 1, 2, 3, 0, 1}};
    expect_slots(p, 0, want[0], 6);
    expect_slots(p, 1, want[1], 6);
    cr_expect_eq(p->classes[0].max_replicas, 3);
}

/* ---- layout ---- */

Test(build, parts_of_a_record_are_aligned_and_do_not_overlap) {
    struct plan *p = plan_of_file("tests/golden/plan/biases.yaml");
    const struct moe_plan_class *c = &p->classes[0];
    cr_expect_eq(c->w1_offset, 0);
    cr_expect_eq(c->w2_offset, 101376);  // 2 bytes x 288 rows x 176
    cr_expect_eq(c->b1_offset, 152064);  // + 2 x 176 x 144 = 50688
    cr_expect_eq(c->b2_offset, 153344);  // + 4 x 288 = 1152, to the next 256
    cr_expect_eq(c->slot_bytes, 154112); // + 4 x 176 = 704, to the next 256
    p = plan_of_file("tests/golden/plan/fixed.yaml");
    c = &p->classes[0];
    cr_expect_eq(c->w2_offset, 2 * 64 * 128, "relu2 has no gate rows");
    cr_expect_eq(c->slot_bytes, 2 * c->w2_offset);
    cr_expect_eq(c->shared_bytes, 0);
}

/* The sections of plan.bin as a reader would find them. */
Test(build, plan_bin_is_what_its_header_says) {
    static const size_t stride[] = {
#define X(name, type) sizeof(type),
        MOE_SECTIONS(X)
#undef X
    };
    struct plan *p = plan_of_file("tests/golden/plan/groups.yaml");
    struct buf b = {.arena = &arena};
    struct moe_plan_header h;
    plan_binary(p, &b);
    memcpy(&h, b.data, sizeof h);
    cr_assert(!memcmp(h.magic, MOE_PLAN_MAGIC, 8) && h.version == MOE_PLAN_VERSION);
    cr_expect(h.header_bytes == sizeof h && h.total_bytes == b.len);
    cr_expect(h.args_id == MOE_ARGS_ID && h.args_version == MOE_ARGS_VERSION &&
              h.args_bytes == sizeof(struct moe_args));
    uint64_t at = sizeof h;
    for (int s = 0; s < MOE_SECTION_COUNT; s++) {
        cr_expect_eq(h.sections[s].offset, at, "section %d", s);
        cr_expect_eq(h.sections[s].stride, stride[s]);
        cr_expect_eq(h.sections[s].count, p->count[s]);
        at = (at + h.sections[s].count * stride[s] + 7) / 8 * 8;
    }
    cr_expect_eq(at, b.len);
    cr_expect_eq(b.data[h.sections[MOE_SECTION_STRINGS].offset], 0, "string 0 is empty");
    const struct moe_plan_class *c =
        (const void *)(b.data + h.sections[MOE_SECTION_CLASS].offset);
    cr_expect_eq(c->hidden, 512);
    cr_expect_str_eq(b.data + h.sections[MOE_SECTION_STRINGS].offset + c->source, "class0.cu");
}

/* ---- launch lists ---- */

/* The number in "name<N>". */
static int argument(const struct plan *p, const struct moe_plan_launch *l) {
    return atoi(strchr(plan_string(p, p->kernels[l->kernel].expression), '<') + 1);
}

static bool is_kernel(const struct plan *p, const struct moe_plan_launch *l, const char *name) {
    const char *e = plan_string(p, p->kernels[l->kernel].expression);
    return !strncmp(e, name, strlen(name)) && e[strlen(name)] == '<';
}

/* One bucket: stages in order, tiles of one width, shared memory and grids within limits. */
static void check_bucket(const struct plan *p, const struct moe_plan_target *t,
                         const struct moe_plan_bucket *b) {
    static const uint32_t smem[] = {
#define X(name, spelling, bytes) bytes,
        MOE_TARGETS(X)
#undef X
    };
    int width = 0, stages = 0, last = 0, entries = 0;
    for (int i = 0; i < b->num_launches; i++) {
        const struct moe_plan_launch *l = &p->launches[b->first_launch + i];
        const struct moe_plan_kernel *k = &p->kernels[l->kernel];
        cr_assert_eq(k->target, t->target);
        cr_expect(k->smem <= smem[t->target] && k->block <= 1024 && k->block % 32 == 0);
        cr_expect(l->stage >= last, "stages in order");
        cr_expect(l->grid != MOE_GRID_PERSISTENT || l->p[1] > 0, "an idle launch");
        last = l->stage;
        stages |= 1 << l->stage;
        if (is_kernel(p, l, "moe_slots")) {
            bool many = slots_counted(&p->classes[t->class_index], b->max_tokens);
            width = argument(p, l);
            cr_expect_eq(l->p[0], (int)k->block, "an entry a thread");
            cr_expect_eq(is_kernel(p, l - 1, "moe_count"), many);
            cr_expect(!many || (l->p[0] == MOE_SLOTS_PART && l[-1].p[0] == MOE_SLOTS_PART &&
                                l[-1].flags == l->flags));
        }
        if (is_kernel(p, l, "moe_gemm1") || is_kernel(p, l, "moe_gemm2"))
            cr_expect_eq(gemm_variants[argument(p, l)].bn, width, "tiles of another width");
        if (is_kernel(p, l, "moe_experts")) {
            cr_assert_eq(sscanf(plan_string(p, k->expression), "moe_experts<%*d,%*d,%*d,%*d,%d",
                                &entries),
                         1);
            cr_expect(!entries || b->max_tokens * p->classes[t->class_index].topk <= entries,
                      "more entries than a block sorts");
            cr_expect_eq(k->num_maps, 4);
        }
    }
    // The one launch of the experts part sorts few entries by itself.
    if (entries)
        stages |= 1 << MOE_STAGE_PREPARE;
    cr_expect_eq(stages, (1 << MOE_STAGE_DISPATCH_SEND) - 1,
                 "every stage of one rank is there");
}

Test(build, launch_lists_of_every_model_hold_together) {
    glob_t g = models();
    cr_expect_geq(g.gl_pathc, 17);
    for (size_t m = 0; m < g.gl_pathc; m++) {
        struct plan *p =
            plan_of_model(g.gl_pathv[m], "sm_80,sm_89,sm_90a,sm_100a,sm_103a,sm_120a,host");
        cr_assert_eq(p->count[MOE_SECTION_TARGET], MOE_TARGET_COUNT);
        for (uint32_t i = 0; i < p->count[MOE_SECTION_TARGET]; i++) {
            const struct moe_plan_target *t = &p->targets[i];
            int tokens = 0;
            for (int b = 0; b < t->num_buckets; b++) {
                const struct moe_plan_bucket *bucket = &p->buckets[t->first_bucket + b];
                cr_expect_gt(bucket->max_tokens, tokens, "buckets ascend");
                tokens = bucket->max_tokens;
                check_bucket(p, t, bucket);
            }
            cr_expect_eq(tokens, p->classes[0].max_tokens, "%s", g.gl_pathv[m]);
        }
    }
    globfree(&g);
}

/* Tiles that any way of spreading the rows over slots can make fit the buffer, and the cap on
 * blocks leaves no item without one when there are SMs enough. */
Test(build, tiles_of_the_worst_batch_fit) {
    struct plan *p = plan_of_file("tests/golden/plan/groups.yaml");
    const struct moe_plan_class *c = &p->classes[0];
    int64_t room = p->buffers[c->first_buffer + MOE_WS_TILES].bytes / sizeof(struct moe_tile);
    for (uint32_t i = 0; i < p->count[MOE_SECTION_BUCKET]; i++)
        for (int l = 0; l < p->buckets[i].num_launches; l++) {
            const struct moe_plan_launch *launch = &p->launches[p->buckets[i].first_launch + l];
            if (!is_kernel(p, launch, "moe_gemm2"))
                continue;
            const struct gemm_variant *v = &gemm_variants[argument(p, launch)];
            // One row more than whole tiles on every slot but the first, which has the rest.
            int64_t rows = (int64_t)p->buckets[i].max_tokens * c->topk, tiles = 0;
            for (int s = 1; s < c->slots_per_rank && rows > 0; s++, rows--)
                tiles++;
            tiles += (rows + v->bn - 1) / v->bn;
            cr_expect_leq(tiles + 1, room);
            cr_expect_geq(launch->p[1], tiles * ((c->hidden + v->bm - 1) / v->bm));
        }
}

/* ---- plan.cuh and the flattened source ---- */

Test(golden, plan_cuh_of_every_kind_of_layer) {
    glob_t g;
    bool rewrite = getenv("MOEC_GOLDEN");
    cr_assert_eq(glob("tests/golden/plan/*.yaml", 0, NULL, &g), 0);
    cr_expect_geq(g.gl_pathc, 6);
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    for (size_t i = 0; i < g.gl_pathc; i++) {
        const char *path = g.gl_pathv[i];
        char *golden = arena_printf(&arena, "%.*s.plan.cuh", (int)(strlen(path) - 5), path);
        struct buf got = {.arena = &arena};
        emit_plan_cuh(plan_of_file(path), 0, NULL, &got);
        if (rewrite)
            write_text(golden, got.data);
        cr_expect_str_eq(got.data, read_text(golden), "%s:\n%s", golden, got.data);
    }
    globfree(&g);
    arena_free(&arena);
}

/* Every "constexpr TYPE NAME" and "#define NAME" of a text, one a line. */
static char *declared(const char *text) {
    struct buf b = {.arena = &arena};
    regex_t re;
    regmatch_t m;
    cr_assert_eq(regcomp(&re,
                         "^(constexpr [a-z ]+ k[A-Za-z0-9]+|__device__ constexpr int "
                         "k[A-Za-z0-9]+|#define MOE_[A-Z_]+)",
                         REG_EXTENDED | REG_NEWLINE),
                 0);
    for (; !regexec(&re, text, 1, &m, 0); text += m.rm_eo)
        buf_printf(&b, "%.*s\n", (int)(m.rm_eo - m.rm_so), text + m.rm_so);
    regfree(&re);
    return b.data;
}

Test(build, the_specimen_has_the_names_that_are_emitted) {
    struct buf b = {.arena = &arena};
    emit_plan_cuh(plan_of_file("tests/golden/plan/fixed.yaml"), 0, NULL, &b);
    char *emitted = declared(b.data);
    cr_expect_str_eq(emitted, declared(read_text("templates/plan.cuh")));
    for (const char *const *name = plan_constants; *name; name++)
        cr_expect(strstr(emitted, arena_printf(&arena, " %s\n", *name)), "%s", *name);
}

/* Line `number` of a text, without its end. */
static char *line_of(const char *text, int number) {
    while (--number > 0)
        text = strchr(text, '\n') + 1;
    return arena_printf(&arena, "%.*s", (int)strcspn(text, "\n"), text);
}

/* Follows #line through the flattened source: every line is the one that the compiler would name
 * in a message, or an #include or #pragma once that is gone. */
Test(build, every_line_of_the_source_is_where_its_directive_says) {
    struct buf b = {.arena = &arena}, cuh = {.arena = &arena};
    struct plan *p = plan_of_file("tests/golden/plan/groups.yaml");
    emit_source(p, 0, NULL, &b);
    emit_plan_cuh(p, 0, NULL, &cuh);
    char name[64] = "", *save, *text = NULL;
    int number = 0, files = 0;
    cr_expect_null(strstr(b.data, "#include \""));
    struct buf spaced = {.arena = &arena}; // strtok drops empty lines
    for (char *c = b.data; *c; c++)
        buf_printf(&spaced, *c == '\n' ? " \n" : "%c", *c);
    for (char *line = strtok_r(spaced.data, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        line[strlen(line) - 1] = 0;
        if (sscanf(line, "#line %d \"%63[^\"]\"", &number, name) == 2) {
            text = strcmp(name, "templates/plan.cuh") ? read_text(name) : cuh.data;
            files += number == 1;
            continue;
        }
        if (!text)
            continue; // the banner
        char *want = line_of(text, number++);
        if (!*line && (!strncmp(want, "#include \"", 10) || !strcmp(want, "#pragma once")))
            continue;
        cr_assert_str_eq(line, want, "%s:%d", name, number - 1);
    }
    cr_expect_eq(files, 12, "moe.cu and what it includes, once each: %d", files);
}

Test(build, an_unbaked_constant_becomes_memory) {
    static const char *const unbake[] = {"kInter", "kRouter", NULL};
    struct buf b = {.arena = &arena};
    emit_plan_cuh(plan_of_file("tests/golden/plan/fixed.yaml"), 0, unbake, &b);
    cr_expect(strstr(b.data, "\n__constant__ int kInter = "));
    cr_expect(strstr(b.data, "\n__constant__ int kRouter = MOE_ROUTER_STATIC;"));
    cr_expect(strstr(b.data, "\nconstexpr int kTopK = 3;"));
    cr_expect_eq(moec(dir, "build plans/tiny.yaml --unbake kInter,kIntre -o %s/x", dir), 2);
    cr_expect(strstr(output, "'kIntre'; did you mean 'kInter'?"), "%s", output);
    need_nvrtc();
    cr_expect_eq(
        moec(kept_cache(), "build plans/tiny.yaml --target sm_80 --unbake kInter -o %s/x", dir),
        0, "%s", output);
}

/* ---- NVRTC ---- */

Test(build, a_compile_error_shows_nvrtcs_words_and_its_place) {
    need_nvrtc();
    struct compile_job job = {.source = "#line 7 \"templates/x.cuh\"\n"
                                        "template <int> __global__ void k() { nonsense; }\n",
                              .source_name = "class0.cu",
                              .expression = "k<0>",
                              .target = MOE_TARGET_SM_80};
    setenv("XDG_CACHE_HOME", dir, 1);
    cr_expect_not(nvrtc_compile(&arena, &diags, &job, 1, 1, NULL, NULL));
    cr_assert(diags.errors == 1 && diags.first->next);
    cr_expect_str_eq(diags.first->text, "class0.cu: k<0> for sm_80 does not compile");
    cr_expect(strstr(diags.first->next->text, "templates/x.cuh(7)"), "%s",
              diags.first->next->text);
}

/* A library that finds no other. Only the program as built can be started with it. */
Test(build, without_nvrtc_only_the_host_target_is_built) {
    const char *b = getenv("B") ? getenv("B") : "build";
    write_text(in_dir("no.c"), "void *dlopen(const char *f, int m) { return 0; }\n"
                               "char *dlerror(void) { return \"none\"; }\n");
    cr_assert_eq(shell("gcc -shared -fPIC -w -o %s/no.so %s/no.c", dir, dir), 0);
    const char *run = arena_printf(
        &arena,
        "ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 LD_PRELOAD=%s/no.so %s/moec "
        "build plans/tiny.yaml -o %s/x >%s/said 2>&1 --target",
        dir, b, dir, dir);
    cr_expect_eq(shell("%s sm_80,host", run), 1);
    char *said = read_text(in_dir("said"));
    cr_expect(strstr(said, "target sm_80 needs NVRTC") && strstr(said, "CUDA_HOME"), "%s",
              said);
    cr_expect_neq(access(in_dir("x"), F_OK), 0, "nothing is written");
    cr_expect_eq(shell("%s host", run), 0, "%s", read_text(in_dir("said")));
    cr_expect(strstr(read_text(in_dir("x/MANIFEST")), "\nnvrtc none\n"));
}

/* An NVRTC 99.9 in a toolkit that no loader knows. As the real one it opens its builtins by name;
 * its cubins are the word "cubin", and a source that holds "nonsense" does not compile. */
static void make_toolkit(void) {
    const char *lib = "cuda/targets/any/lib";
    cr_assert_eq(dir_make(in_dir(lib)), 0);
    write_text(
        in_dir("nvrtc.c"),
        "#include <dlfcn.h>\n#include <string.h>\n#define N(x) int nvrtc##x\n"
        "static char name[99]; static const char *source, *log = \"no builtins\";\n"
        "N(Version)(int *a, int *b) { *a = 99; *b = 9; return 0; }\n"
        "N(CreateProgram)(void **p, const char *s) { *p = name; source = s; return 0; }\n"
        "N(DestroyProgram)(void **p) { return 0; }\n"
        "N(AddNameExpression)(void *p, const char *e) { return 0; }\n"
        "N(CompileProgram)(void *p) {\n"
        "    if (!dlopen(\"libnvrtc-builtins.so.99.9\", RTLD_NOW)) return 1;\n"
        "    log = \"nonsense here\"; return !!strstr(source, \"nonsense\"); }\n"
        "N(GetProgramLogSize)(void *p, long *n) { *n = strlen(log) + 1; return 0; }\n"
        "N(GetProgramLog)(void *p, char *l) { strcpy(l, log); return 0; }\n"
        "N(GetLoweredName)(void *p, const char *e, const char **l) { *l = \"sym\";"
        " return 0; }\n"
        "N(GetCUBINSize)(void *p, long *n) { *n = 5; return 0; }\n"
        "N(GetCUBIN)(void *p, char *c) { memcpy(c, \"cubin\", 5); return 0; }\n");
    write_text(in_dir("builtins.c"), "int builtins;\n");
    cr_assert_eq(shell("cd %s && gcc -shared -fPIC -w -o %s/libnvrtc.so.99 nvrtc.c &&"
                       " gcc -shared -fPIC -Wl,-soname,libnvrtc-builtins.so.99.9"
                       " -o %s/libnvrtc-builtins.so.99.9 builtins.c",
                       dir, lib, lib),
                 0);
    setenv("CUDA_HOME", in_dir("cuda"), 1);
}

Test(build, a_toolkit_off_the_loaders_path_is_found_with_its_builtins) {
    make_toolkit();
    cr_assert_eq(moec(dir, "build plans/tiny.yaml --target sm_80 -o %s/x", dir), 0, "%s",
                 output);
    cr_expect(strstr(read_text(in_dir("x/MANIFEST")), "\nnvrtc 99.9\n"));
}

/* ---- cache ---- */

Test(build, sixteen_processes_compile_each_kernel_once) {
    need_nvrtc();
    enum { PROCESSES = 16 };
    pid_t pids[PROCESSES];
    double compiled = 0, kernels = 0;
    for (int i = 0; i < PROCESSES; i++)
        pids[i] = start(dir, in_dir(arena_printf(&arena, "out%d", i)),
                        arena_printf(&arena,
                                     "build tests/golden/plan/fixed.yaml -j2 --json -o %s/b%d",
                                     dir, i));
    for (int i = 0; i < PROCESSES; i++) {
        int code = end(pids[i]);
        char *said = read_text(in_dir(arena_printf(&arena, "out%d", i)));
        cr_assert_eq(code, 0, "%s", said);
        compiled += figure(said, "compiled");
        kernels = figure(said, "kernels");
        cr_expect_eq(shell("diff -r %s/b0 %s/b%d", dir, dir, i), 0);
    }
    cr_expect_eq(compiled, kernels, "%.0f compiles of %.0f kernels", compiled, kernels);
}

/* Some entry of the cache in dir. */
static char *some_entry(void) {
    glob_t g;
    cr_assert_eq(glob(in_dir("moec/????????????????????????????????*"), 0, NULL, &g), 0);
    char *path = arena_strdup(&arena, g.gl_pathv[g.gl_pathc / 2]);
    globfree(&g);
    return path;
}

/* Builds a small plan with the cache in dir; how many kernels were not in it. */
static int build_small(void) {
    cr_assert_eq(moec(dir, "build tests/golden/plan/fixed.yaml --json -o %s/b", dir), 0, "%s",
                 output);
    return (int)figure(output, "compiled");
}

Test(build, a_damaged_entry_is_found_and_made_again) {
    need_nvrtc();
    size_t len;
    char *data;
    int all = build_small();
    cr_expect_gt(all, 5);
    cr_expect_eq(build_small(), 0);
    cr_assert_eq(shell("cp -r %s/b %s/good", dir, dir), 0);
    const char *entry = some_entry();
    cr_assert_eq(file_read(&arena, entry, 1 << 20, &data, &len), 0);
    data[len - 100] ^= 1;
    cr_assert_eq(file_write(entry, data, len), 0);
    cr_expect_eq(build_small(), 1, "one flipped bit");
    cr_assert_eq(truncate(entry, (off_t)len / 2), 0);
    cr_expect_eq(build_small(), 1, "cut short");
    cr_assert_eq(truncate(entry, 0), 0);
    cr_expect_eq(moec(dir, "cache verify"), 1);
    cr_expect(strstr(output, "1 corrupt"), "%s", output);
    cr_expect_eq(moec(dir, "cache verify"), 0, "it was removed: %s", output);
    cr_expect_eq(build_small(), 1);
    cr_expect_eq(shell("diff -r %s/b %s/good", dir, dir), 0);
}

Test(build, an_entry_under_another_key_is_none) {
    need_nvrtc();
    glob_t g;
    build_small();
    cr_assert_eq(shell("cp -r %s/b %s/good", dir, dir), 0);
    cr_assert_eq(glob(in_dir("moec/????????????????????????????????*"), 0, NULL, &g), 0);
    cr_assert_eq(shell("cp %s %s", g.gl_pathv[0], g.gl_pathv[1]), 0);
    globfree(&g);
    cr_expect_eq(build_small(), 1);
    cr_expect_eq(shell("diff -r %s/b %s/good", dir, dir), 0);
}

Test(build, the_cache_is_listed_and_cleared) {
    need_nvrtc();
    int all = build_small();
    write_text(in_dir("moec/.left.so"), "by a killed process");
    cr_expect_eq(moec(dir, "cache list"), 0);
    cr_expect(strstr(output, arena_printf(&arena, "/moec: %d files", all + 1)), "%s", output);
    cr_assert_eq(unlink(in_dir("moec/.left.so")), 0);
    cr_expect_eq(moec(dir, "cache list --json"), 0);
    cr_expect(strstr(output, "\"what\": \"sm_120a moe_gemm1<"), "%s", output);
    cr_expect_eq(moec(dir, "cache list"), 0);
    cr_expect(strstr(output, arena_printf(&arena, "/moec: %d files", all)), "%s", output);
    cr_expect_eq(moec(dir, "cache clear"), 0);
    cr_expect(strstr(output, arena_printf(&arena, "removed %d files", all)), "%s", output);
    cr_expect_eq(build_small(), all);
}

Test(build, a_cache_that_others_may_write_to_is_not_used) {
    need_nvrtc();
    int all = build_small();
    struct stat st;
    cr_assert_eq(stat(in_dir("moec"), &st), 0);
    cr_expect_eq(st.st_mode & 07777, 0700);
    cr_assert_eq(chmod(in_dir("moec"), 0720), 0);
    cr_expect_eq(build_small(), all);
    cr_expect(strstr(output, "warning: no kernel cache") && strstr(output, "others may write"),
              "%s", output);
    cr_expect_eq(moec(dir, "cache list"), 1);
    if (geteuid())
        return; // only root can give a folder away
    cr_assert(!chmod(in_dir("moec"), 0700) && !chown(in_dir("moec"), 12345, -1));
    cr_expect_eq(build_small(), all);
    cr_expect(strstr(output, "belongs to another user"), "%s", output);
}

Test(build, every_target_has_its_own_kernels) {
    need_nvrtc();
    glob_t g;
    cr_assert_eq(moec(dir,
                      "build tests/golden/plan/fixed.yaml --target "
                      "sm_80,sm_89,sm_90a,sm_100a,sm_103a,sm_120a -o %s/b",
                      dir),
                 0, "%s", output);
    cr_assert_eq(glob(in_dir("b/sm_*/class0.moe_combine_0.cubin"), 0, NULL, &g), 0);
    cr_assert_eq(g.gl_pathc, 6);
    for (size_t i = 1; i < g.gl_pathc; i++)
        for (size_t j = 0; j < i; j++)
            cr_expect_neq(shell("cmp -s %s %s", g.gl_pathv[i], g.gl_pathv[j]), 0,
                          "%s is %s: the cache took one for the other", g.gl_pathv[i],
                          g.gl_pathv[j]);
    globfree(&g);
}

/* ---- bundle ---- */

Test(build, equal_input_makes_equal_bytes) {
    need_nvrtc();
    const char *const deployment = "tests/golden/plan/fixed.yaml --target sm_80,host";
    for (int i = 1; i <= 3; i++) { // 1 and 2 compile, 3 finds all in the cache of 2
        const char *cache = in_dir(i == 1 ? "cold" : "warm");
        cr_assert_eq(moec(cache, "build %s -j%d -o %s/b%d", deployment, i, dir, i), 0, "%s",
                     output);
        cr_expect_eq(shell("diff -r %s/b1 %s/b%d", dir, dir, i), 0);
    }
    // From another folder, with another path to the same file.
    char here[PATH_MAX];
    cr_assert(getcwd(here, sizeof here) && !chdir(dir));
    cr_assert_eq(moec(in_dir("warm"), "build %s/%s", here, deployment), 0, "%s", output);
    cr_expect_eq(shell("diff -r %s/b1 %s/fixed.moe", dir, dir), 0);
    cr_assert_eq(chdir(here), 0);
}

Test(build, the_manifest_names_every_file_with_hash_and_length) {
    cr_assert_eq(moec(dir, "build plans/tiny.yaml --target host -o %s/b", dir), 0, "%s",
                 output);
    char *manifest = read_text(in_dir("b/MANIFEST")), hash[65], path[256], *save;
    char *yaml = read_text(in_dir("b/plan.yaml"));
    hash_hex(yaml, strlen(yaml), hash);
    char *head = arena_printf(&arena, "moec-bundle 1\ncompiler %s\nnvrtc none\nplan %s\n",
                              MOEC_VERSION, hash);
    cr_assert(!strncmp(manifest, head, strlen(head)), "%s", manifest);
    const char *before = "";
    int files = 0;
    for (char *line = strtok_r(manifest + strlen(head), "\n", &save); line; files++) {
        char want[65], *data;
        size_t bytes, len;
        cr_assert_eq(sscanf(line, "file %64s %zu %255s", want, &bytes, path), 3, "%s", line);
        cr_expect(strcmp(before, path) < 0, "paths ascend");
        before = arena_strdup(&arena, path);
        cr_assert_eq(
            file_read(&arena, path_join(&arena, in_dir("b"), path), 1 << 24, &data, &len), 0);
        hash_hex(data, len, hash);
        cr_expect(len == bytes && !strcmp(hash, want), "%s", path);
        line = strtok_r(NULL, "\n", &save);
    }
    cr_expect_eq(files, 3, "plan.bin, plan.yaml, class0.cu: %d", files);
}

/* How many names a folder holds. */
static int names_in(const char *path) {
    glob_t g;
    int n = glob(arena_printf(&arena, "%s/*", path), GLOB_PERIOD, NULL, &g)
                ? 0
                : (int)g.gl_pathc - 2;
    globfree(&g);
    return n;
}

Test(build, a_bundle_is_replaced_whole_or_not_at_all) {
    const char *const line = "build plans/tiny.yaml --target host -o %s/out/b";
    cr_assert_eq(dir_make(in_dir("out")), 0);
    cr_assert_eq(moec(dir, line, dir), 0, "%s", output);
    write_text(in_dir("out/b/stale"), "from the bundle before");
    cr_assert_eq(moec(dir, line, dir), 0, "%s", output);
    cr_expect_neq(access(in_dir("out/b/stale"), F_OK), 0, "the old one is gone");
    write_text(in_dir("out/b/stale"), "x");
    cr_expect_eq(
        moec(dir, "build plans/tiny.yaml --target host --set nonsense=1 -o %s/out/b", dir), 1);
    cr_expect_eq(access(in_dir("out/b/stale"), F_OK), 0, "a failed build leaves it alone");
    cr_expect_eq(names_in(in_dir("out")), 1, "nothing temporary stays");
}

Test(build, what_a_killed_build_left_is_swept_away) {
    const char *const line = "build plans/tiny.yaml --target host -o %s/out/b";
    cr_assert_eq(dir_make(in_dir("out/b.tmp.123")), 0);
    write_text(in_dir("out/b.tmp.123/plan.yaml"), "half of i");
    cr_assert_eq(dir_make(in_dir("out/b.tmp.note")), 0);
    cr_assert_eq(dir_make(in_dir("out/b.tmp.124")), 0);
    int lock = open(in_dir("out/b.tmp.124"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cr_assert(lock >= 0 && !flock(lock, LOCK_EX));
    cr_assert_eq(moec(dir, line, dir), 0, "%s", output);
    cr_expect_neq(access(in_dir("out/b.tmp.123"), F_OK), 0);
    cr_expect_eq(access(in_dir("out/b.tmp.note"), F_OK), 0, "no name of ours");
    cr_expect_eq(access(in_dir("out/b.tmp.124"), F_OK), 0, "somebody is at work");
    close(lock);
}

Test(build, builds_of_one_bundle_at_a_time_all_succeed) {
    enum { PROCESSES = 16 };
    pid_t pids[PROCESSES];
    for (int i = 0; i < PROCESSES; i++)
        pids[i] =
            start(dir, in_dir(arena_printf(&arena, "out%d", i)),
                  arena_printf(&arena, "build plans/tiny.yaml --target host -o %s/b", dir));
    for (int i = 0; i < PROCESSES; i++) {
        int code = end(pids[i]);
        cr_expect_eq(code, 0, "%s", read_text(in_dir(arena_printf(&arena, "out%d", i))));
    }
    cr_expect_eq(names_in(dir), PROCESSES + 1, "their words and the bundle");
}

Test(build, readers_see_a_bundle_while_it_is_replaced) {
    const char *const line = arena_printf(
        &arena,
        "build plans/tiny.yaml --target host --set moe_config.max_num_tokens=%%d -o %s/b", dir);
    cr_assert_eq(moec(dir, "build plans/tiny.yaml --target host -o %s/b", dir), 0, "%s",
                 output);
    for (int i = 0; i < 10; i++) {
        char *words = arena_alloc(&arena, 512);
        snprintf(words, 512, line, 100 + i);
        pid_t pid = start(dir, in_dir("output"), words);
        int status = 0;
        while (!waitpid(pid, &status, WNOHANG))
            cr_assert_eq(access(in_dir("b/MANIFEST"), R_OK), 0, "it was away");
        cr_expect_eq(status, 0);
    }
}

Test(build, what_is_no_bundle_stays) {
    cr_assert_eq(dir_make(in_dir("home")), 0);
    write_text(in_dir("home/thesis.tex"), "years of work");
    cr_expect_eq(moec(dir, "build plans/tiny.yaml --target host -o %s/home", dir), 1);
    cr_expect(strstr(output, "no bundle"), "%s", output);
    cr_expect_str_eq(read_text(in_dir("home/thesis.tex")), "years of work");
    cr_expect_eq(moec(dir, "build plans/tiny.yaml --target host -o %s/home/thesis.tex", dir),
                 1);
    cr_expect_str_eq(read_text(in_dir("home/thesis.tex")), "years of work");
    cr_assert_eq(dir_make(in_dir("empty")), 0);
    cr_expect_eq(moec(dir, "build plans/tiny.yaml --target host -o %s/empty", dir), 0, "%s",
                 output);
    cr_expect_eq(moec(dir, "build plans/tiny.yaml --target host -o %s/empty//", dir), 0,
                 "slashes at the end: %s", output);
    cr_expect_eq(access(in_dir("empty/MANIFEST"), F_OK), 0);
    cr_expect_eq(names_in(dir), 3, "home, empty, the command's output");
    cr_expect_eq(moec(dir, "build plans/tiny.yaml --target host -o /dev/null/x"), 1);
    cr_expect(strstr(output, "error: /dev/null/x"), "%s", output);
}

Test(build, wrong_usage_of_build_and_cache_exits_2) {
    static const char *const wrong[] = {"build",
                                        "build a b",
                                        "build plans/tiny.yaml -j0",
                                        "build plans/tiny.yaml -jx",
                                        "build --ep 1.5",
                                        "build --ep -1",
                                        "cache",
                                        "cache list clear",
                                        "cache nonsense",
                                        "build -o"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(moec(dir, "%s", wrong[i]), 2, "%s: %s", wrong[i], output);
    cr_expect_eq(moec(dir, "build %s/nothing.yaml", dir), 1);
}

/* ---- the bars ---- */

/* Processor seconds that children have taken so far: unlike the clock, these do not grow when other
 * tests share the cores. */
static double children_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_CHILDREN, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* 10 s on two cores, 1 s warm. */
Test(build, deepseek_v3_on_32_ranks_builds_in_seconds) {
    need_nvrtc();
    const char *const line = "build plans/deepseek-v3-ep32.yaml --json -j2 -o %s/b";
    cr_assert_eq(moec(dir, line, dir), 0, "%s", output);
    double cold = children_seconds(), cold_clock = figure(output, "seconds");
    double bytes = figure(output, "bytes");
    cr_expect_eq(figure(output, "cached"), 0);
    cr_assert_eq(moec(dir, line, dir), 0, "%s", output);
    double warm = children_seconds() - cold, warm_clock = figure(output, "seconds");
    cr_expect_eq(figure(output, "compiled"), 0);
    printf("deepseek-v3-ep32, one target: cold %.2f s (%.2f s of processor), warm %.3f s "
           "(%.3f s), %.2f MB\n",
           cold_clock, cold, warm_clock, warm, bytes / 1e6);
    fflush(stdout);
    cr_expect_lt(cold, 2 * 10);
    cr_expect_lt(warm, 1);
    cr_expect_lt(bytes, 20e6);
}

/* Every model for every target: a test a model, so that cores share them. */
struct model_case {
    char path[64];
};

ParameterizedTestParameters(targets, every_model_compiles) {
    glob_t g;
    struct model_case *cases;
    glob("plans/models/*.yaml", 0, NULL, &g);
    cases = cr_malloc(sizeof *cases * g.gl_pathc);
    for (size_t i = 0; i < g.gl_pathc; i++)
        snprintf(cases[i].path, sizeof cases[i].path, "%s", g.gl_pathv[i]);
    size_t n = g.gl_pathc;
    globfree(&g);
    return cr_make_param_array(struct model_case, cases, n, NULL);
}

ParameterizedTest(struct model_case *c, targets, every_model_compiles, .init = set_up,
                  .fini = tear_down) {
    need_nvrtc();
    cr_assert_eq(moec(kept_cache(),
                      "build %s --target sm_80,sm_89,sm_90a,sm_100a,sm_103a,sm_120a,host -j1 "
                      "--json -o %s/b",
                      c->path, dir),
                 0, "%s: %s", c->path, output);
    cr_expect_eq(shell("for f in %s/b/*/*.cubin; do"
                       " [ \"$(head -c4 $f | od -An -tx1)\" = ' 7f 45 4c 46' ] || exit 1; done",
                       dir),
                 0, "%s: a cubin is no ELF file", c->path);
    cr_expect_geq(names_in(arena_printf(&arena, "%s/b/sm_103a", dir)), 8);
}
