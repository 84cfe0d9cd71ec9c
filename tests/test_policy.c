/* Lua policies: what they may do, what they may not (tests/hostile holds policies that try), how
 * what they return is checked, and what place_layers makes of it. */
#define _GNU_SOURCE
#include "../compiler/balance.h"
#include "../compiler/policy.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <dirent.h>
#include <errno.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;
static char dir[64]; /* of this test's own */

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    strcpy(dir, "/tmp/moec-policy-XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void tear_down(void) {
    dir_remove(dir);
    arena_free(&arena);
}

TestSuite(policy, .init = set_up, .fini = tear_down, .timeout = 120);

/* ---- helpers ---- */

static const char *printed(void) {
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    diag_print(&diags, f);
    fclose(f);
    const char *copy = arena_printf(&arena, "%.2000s", text);
    free(text);
    return copy;
}

static const char *file_of(const char *name, const char *text) {
    const char *path = arena_printf(&arena, "%s/%s", dir, name);
    cr_assert_eq(file_write(path, text, strlen(text)), 0);
    return path;
}

/* Layers 1, 3, 5 of 16 experts on 4 ranks. */
static struct deployment *small(const char *policy_text) {
    static const char text[] = "name: small\nnum_hidden_layers: 6\nmoe_layers: odd\n"
                               "hidden_size: 256\nmoe_intermediate_size: 128\nnum_experts: 16\n"
                               "num_experts_per_tok: 2\nrouter: {method: softmax_topk}\n";
    struct deployment *dep = arena_array(&arena, struct deployment, 1);
    dep->model = model_parse(&arena, &diags,
                             yaml_parse(&arena, &diags, "small.yaml", text, sizeof text - 1));
    dep->cluster = cluster_default(&arena);
    dep->cluster->ranks = dep->cluster->ranks_per_node = 4;
    dep->num_slots = 24;
    dep->moves = -1;
    dep->dispatch = DISPATCH_BALANCED;
    dep->policy = "robust";
    if (policy_text)
        dep->policy = dep->policy_path = file_of("p.lua", policy_text);
    cr_assert(dep->model);
    return dep;
}

/* Loads of n workloads called a, b, ...: skewed, different in every layer. */
static struct loads *loads_for(const struct model *m, int n) {
    struct loads *l = arena_array(&arena, struct loads, 1);
    l->num_layers = m->num_moe_layers;
    l->experts = m->num_experts;
    l->layers = m->moe_layers;
    l->num_workloads = n;
    l->workloads = arena_array(&arena, struct workload, n);
    for (int w = 0; w < n; w++) {
        double *count = arena_array(&arena, double, (size_t)l->num_layers * m->num_experts);
        l->workloads[w] = (struct workload){
            .name = arena_printf(&arena, "%c", 'a' + w), .weight = 1, .count = count};
        for (int i = 0; i < l->num_layers * m->num_experts; i++)
            count[i] = 100000 / (1 + (i * 7 + w * 3) % m->num_experts);
    }
    return l;
}

static struct placement *place(const struct deployment *dep) {
    return place_layers(&arena, &diags, dep, 2);
}

static struct placement *must_place(const struct deployment *dep) {
    struct placement *p = place(dep);
    cr_assert(p && !diags.errors, "%s", printed());
    return p;
}

static void expect_error(const char *policy_text, const char *expected) {
    diags = (struct diags){.arena = &arena};
    struct deployment *dep = small(policy_text);
    dep->loads = loads_for(dep->model, 2);
    cr_expect_null(place(dep));
    cr_expect(strstr(printed(), expected), "expected: %s\nprinted: %s", expected, printed());
}

static size_t num_slots(const struct placement *p) {
    return (size_t)p->num_layers * (size_t)p->ranks * (size_t)p->slots_per_rank;
}

static void expect_same(const struct placement *a, const struct placement *b) {
    cr_assert_eq(num_slots(a), num_slots(b));
    cr_expect_arr_eq(a->expert_of_slot, b->expert_of_slot, num_slots(a) * sizeof(int));
    cr_expect_arr_eq(a->share_of_slot, b->share_of_slot, num_slots(a) * sizeof(double));
    cr_expect_arr_eq(a->imbalance, b->imbalance, (size_t)a->num_layers * sizeof(double));
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int open_files(void) {
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (d && readdir(d))
        n++;
    closedir(d);
    return n;
}

/* Exit status of build/moec with these arguments, run in this test's folder; its output in out. */
static int run_moec(char *out, size_t size, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static int run_moec(char *out, size_t size, const char *fmt, ...) {
    char here[PATH_MAX];
    const char *build = getenv("B");
    va_list args;
    char rest[1024];
    va_start(args, fmt);
    vsnprintf(rest, sizeof rest, fmt, args);
    va_end(args);
    cr_assert(getcwd(here, sizeof here));
    char *command =
        arena_printf(&arena, "mkdir -p %s/run && cd %s/run && exec %s/%s/moec %s %s", dir, dir,
                     here, build ? build : "build", rest, strstr(rest, "2>") ? "" : "2>&1");
    FILE *f = popen(command, "r");
    size_t len = fread(out, 1, size - 1, f);
    out[len] = 0;
    int status = pclose(f);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* ---- hostile policies ---- */

enum { NAME_MAX_BYTES = 96 };

ParameterizedTestParameters(policy, a_hostile_policy_is_stopped_or_harmless) {
    static char(*names)[NAME_MAX_BYTES];
    glob_t g;
    size_t n = 0;
    if (!glob("tests/hostile/*.lua", 0, NULL, &g)) {
        names = cr_malloc(g.gl_pathc * sizeof *names);
        for (; n < g.gl_pathc; n++)
            snprintf(names[n], sizeof *names, "%s", g.gl_pathv[n]);
        globfree(&g);
    }
    return cr_make_param_array(char[NAME_MAX_BYTES], names, n);
}

/* The rest of a line that begins so; the file's first two lines say what it tries and what has to
 * come of it: "ok", or parts of an error, one of which must be there. */
static char *header(const char *text, const char *begin) {
    const char *at = strstr(text, begin);
    cr_assert(at, "no line %s", begin);
    at += strlen(begin);
    return arena_printf(&arena, "%.*s", (int)strcspn(at, "\n"), at);
}

/* Whether this output and exit status are what a header expects. */
static bool as_expected(const char *expected, const char *out, int status) {
    if (!status)
        return !strcmp(expected, "ok") || strstr(expected, " or ok");
    for (const char *at = expected, *end; at && status == 1; at = end ? end + 4 : NULL) {
        end = strstr(at, " or ");
        if (memmem(out, strlen(out), at, end ? (size_t)(end - at) : strlen(at)) &&
            strstr(out, "error: "))
            return true;
    }
    return false;
}

ParameterizedTest(char (*name)[NAME_MAX_BYTES], policy,
                  a_hostile_policy_is_stopped_or_harmless) {
    static char out[1 << 20];
    char here[PATH_MAX], *text;
    size_t len;
    cr_assert(getcwd(here, sizeof here));
    cr_assert_eq(file_read(&arena, *name, 1 << 20, &text, &len), 0, "%s", *name);
    cr_assert_eq(strncmp(text, "-- tries: ", 10), 0, "%s", *name);
    const char *expected = header(text, "\n-- expect: ");
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    double start = now_seconds();
    int status = run_moec(out, sizeof out, "policy check %s/%s", here, *name);
    cr_expect_lt(now_seconds() - start, 10, "%s took %.1f s", *name, now_seconds() - start);
    cr_expect(as_expected(expected, out, status), "%s: %d\nexpected: %s\n%.1500s", *name,
              status, expected, out);
    cr_expect(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "%s left a process", *name);
    cr_expect_eq(rmdir(arena_printf(&arena, "%s/run", dir)), 0, "%s left a file", *name);
}

Test(policy, at_least_40_hostile_policies_are_written_down) {
    glob_t g;
    cr_assert_eq(glob("tests/hostile/*.lua", 0, NULL, &g), 0);
    cr_expect_geq(g.gl_pathc, 40);
    globfree(&g);
}

Test(policy, bytecode_is_refused) {
    const char *path = file_of("p.lua", "\033LuaT");
    cr_expect_null(policy_open(&arena, &diags, path, path, (struct loc){0}));
    cr_expect(strstr(printed(), "binary chunk"), "%s", printed());
}

Test(policy, a_file_that_cannot_be_read_is_an_error) {
    const char *path = arena_printf(&arena, "%s/none.lua", dir);
    cr_expect_null(policy_open(&arena, &diags, path, path, (struct loc){0}));
    cr_expect(strstr(printed(), "No such file"), "%s", printed());
    cr_expect_null(policy_open(&arena, &diags, dir, dir, (struct loc){0}));
    char *large = arena_alloc(&arena, POLICY_FILE + 100);
    memset(large, ' ', POLICY_FILE + 99);
    path = file_of("large.lua", large);
    cr_expect_null(policy_open(&arena, &diags, path, path, (struct loc){0}));
    cr_expect(strstr(printed(), "larger than 1 MiB"), "%s", printed());
    cr_expect_eq(diags.errors, 3);
}

Test(policy, a_call_leaves_no_process_and_no_open_file) {
    int before = open_files();
    must_place(small("return {place = moe and nil}"));
    cr_expect_null(place(small("return {constraints = function() error('x') end}")));
    cr_expect_eq(open_files(), before);
    cr_expect(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD);
}

/* What a taken-over child might send instead of a value. */
Test(policy, damaged_results_are_refused) {
    static const char good[] = "t\2\0\0\0\1\0\0\0TI\1\2\3\4\5\6\7\10S\2\0\0\0abN";
    char bytes[sizeof good];
    uint64_t state = 1;
    int accepted = 0;
    cr_expect(policy_value_ok(&arena, good, sizeof good - 1));
    for (size_t n = 0; n < sizeof good - 1; n++)
        cr_expect_not(policy_value_ok(&arena, good, n), "%zu bytes", n);
    for (int i = 0; i < 100000; i++) {
        memcpy(bytes, good, sizeof good);
        for (int k = 0; k < 1 + i % 3; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            bytes[(state >> 33) % (sizeof good - 1)] = (char)(state >> 56);
        }
        accepted += policy_value_ok(&arena, bytes, sizeof good - 1);
    }
    cr_expect(accepted > 0 && accepted < 90000, "%d accepted", accepted);
}

/* ---- what is the same everywhere ---- */

Test(policy, pairs_and_next_go_in_order) {
    struct deployment *dep = small(
        "local t, seen = {b = 1, a = 1, B = 1, [2.5] = 1, [-1] = 1, [10] = 1, [true] = 1,\n"
        "    [false] = 1, ['a\\0b'] = 1, [1] = 1, [3] = 1, ['10'] = 1}, {}\n"
        "for k in pairs(t) do seen[#seen + 1] = tostring(k) end\n"
        "local first = next(t)\n"
        "local k = nil\n"
        "repeat k = next(t, k) seen[#seen + 1] = tostring(k) until k == nil\n"
        "print(first, (table.concat(seen, ' '):gsub('\\0', '0')))\n"
        "return {}\n");
    must_place(dep);
    const char *order = "-1 1 2.5 3 10 10 B a a0b b false true";
    cr_expect(strstr(printed(), arena_printf(&arena, "note: -1\t%s %s nil\n", order, order)),
              "%s", printed());
}

/* Thousands of keys, so that a hash seed would show. */
Test(policy, a_run_repeats_itself) {
    static const char text[] =
        "local t, out = {}, {}\n"
        "for i = 1, 3000 do t['k' .. i * 7919 % 3001] = i end\n"
        "for k, v in pairs(t) do out[#out + 1] = k .. v end\n"
        "table.sort(out, function(a, b) return #a < #b end)\n"
        "local s = table.concat(out)\n"
        "local h = 0\n"
        "for i = 1, #s do h = (h * 31 + s:byte(i)) % 1000000007 end\n"
        "print(h, math.random(1000000), math.exp(1.5), math.log(3), 1.1^2.2, tostring(t))\n"
        "return {}\n";
    const char *first = NULL;
    for (int i = 0; i < 5; i++) {
        diags = (struct diags){.arena = &arena};
        must_place(small(text));
        const char *now = printed();
        cr_expect(strstr(now, "note: "));
        cr_expect(!first || !strcmp(first, now), "%s%s", first, now);
        first = now;
    }
}

Test(policy, sort_is_stable) {
    must_place(small("local t = {}\n"
                     "for i = 1, 5000 do t[i] = {i % 10, i} end\n"
                     "table.sort(t, function(a, b) return a[1] < b[1] end)\n"
                     "for i = 2, 5000 do\n"
                     "    assert(t[i - 1][1] < t[i][1] or t[i - 1][1] == t[i][1] and\n"
                     "        t[i - 1][2] < t[i][2])\n"
                     "end\n"
                     "local s = {3, 1, 2}\n"
                     "table.sort(s)\n"
                     "assert(table.concat(s) == '123')\n"
                     "return {}\n"));
}

/* Units in the last place between two numbers of one sign. */
static double ulps(double a, double b) {
    if (a == b || (isnan(a) && isnan(b)))
        return 0;
    return fabs(a - b) / (nextafter(fabs(b), HUGE_VAL) - fabs(b));
}

double __wrap_pow(double a, double b);
double __real_pow(double a, double b);

Test(policy, powers_and_logarithms_are_close_to_the_exact_ones) {
    double worst[3] = {0};
    uint64_t state = 3;
    for (int i = 0; i < 200000; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        double u = (double)(state >> 11) / 9007199254740992.0, x = (u - 0.5) * 200;
        double e = ulps(number_exp(x), exp(x)), l = ulps(number_log(u * 1000), log(u * 1000));
        double p = ulps(__wrap_pow(u * 10, x / 50), __real_pow(u * 10, x / 50));
        worst[0] = e > worst[0] ? e : worst[0];
        worst[1] = fabs(u * 1000 - 1) > 0.1 && l > worst[1] ? l : worst[1];
        worst[2] = p > worst[2] ? p : worst[2];
    }
    cr_expect(worst[0] <= 2 && worst[1] <= 2 && worst[2] <= 16, "%g %g %g ulp", worst[0],
              worst[1], worst[2]);
}

Test(policy, powers_have_the_c_library_s_edges) {
    static const double x[] = {0,    -0.0, 1,    -1,    2,        -2,        0.5, -0.5, 3,
                               1e10, 1023, 1024, 1e300, HUGE_VAL, -HUGE_VAL, NAN, -3,   1e-300};
    enum { N = sizeof x / sizeof *x };
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double got = __wrap_pow(x[i], x[j]), want = __real_pow(x[i], x[j]);
            cr_expect(isnan(want)   ? isnan(got)
                      : isinf(want) ? got == want || want < 0
                                    : ulps(got, want) < 2000,
                      "%g^%g: %g, not %g", x[i], x[j], got, want);
        }
    for (int n = 0; n < 53; n++)
        cr_expect_eq(__wrap_pow(2, n), (double)(1ll << n));
    cr_expect_eq(number_exp(0), 1);
    cr_expect_eq(number_exp(1000), HUGE_VAL);
    cr_expect_eq(number_exp(-1000), 0);
    cr_expect_eq(number_log(1), 0);
    cr_expect(isnan(number_log(-1)));
}

/* ---- errors ---- */

Test(policy, an_error_says_where_it_is) {
    struct deployment *dep = small("local x = 1\n"
                                   "return {\n"
                                   "    place = function(model, cluster)\n"
                                   "        return x.y.z\n"
                                   "    end,\n"
                                   "}\n");
    cr_expect_null(place(dep));
    cr_expect_str_eq(printed(),
                     arena_printf(&arena,
                                  "%s:4:9: error: place: attempt to index a number value "
                                  "(upvalue 'x')\n     4 |         return x.y.z\n"
                                  "       |         ^\n",
                                  dep->policy_path));
}

Test(policy, a_syntax_error_points_at_the_word) {
    struct deployment *dep = small("return {\n    place = functoin(model)\n    end,\n}\n");
    cr_expect_null(place(dep));
    cr_expect(strstr(printed(), "p.lua:3:5: error: "), "%s", printed());
    cr_expect(strstr(printed(), "     3 |     end,\n       |     ^\n"), "%s", printed());
}

Test(policy, a_wrong_value_is_named_by_its_path) {
    expect_error("return {\n    place = function(model, cluster)\n"
                 "        local p = {}\n"
                 "        for _, l in ipairs(model.moe_layers) do\n"
                 "            p[l] = {}\n"
                 "            for i = 1, 24 do p[l][i] = (i - 1) % 16 end\n"
                 "        end\n"
                 "        p[3][18] = 300\n"
                 "        return p\n    end,\n}\n",
                 "p.lua:2:5: error: place: layer 3, slot 17: expert 300 out of 0..15\n"
                 "     2 |     place = function(model, cluster)\n       |     ^\n");
}

Test(policy, every_layer_with_a_fault_is_reported) {
    expect_error("return {replicate = function(m) local c = {}\n"
                 "for _, l in ipairs(m.moe_layers) do c[l] = {} end return c end}",
                 "replicate: layer 5: 0 entries for 16 experts");
    cr_expect_eq(diags.errors, 3);
}

/* ---- what the hooks get and give ---- */

Test(policy, a_policy_sees_the_model_the_cluster_and_the_loads) {
    struct deployment *dep =
        small("return {place = function(model, cluster, loads, counts)\n"
              "    assert(model.name == 'small' and model.num_experts == 16)\n"
              "    assert(model.num_experts_per_tok == 2 and #model.moe_layers == 3)\n"
              "    assert(model.router.method == 'softmax_topk' and model.weights == 'bf16')\n"
              "    assert(cluster.ranks == 4 and cluster.slots_per_rank == 6)\n"
              "    assert(cluster.num_slots == 24 and cluster.memory_gb == nil)\n"
              "    assert(#loads.workloads == 2 and loads.workloads[2].name == 'b')\n"
              "    assert(loads.workloads[1].weight == 1)\n"
              "    assert(loads.workloads[1].load[1][1] == 100000)\n"
              "    local layers, sum = {}, 0\n"
              "    for layer, load in pairs(loads) do\n"
              "        layers[#layers + 1] = layer\n"
              "        assert(#load == 16)\n"
              "    end\n"
              "    assert(table.concat(layers, ',') == '1,3,5')\n"
              "    for _, x in ipairs(loads[3]) do sum = sum + x end\n"
              "    assert(math.abs(sum - 2) < 1e-12) -- two workloads, each normalised\n"
              "    local p = {}\n"
              "    for layer, c in pairs(counts) do\n"
              "        local n = 0\n"
              "        for _, x in ipairs(c) do n = n + x end\n"
              "        assert(n == 24)\n"
              "        p[layer] = moe.place(loads[layer], c, 4, 6)\n"
              "    end\n"
              "    return p\n"
              "end}\n");
    dep->loads = loads_for(dep->model, 2);
    must_place(dep);
}

Test(policy, a_single_workload_arrives_as_it_was_recorded) {
    struct deployment *dep =
        small("return {replicate = function(model, cluster, loads)\n"
              "    assert(loads[1][1] == 100000 and loads[1] ~= loads.workloads[1].load[1])\n"
              "    local c = {}\n"
              "    for l, x in pairs(loads) do c[l] = moe.replicate(x, 24, 4) end\n"
              "    return c\n"
              "end}\n");
    dep->loads = loads_for(dep->model, 1);
    must_place(dep);
}

Test(policy, counts_of_replicate_are_kept) {
    struct deployment *dep = small("return {replicate = function(model, cluster, loads)\n"
                                   "    local c = {}\n"
                                   "    for l in pairs(loads) do\n"
                                   "        c[l] = {}\n"
                                   "        for e = 1, 16 do c[l][e] = e <= 4 and 3 or 1 end\n"
                                   "    end\n"
                                   "    return c\n"
                                   "end}\n");
    dep->loads = loads_for(dep->model, 2);
    struct placement *p = must_place(dep);
    for (int i = 0; i < 3; i++) {
        int count[16] = {0};
        for (int s = 0; s < 24; s++) {
            int e = p->expert_of_slot[i * 24 + s];
            count[e]++;
            for (int o = s / 6 * 6; o < s; o++)
                cr_expect_neq(p->expert_of_slot[i * 24 + o], e, "twice on rank %d", s / 6);
        }
        for (int e = 0; e < 16; e++)
            cr_expect_eq(count[e], e < 4 ? 3 : 1);
    }
}

Test(policy, counts_and_constraints_go_together) {
    struct deployment *dep =
        small("return {\n"
              "    replicate = function(model, cluster, loads)\n"
              "        local c = {}\n"
              "        for l, x in pairs(loads) do c[l] = moe.replicate(x, 24, 4) end\n"
              "        return c\n"
              "    end,\n"
              "    constraints = function(model, cluster)\n"
              "        local f = {}\n"
              "        for e = 8, 11 do\n"
              "            for r = 0, 2 do f[#f + 1] = {expert = e, rank = r} end\n"
              "        end\n"
              "        return {pins = {{slot = 5, expert = 15}, {slot = 7, expert = 14}},\n"
              "                forbidden = f}\n"
              "    end,\n"
              "}\n");
    dep->loads = loads_for(dep->model, 1);
    for (int i = 0; i < 48; i++) /* 8 to 11 are cold, so that each has one replica */
        dep->loads->workloads[0].count[i] = i % 16 / 4 == 2 ? 1 : 100 + i % 16;
    struct placement *p = must_place(dep);
    for (int i = 0; i < 3; i++) {
        cr_expect(p->expert_of_slot[24 * i + 5] == 15 && p->expert_of_slot[24 * i + 7] == 14);
        for (int s = 0; s < 24; s++)
            cr_expect(p->expert_of_slot[24 * i + s] / 4 != 2 || s >= 18, "slot %d", s);
    }
}

/* The best of all placements of 6 experts with given counts on 3 ranks of 3 slots. */
static double best_counted(const double *load, const int *count, int e, double *rank,
                           int *room) {
    double best = HUGE_VAL;
    if (e == 6)
        return fmax(rank[0], fmax(rank[1], rank[2]));
    for (int mask = 1; mask < 8; mask++) {
        bool fits = __builtin_popcount((unsigned)mask) == count[e];
        for (int r = 0; r < 3; r++)
            fits = fits && (!(mask >> r & 1) || room[r] > 0);
        if (!fits)
            continue;
        for (int sign = 1; sign >= -1; sign -= 2) {
            for (int r = 0; r < 3; r++)
                if (mask >> r & 1) {
                    rank[r] += sign * load[e] / count[e];
                    room[r] -= sign;
                }
            if (sign > 0)
                best = fmin(best, best_counted(load, count, e + 1, rank, room));
        }
    }
    return best;
}

Test(policy, given_counts_are_placed_close_to_the_best_there_is) {
    double worst = 0, mean = 0;
    uint64_t state = 5;
    for (int i = 0; i < 300; i++) {
        double load[6], rank[3] = {0}, max = 0;
        int count[6] = {1, 1, 1, 1, 1, 1}, room[3] = {3, 3, 3}, slots[9];
        for (int e = 0; e < 6; e++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            load[e] = (double)(1 + (state >> 33) % 100);
        }
        place_counts(6, 9, 3, load, count);
        struct balance_problem p = {.experts = 6, .ranks = 3, .slots_per_rank = 3};
        place_counted(&p, load, count, slots);
        double best = best_counted(load, count, 0, rank, room);
        memset(rank, 0, sizeof rank);
        for (int s = 0; s < 9; s++)
            rank[s / 3] += load[slots[s]] / count[slots[s]];
        for (int r = 0; r < 3; r++)
            max = fmax(max, rank[r]);
        cr_assert_geq(max, best - 1e-9);
        worst = fmax(worst, max / best);
        mean += max / best / 300;
    }
    cr_expect(mean < 1.03 && worst < 1.35, "mean %.4f, worst %.4f", mean, worst);
}

/* Lua walks a table in an order that differs from run to run. */
Test(policy, the_first_fault_is_the_same_in_every_run) {
    for (int i = 0; i < 8; i++) {
        struct diags d = {.arena = &arena};
        struct deployment *dep =
            small("return {constraints = function() return {f = 1, b = 2, [9] = 3, e = 4,\n"
                  "    [4] = 5, c = 6, a = 7, d = 8} end}\n");
        cr_assert_null(place_layers(&arena, &d, dep, 1));
        cr_assert_str_eq(d.first->text, "constraints: unknown key 4");
        dep = small("return {f = 1, b = 2, e = 4, c = 6, a = 7, d = 8}\n");
        struct diags e = {.arena = &arena};
        cr_assert_null(place_layers(&arena, &e, dep, 1));
        cr_assert_eq(strncmp(e.first->text, "a policy has no field 'a'", 25), 0);
        cr_assert_eq(strncmp(e.first->next->text, "a policy has no field 'b'", 25), 0);
    }
}

Test(policy, what_is_listed_twice_is_kept_once) {
    struct deployment *dep =
        small("return {constraints = function(model, cluster)\n"
              "    local p, f = {}, {}\n"
              "    for i = 1, 1000 do\n"
              "        p[i] = {slot = 6, expert = 3}\n"
              "        f[i] = {expert = 2, rank = 1, layer = i % 3 * 2 + 1}\n"
              "    end\n"
              "    return {pins = p, forbidden = f}\n"
              "end}\n");
    struct placement *p = must_place(dep);
    cr_assert_eq(p->constraints->num_pins, 3);
    cr_assert_eq(p->constraints->num_forbidden, 3);
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(p->expert_of_slot[24 * i + 6], 3);
        for (int s = 6; s < 12; s++)
            cr_expect_neq(p->expert_of_slot[24 * i + s], 2);
    }
}

Test(policy, replicate_needs_no_limit) {
    must_place(small("local c = moe.replicate({9, 1, 1}, 6)\n"
                     "assert(table.concat(c, ' ') == '4 1 1')\n"
                     "c = moe.replicate({9, 1, 1}, 6, 3)\n"
                     "assert(table.concat(c, ' ') == '3 2 1')\n"
                     "return {}\n"));
}

Test(policy, shares_are_taken_as_given) {
    struct deployment *dep =
        small("return {\n"
              "    place = function(model, cluster)\n"
              "        local p = {}\n"
              "        for _, l in ipairs(model.moe_layers) do\n"
              "            p[l] = {}\n"
              "            for i = 0, 23 do p[l][i + 1] = i % 16 end\n"
              "        end\n"
              "        return p\n"
              "    end,\n"
              "    share = function(model, cluster, loads, placement)\n"
              "        local s = {}\n"
              "        for l, slots in pairs(placement) do\n"
              "            s[l] = {}\n"
              "            for i, e in ipairs(slots) do\n"
              "                s[l][i] = e >= 8 and 1 or i <= 8 and 0.75 or 0.25\n"
              "            end\n"
              "        end\n"
              "        return s\n"
              "    end,\n"
              "}\n");
    struct placement *p = must_place(dep);
    for (int i = 0; i < 24; i++)
        cr_expect_eq(p->share_of_slot[24 + i], i < 8 ? 0.75 : i < 16 ? 1 : 0.25);
}

Test(policy, constraints_arrive) {
    struct deployment *dep = small("return {constraints = function(model, cluster)\n"
                                   "    return {\n"
                                   "        pins = {{layer = 3, slot = 17, expert = 5},\n"
                                   "                {slot = 0, expert = 15}},\n"
                                   "        forbidden = {{layer = 5, expert = 2, rank = 1}},\n"
                                   "        workload_weights = {b = 3},\n"
                                   "        move_budget = 4,\n"
                                   "    }\n"
                                   "end}\n");
    dep->loads = loads_for(dep->model, 2);
    struct placement *p = must_place(dep);
    struct constraints *c = p->constraints;
    cr_assert(c && c->num_pins == 4 && c->num_forbidden == 1 && c->workload_weights);
    cr_expect(c->pins[0].layer == 3 && c->pins[0].slot == 17 && c->pins[0].expert == 5);
    for (int i = 0; i < 3; i++) {
        cr_expect(c->pins[1 + i].layer == 2 * i + 1 && c->pins[1 + i].slot == 0);
        cr_expect_eq(p->expert_of_slot[24 * i], 15);
    }
    cr_expect_eq(p->expert_of_slot[24 + 17], 5);
    cr_expect(c->forbidden[0].layer == 5 && c->forbidden[0].expert == 2 &&
              c->forbidden[0].rank == 1);
    for (int s = 6; s < 12; s++)
        cr_expect_neq(p->expert_of_slot[48 + s], 2);
    cr_expect(c->workload_weights[0] == 1 && c->workload_weights[1] == 3);
    cr_expect_eq(c->move_budget, 4);
}

Test(policy, weights_may_be_a_list_and_decide) {
    struct deployment *dep = small("return {constraints = function()\n"
                                   "    return {workload_weights = {0, 1}} end}\n");
    dep->loads = loads_for(dep->model, 2);
    struct placement *p = must_place(dep);
    cr_expect_eq(p->constraints->move_budget, -1);
    dep = small(NULL);
    dep->loads = loads_for(dep->model, 2);
    dep->loads->workloads[0].weight = 0;
    expect_same(p, must_place(dep));
}

Test(policy, exchange_and_variant_are_asked_by_size) {
    struct deployment *dep =
        small("return {\n"
              "    exchange = function(model, cluster, tokens)\n"
              "        return tokens < 100 and 'allgather' or 'alltoall'\n"
              "    end,\n"
              "    variant = function(model, cluster, regime)\n"
              "        if regime.target == 'host' and regime.tokens == 64 then\n"
              "            return {router = 0}\n"
              "        end\n"
              "        return {}\n"
              "    end,\n"
              "}\n");
    struct policy_world w = {dep->model, dep->cluster, NULL, 6, 24};
    struct policy *p =
        policy_open(&arena, &diags, dep->policy, dep->policy_path, (struct loc){0});
    cr_assert(p, "%s", printed());
    cr_expect(p->defines[HOOK_exchange] && p->defines[HOOK_variant] && !p->defines[HOOK_place]);
    int few = policy_exchange(p, &arena, &diags, &w, 10);
    int many = policy_exchange(p, &arena, &diags, &w, 1000);
    cr_expect_str_eq(exchange_names[few], "allgather");
    cr_expect_str_eq(exchange_names[many], "alltoall");
    struct variant_choice v = {1, 2, 2, 3, 3};
    cr_expect(policy_variant(p, &arena, &diags, &w, MOE_TARGET_HOST, 64, &v));
    cr_expect(v.router == 0 && v.gemm1 == 2 && v.gemm2 == 2 && v.shared1 == 3);
    v.router = 1;
    cr_expect(policy_variant(p, &arena, &diags, &w, MOE_TARGET_HOST, 128, &v));
    cr_expect_eq(v.router, 1);
}

/* ---- what is left out, and what is shipped ---- */

Test(policy, what_is_left_out_is_built_in) {
    struct deployment *dep = small("return {name = 'empty'}");
    dep->loads = loads_for(dep->model, 2);
    struct placement *p = must_place(dep);
    dep = small(NULL);
    dep->loads = loads_for(dep->model, 2);
    expect_same(p, must_place(dep));
}

Test(policy, trtllm_places_as_upstream) {
    struct deployment *dep = small(NULL);
    dep->policy = "trtllm";
    dep->loads = loads_for(dep->model, 1);
    struct placement *p = must_place(dep);
    for (int i = 0; i < 3; i++) {
        float load[16];
        int count[16], slots[24];
        for (int e = 0; e < 16; e++)
            load[e] = (float)dep->loads->workloads[0].count[i * 16 + e];
        balance_trtllm_replicate(16, 24, load, count);
        balance_trtllm_place(16, 4, 6, load, count, slots);
        cr_expect_arr_eq(p->expert_of_slot + 24 * i, slots, sizeof slots);
    }
}

Test(policy, trtllm_without_loads_is_upstreams_default) {
    struct deployment *dep = small(NULL);
    int slots[24];
    dep->policy = "trtllm";
    struct placement *p = must_place(dep);
    balance_trtllm_default(16, 4, 6, slots);
    for (int i = 0; i < 3; i++)
        cr_expect_arr_eq(p->expert_of_slot + 24 * i, slots, sizeof slots);
}

Test(policy, deepseek_places_as_upstream) {
    struct deployment *dep = small(NULL);
    dep->policy = "deepseek";
    dep->model->router.n_group = 4;
    dep->cluster->ranks_per_node = 2;
    dep->loads = loads_for(dep->model, 1);
    struct placement *p = must_place(dep);
    int slots[24];
    for (int i = 0; i < 3; i++) {
        balance_deepseek(16, 24, 4, 2, 4, dep->loads->workloads[0].count + 16 * i, slots);
        cr_expect_arr_eq(p->expert_of_slot + 24 * i, slots, sizeof slots);
    }
}

Test(policy, even_and_no_loads_keep_experts_in_order) {
    struct deployment *dep = small(NULL);
    dep->policy = "even";
    struct placement *p = must_place(dep);
    for (int s = 0; s < 24; s++)
        cr_expect_eq(p->expert_of_slot[s], s % 16);
    dep->policy = "robust";
    dep->num_slots = 0;
    dep->cluster->ranks = 5; /* 4 slots a rank, the last of all but the first rank empty */
    p = must_place(dep);
    for (int s = 0; s < 20; s++)
        cr_expect_eq(p->expert_of_slot[s], s < 4 ? s : s % 4 == 3 ? -1 : s - s / 4 + 1);
}

Test(policy, given_layers_stay_as_they_are) {
    struct deployment *dep = small(NULL);
    struct assignment given = {.layer = 3, .expert_of_slot = arena_array(&arena, int, 24)};
    for (int s = 0; s < 24; s++)
        given.expert_of_slot[s] = (s * 5) % 16;
    dep->loads = loads_for(dep->model, 1);
    dep->assignments = &given;
    dep->num_assignments = 1;
    struct placement *p = must_place(dep);
    cr_expect_arr_eq(p->expert_of_slot + 24, given.expert_of_slot, 24 * sizeof(int));
}

Test(policy, shipped_policies_and_the_template_pass_their_check) {
    static char out[1 << 20];
    static const char *const names[] = {"robust", "even", "trtllm", "deepseek"};
    char here[PATH_MAX];
    cr_assert(getcwd(here, sizeof here));
    for (int i = 0; i < 5; i++) {
        const char *file = i < 4 ? names[i] : arena_printf(&arena, "%s/lua/template.lua", here);
        cr_expect_eq(
            run_moec(out, sizeof out,
                     "policy check %s --model %s/plans/models/deepseek-v3.yaml --ep 32", file,
                     here),
            0, "%s: %.1500s", file, out);
        cr_expect(strstr(out, "59 layers of 256 experts, 288 slots on 32 ranks: imbalance "),
                  "%s", out);
    }
}

/* Every block of Lua in the tutorial that returns a policy is one. */
Test(policy, the_tutorials_policies_pass_their_check) {
    static char out[1 << 20];
    char *text;
    size_t len;
    int n = 0;
    cr_assert_eq(file_read(&arena, "lua/README.md", 1 << 20, &text, &len), 0);
    for (char *at = text; (at = strstr(at, "```lua\n")); n++) {
        char *end = strstr(at += 7, "```");
        cr_assert(end);
        const char *path =
            file_of("tutorial.lua", arena_printf(&arena, "%.*s", (int)(end - at), at));
        cr_expect_eq(run_moec(out, sizeof out, "policy check %s", path), 0, "%.1500s", out);
        at = end + 3;
    }
    cr_expect_geq(n, 3);
}

Test(policy, the_tutorial_knows_every_function_and_hook) {
    static char out[1 << 20];
    char *text;
    size_t len;
    cr_assert_eq(file_read(&arena, "lua/README.md", 1 << 20, &text, &len), 0);
    for (int h = 0; h < NUM_HOOKS; h++)
        cr_expect(strstr(text, arena_printf(&arena, "`%s(", hook_names[h])), "%s",
                  hook_names[h]);
    const char *path = file_of("names.lua", "for name in pairs(moe) do print(name) end\n"
                                            "for name in pairs(math) do print(name) end\n"
                                            "return {}\n");
    cr_assert_eq(run_moec(out, sizeof out, "policy check %s", path), 0, "%s", out);
    int n = 0;
    for (char *at = out; (at = strstr(at, "note: ")); n++) {
        at += 6;
        char *name = arena_printf(&arena, "%.*s", (int)strcspn(at, "\n"), at);
        cr_expect(strstr(text, name), "%s", name);
    }
    cr_expect_gt(n, 20);
}

/* ---- the whole ---- */

Test(policy, threads_change_nothing) {
    struct deployment *dep = small(NULL);
    dep->loads = loads_for(dep->model, 2);
    struct placement *one = place_layers(&arena, &diags, dep, 1);
    expect_same(one, place_layers(&arena, &diags, dep, 3));
}

Test(policy, a_hook_beside_online_balancing_is_warned_about) {
    struct deployment *dep =
        small("return {constraints = function() return {} end,\n"
              "share = nil, replicate = function(m, c, l) local r = {}\n"
              "for k, x in pairs(l) do r[k] = moe.replicate(x, 24, 4) end\n"
              "return r end}\n");
    dep->layer_updates_per_iter = 2;
    must_place(dep);
    cr_expect(strstr(printed(), "warning: policy "), "%s", printed());
    cr_expect(strstr(printed(), ": replicate shapes the first plan only"), "%s", printed());
    cr_expect_not(strstr(printed(), ": constraints shapes"), "%s", printed());
}

static double seconds_to_place(const char *model, int experts, int layers, int ranks,
                               int slots) {
    struct deployment *dep = small(NULL);
    dep->model = model_read(&arena, &diags, model);
    cr_assert(dep->model, "%s", printed());
    if (experts) {
        dep->model->num_experts = experts;
        dep->model->num_moe_layers = layers;
        dep->model->moe_layers = arena_array(&arena, int, layers);
        for (int i = 0; i < layers; i++)
            dep->model->moe_layers[i] = i;
    }
    dep->cluster->ranks = ranks;
    dep->num_slots = slots;
    dep->loads = loads_for(dep->model, 1);
    double start = cpu_seconds();
    must_place(dep);
    return cpu_seconds() - start;
}

Test(policy, robust_takes_less_than_a_second) {
#ifdef __SANITIZE_ADDRESS__
    cr_skip_test("timings are not the sanitizers' business");
#endif
    double v3 = seconds_to_place("plans/models/deepseek-v3.yaml", 0, 0, 32, 288);
    double large = seconds_to_place("plans/models/deepseek-v3.yaml", 512, 92, 72, 576);
    cr_expect(v3 < 1 && large < 1, "%.3f s and %.3f s of processor time", v3, large);
}

Test(policy, check_says_what_is_defined_and_what_fails_as_json) {
    static char out[1 << 20];
    const char *path = file_of("p.lua", "return {name = 'half', place = function() end}");
    cr_expect_eq(run_moec(out, sizeof out, "policy check %s --json 2>/dev/null", path), 1);
    struct node *n = yaml_parse(&arena, &diags, "out", out, strlen(out));
    cr_assert(n, "%s", out);
    cr_expect_str_eq(map_get(n, "policy")->text, "half");
    cr_expect_str_eq(map_get(n, "defines")->items[0]->text, "place");
    cr_expect_eq(map_get(n, "built_in")->count, 5);
    cr_expect_str_eq(map_get(map_get(n, "runs")->items[0], "ok")->text, "false");
    struct node *fault = map_get(n, "faults")->items[0];
    cr_expect_str_eq(map_get(fault, "line")->text, "1");
    cr_expect_str_eq(map_get(fault, "text")->text, "place: it returned nothing");
    path = file_of("bytes.lua", "error('\\xff\\xc3\\xa4\\xed\\xa0\\x80\\1\"', 0)");
    cr_expect_eq(run_moec(out, sizeof out, "policy check %s --json 2>/dev/null", path), 1);
    cr_expect(strstr(out, "\"text\": \"\\ufffd\xc3\xa4\\ufffd\\ufffd\\ufffd\\u0001\\\"\""),
              "%s", out);
    cr_expect(yaml_parse(&arena, &diags, "out", out, strlen(out)), "%s", printed());
    cr_expect_eq(run_moec(out, sizeof out, "policy check robust --json"), 0);
    cr_expect_eq(run_moec(out, sizeof out, "policy check"), 2);
    cr_expect_eq(run_moec(out, sizeof out, "policy chekc robust"), 2);
    cr_expect_eq(run_moec(out, sizeof out, "policy check robust --ep 8"), 2);
}
