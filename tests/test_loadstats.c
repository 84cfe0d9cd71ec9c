// Counts, factors and recordings: against plain arithmetic, and read again by what reads upstream's.
#include "../compiler/loads.h"
#include "../runtime/loadstats.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct arena arena;
static struct diags diags;
static char dir[40];

static void set_up(void) {
    arena = (struct arena){0};
    diags = (struct diags){.arena = &arena};
    strcpy(dir, "/tmp/moec-loadstats-XXXXXX");
    cr_assert(mkdtemp(dir));
}
static void tear_down(void) {
    dir_remove(dir);
    arena_free(&arena);
}
TestSuite(loadstats, .init = set_up, .fini = tear_down, .timeout = 60);

enum { LAYERS = 3, MAX_E = 1000, TOPK = 2 };
static const int layers[LAYERS] = {3, 4, 60};

static const char *in_dir(const char *name) {
    return arena_printf(&arena, "%s/%s", dir, name);
}

/* Some count of an iteration, layer and expert on a rank. */
static int32_t some(int rank, int64_t iteration, int l, int e) {
    return (int32_t)((rank * 131 + iteration * 31 + l * 17 + e * 7) % 101);
}

static struct rt_recording recording(const char *path, int rank, int ranks, int experts) {
    return (struct rt_recording){.path = path,
                                 .start = 5,
                                 .stop = 9,
                                 .rank = rank,
                                 .ranks = ranks,
                                 .num_layers = LAYERS,
                                 .experts = experts,
                                 .topk = TOPK,
                                 .layers = layers};
}

/* Iterations [from, to) of one rank. */
static moert_result record(const struct rt_recording *what, int64_t from, int64_t to) {
    struct rt_recorder *r;
    int32_t *count = arena_array(&arena, int32_t, LAYERS * what->experts);
    cr_assert_eq(rt_recorder_open(what, &r), MOERT_OK, "%s", moert_last_error());
    for (int64_t i = from; i < to; i++) {
        for (int l = 0; l < LAYERS; l++)
            for (int e = 0; e < what->experts; e++)
                count[l * what->experts + e] = some(what->rank, i, l, e);
        cr_assert_eq(rt_recorder_step(r, i, count), MOERT_OK, "%s", moert_last_error());
    }
    return rt_recorder_close(r);
}

static void expect_read(const char *path, int ranks, int experts, int64_t start, int64_t stop) {
    struct loads_options o = {.window = 1};
    struct loads *l = loads_read(&arena, &diags, &path, NULL, 1, NULL, &o);
    cr_assert(l, "%s", diags.first ? diags.first->text : "");
    cr_assert(l->experts == experts && l->num_layers == LAYERS && l->experts_per_token == TOPK);
    cr_assert_eq(l->num_workloads, stop - start);
    cr_assert_eq(l->workloads[0].ranks, ranks);
    for (int w = 0; w < l->num_workloads; w++)
        for (int i = 0; i < LAYERS; i++) {
            cr_assert_eq(l->layers[i], layers[i]);
            for (int e = 0; e < experts; e++) {
                double sum = 0;
                for (int r = 0; r < ranks; r++)
                    sum += some(r, start + w, i, e);
                cr_assert_eq(l->workloads[w].count[i * experts + e], sum);
            }
        }
}

Test(loadstats, recordings_are_read_again) {
    static const int experts[] = {1, 5, 130, 1000};
    for (int k = 0; k < 4; k++)
        for (int ranks = 1; ranks <= 3; ranks += 2) {
            const char *path = in_dir(arena_printf(&arena, "a/b/%d-%d", experts[k], ranks));
            for (int r = 0; r < ranks; r++) {
                struct rt_recording what = recording(path, r, ranks, experts[k]);
                cr_assert_eq(record(&what, 0, 12), MOERT_OK);
            }
            expect_read(path, ranks, experts[k], 5, 9);
        }
}

Test(loadstats, a_recording_may_begin_late_and_end_early) {
    struct rt_recording what = recording(in_dir("late"), 0, 1, 7);
    cr_assert_eq(record(&what, 7, 12), MOERT_OK);
    expect_read(what.path, 1, 7, 7, 9);
    what.path = in_dir("early");
    cr_assert_eq(record(&what, 0, 7), MOERT_OK);
    expect_read(what.path, 1, 7, 5, 7);
    what.path = in_dir("never");
    cr_assert_eq(record(&what, 0, 5), MOERT_OK);
    cr_expect_neq(access(in_dir("never/rank0.safetensors"), F_OK), 0);
}

Test(loadstats, no_file_is_there_before_all_of_it_is) {
    struct rt_recording what = recording(in_dir("x"), 0, 1, 7);
    struct rt_recorder *r;
    int32_t count[LAYERS * 7] = {0};
    cr_assert_eq(rt_recorder_open(&what, &r), MOERT_OK);
    for (int64_t i = 5; i < 9; i++) {
        cr_expect_neq(access(in_dir("x/meta_info.json"), F_OK), 0);
        cr_expect_neq(access(in_dir("x/rank0.safetensors"), F_OK), 0);
        cr_assert_eq(rt_recorder_step(r, i, count), MOERT_OK);
    }
    cr_expect_eq(access(in_dir("x/meta_info.json"), F_OK), 0);
    cr_assert_eq(rt_recorder_close(r), MOERT_OK);
    struct stat st;
    cr_assert_eq(stat(in_dir("x/meta_info.json"), &st), 0);
}

Test(loadstats, an_earlier_recording_with_more_ranks_does_not_stay) {
    const char *path = in_dir("x");
    for (int r = 2; r >= 0; r--) {
        struct rt_recording what = recording(path, r, 3, 6);
        cr_assert_eq(record(&what, 5, 9), MOERT_OK);
    }
    struct rt_recording what = recording(path, 0, 1, 6);
    struct rt_recorder *r;
    cr_assert_eq(rt_recorder_open(&what, &r), MOERT_OK);
    cr_expect_neq(access(in_dir("x/meta_info.json"), F_OK), 0);
    cr_assert_eq(rt_recorder_close(r), MOERT_OK);
    cr_assert_eq(record(&what, 5, 9), MOERT_OK);
    expect_read(path, 1, 6, 5, 9);
}

Test(loadstats, the_environment_asks) {
    struct rt_recording r = {0};
    int asked;
    static const char *const wrong[] = {
        "5", "5-", "-5", "5-5", "9-5", "a-b", "5-9x", "5--9", " 5-9", "99999999999999999999-5"};
    unsetenv("EXPERT_STATISTIC_ITER_RANGE");
    setenv("EXPERT_STATISTIC_PATH", "/x", 1);
    cr_expect(rt_recording_asked(&r, &asked) == MOERT_OK && !asked);
    setenv("EXPERT_STATISTIC_ITER_RANGE", "100-200", 1);
    cr_expect(rt_recording_asked(&r, &asked) == MOERT_OK && asked);
    cr_expect(r.start == 100 && r.stop == 200 && !strcmp(r.path, "/x"));
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        setenv("EXPERT_STATISTIC_ITER_RANGE", wrong[i], 1);
        cr_expect_eq(rt_recording_asked(&r, &asked), MOERT_INVALID, "%s", wrong[i]);
        cr_expect(strstr(moert_last_error(), "START-STOP"), "%s", moert_last_error());
    }
    setenv("EXPERT_STATISTIC_ITER_RANGE", "1-2", 1);
    unsetenv("EXPERT_STATISTIC_PATH");
    cr_expect_eq(rt_recording_asked(&r, &asked), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "EXPERT_STATISTIC_PATH"), "%s", moert_last_error());
}

Test(loadstats, what_cannot_be_recorded_is_said) {
    struct rt_recording what = recording(in_dir("x"), 0, 1, 7);
    struct rt_recorder *r;
    int32_t count[LAYERS * 7] = {0};
    what.stop = 1LL << 40;
    cr_expect_eq(rt_recorder_open(&what, &r), MOERT_INVALID);
    cr_expect_null(r);
    what.stop = 9;
    cr_assert_eq(file_write(in_dir("file"), "", 0), 0);
    what.path = in_dir("file/x");
    cr_expect_eq(rt_recorder_open(&what, &r), MOERT_SYSTEM);
    cr_expect(strstr(moert_last_error(), "file/x"), "%s", moert_last_error());
    what.path = in_dir("x");
    cr_assert_eq(rt_recorder_open(&what, &r), MOERT_OK);
    cr_assert_eq(rt_recorder_step(r, 5, count), MOERT_OK);
    cr_expect_eq(rt_recorder_step(r, 7, count), MOERT_INVALID);
    cr_expect(strstr(moert_last_error(), "iteration 7 follows 5"), "%s", moert_last_error());
    rt_recorder_close(r);
}

Test(loadstats, ids_that_name_no_expert_are_not_counted) {
    static const int32_t ids[] = {0, 4, -1, 5, 4, INT32_MAX, INT32_MIN, 1000};
    int32_t count[5] = {1};
    rt_load_count(ids, 8, 5, count);
    cr_expect(count[0] == 2 && count[1] == 0 && count[2] == 0 && count[3] == 0 &&
              count[4] == 2);
}

Test(loadstats, a_factor_is_the_sum_of_decayed_counts) {
    float factor[MAX_E] = {0};
    double exact[MAX_E] = {0};
    int32_t count[MAX_E];
    for (int i = 0; i < 300; i++) {
        for (int e = 0; e < MAX_E; e++) {
            count[e] = some(0, i, 0, e);
            exact[e] = exact[e] * (double)RT_DECAY + count[e];
        }
        rt_load_decay(factor, count, MAX_E, RT_DECAY);
    }
    for (int e = 0; e < MAX_E; e++)
        cr_expect_float_eq(factor[e], exact[e], exact[e] * 1e-6, "expert %d: %g, not %g", e,
                           (double)factor[e], exact[e]);
}
