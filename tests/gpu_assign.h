/* The kernels of templates/assign.cuh on a GPU: right, the same in every run, and how long they take.
 * DeepSeek-V3's layer: 256 experts, 288 slots on 32 ranks, 4096 tokens x 8 on each. */
#ifndef GPU_ASSIGN_H
#define GPU_ASSIGN_H

#include "assign_checks.h"

enum { TALLY, FACTOR, SPLIT, TURNS, SHARES, PARTS, ASSIGN_KERNEL_COUNT };
enum { ASSIGN_REPEATS = 50, ASSIGN_RUNS = 100, ASSIGN_NONE = 288 };
static const char *const assign_expressions[] = {
#define X(name) #name,
    ASSIGN_KERNELS(X)
#undef X
};

/* A file of build/gpu: the kernel's symbol, a newline, its cubin. */
static void assign_path(char *out, size_t size, const char *target, int kernel) {
    char name[64];
    snprintf(name, sizeof name, "assign.%s.%d", target, kernel);
    path_of(out, size, name);
}

static bool build_assign_for(struct arena *a, struct diags *d, const char *target) {
    struct compile_job jobs[ASSIGN_KERNEL_COUNT];
    struct buf source;
    int number = -1;
    for (int t = 0; t < MOE_TARGET_COUNT; t++)
        number = strcmp(target_names[t], target) ? number : t;
    if (number < 0 || !assign_source(a, 256, 8, &source))
        return false;
    for (int i = 0; i < ASSIGN_KERNEL_COUNT; i++)
        jobs[i] = (struct compile_job){.source = source.data,
                                       .source_name = "assign.cu",
                                       .expression = assign_expressions[i],
                                       .target = (enum moe_target)number};
    if (!nvrtc_compile(a, d, jobs, ASSIGN_KERNEL_COUNT, 2, NULL, NULL))
        return false;
    for (int i = 0; i < ASSIGN_KERNEL_COUNT; i++) {
        struct buf file = {.arena = a};
        char path[600];
        assign_path(path, sizeof path, target, i);
        buf_printf(&file, "%s\n", jobs[i].symbol);
        buf_add(&file, jobs[i].cubin, jobs[i].cubin_len);
        if (file_write(path, file.data, file.len))
            return false;
    }
    return true;
}

/* targets: a list with commas. */
static bool build_assign(const char *targets) {
    struct arena a = {0};
    struct diags d = {.arena = &a};
    char list[256], *save;
    bool ok = true;
    snprintf(list, sizeof list, "%s", targets);
    for (char *t = strtok_r(list, ",", &save); ok && t; t = strtok_r(NULL, ",", &save))
        ok = build_assign_for(&a, &d, t);
    diag_print(&d, stderr);
    arena_free(&a);
    return ok;
}

struct assign_bench {
    struct env e;
    struct driver driver;
    struct assign_trial t;
    struct moe_args args;
    struct moe_assign assign;
    void *function[ASSIGN_KERNEL_COUNT];
    int entries, blocks, rank;
    const int *sequence; /* kernels, -1 ends it */
    int32_t *target, *ends, *total;
};

static bool load_kernels(struct assign_bench *b) {
    struct moert_tool_device device;
    moert_tool_device(b->e.context, &device);
    for (int i = 0; i < ASSIGN_KERNEL_COUNT; i++) {
        struct arena a = {0};
        char path[600], *text, *line;
        size_t len;
        void *module;
        assign_path(path, sizeof path, target_names[device.target], i);
        bool ok =
            !file_read(&a, path, 16 << 20, &text, &len) && (line = memchr(text, '\n', len));
        if (ok) {
            *line++ = 0;
            char *cubin = arena_alloc(&a, len);
            memcpy(cubin, line, len - (size_t)(line - text));
            ok = !b->driver.load(&module, cubin) &&
                 !b->driver.function(&b->function[i], module, text);
        }
        arena_free(&a);
        if (!ok)
            return why(&b->e, "%s cannot be loaded", path);
    }
    return true;
}

static bool to_device(struct assign_bench *b, const void *data, size_t bytes,
                      const void *where) {
    void *p;
    if (!good(&b->e, moert_tool_alloc(b->e.context, bytes, &p), "memory") ||
        !good(&b->e,
              data ? moert_tool_upload(b->e.context, p, data, bytes)
                   : moert_tool_set(b->e.context, p, 0, bytes),
              "upload"))
        return false;
    memcpy((void *)where, &p, sizeof p);
    return true;
}

static bool fill_device(struct assign_bench *b) {
    const struct assign_trial *t = &b->t;
    struct moe_assign *s = &b->assign;
    size_t E = (size_t)t->experts, F = (size_t)t->tables.filled, n = (size_t)b->entries;
    *s = (struct moe_assign){.rows = t->tables.rows,
                             .rank = b->rank,
                             .ranks = t->ranks,
                             .slots = t->tables.filled,
                             .offset = b->rank,
                             .equal_ranks = 1,
                             .decay = 0.9f,
                             .none = ASSIGN_NONE};
    b->args.num_tokens = t->tokens;
    b->args.params.slots = t->slots;
    return to_device(b, t->ids + (size_t)b->rank * n, 4 * n, &b->args.topk_idx) &&
           to_device(b, t->tables.first_slot, 4 * (E + 1), &s->first_slot) &&
           to_device(b, t->tables.slot_list, 4 * F, &s->slot_list) &&
           to_device(b, t->tables.share_end, 4 * F, &s->share_end) &&
           to_device(b, t->tables.pairs,
                     (size_t)t->tables.rows * MOE_ASSIGN_LANES * sizeof *t->tables.pairs,
                     &s->pairs) &&
           to_device(b, t->counts, 4 * E * (size_t)t->ranks, &s->counts) &&
           to_device(b, NULL, 4 * n, &s->target) &&
           to_device(b, NULL, 4 * E * (size_t)b->blocks, &s->part_counts) &&
           to_device(b, NULL, 4 * E, &s->sums) && to_device(b, NULL, 4 * E, &s->total) &&
           to_device(b, NULL, 4 * E, &s->begin) && to_device(b, NULL, 4 * F, &s->ends) &&
           to_device(b, NULL, 4 * E, &s->factor) && to_device(b, NULL, 4, &s->done) &&
           to_device(b, s, sizeof *s, &b->args.fill);
}

static bool open_bench(struct assign_bench *b) {
    double load[256], batch[256];
    for (int e = 0; e < 256; e++) {
        load[e] = pow(1 + (e * 37 + 11) % 256, -0.6);
        batch[e] = load[e] * (0.5 + assign_roll());
    }
    b->t = (struct assign_trial){256, 32, 9, 4096, 8};
    b->entries = b->t.tokens * b->t.topk;
    b->blocks = (b->entries + MOE_ASSIGN_PART - 1) / MOE_ASSIGN_PART;
    b->rank = 5;
    b->target = malloc(4 * (size_t)b->entries);
    b->ends = malloc(4 * 288);
    b->total = malloc(4 * 256);
    return open_named(&b->e, "softmax", -1) && load_driver(&b->e, &b->driver) &&
           load_kernels(b) &&
           (assign_open(&b->t, load, batch, NULL, 5) || why(&b->e, "no placement")) &&
           fill_device(b);
}

static int launch_assign(struct assign_bench *b, int kernel, moert_stream s) {
    const unsigned E = 256, F = 288, R = 32;
    const struct {
        unsigned grid, block, smem;
    } shape[ASSIGN_KERNEL_COUNT] = {
        [TALLY] = {(unsigned)b->blocks, 256, 4 * (E + 1)},
        [FACTOR] = {(E + 255) / 256, 256, 0},
        [SPLIT] = {1, 1024, 4 * (2 * E + 3 * F + R)},
        [TURNS] = {(unsigned)b->blocks, MOE_ASSIGN_PART, 36 * E},
        [SHARES] = {(unsigned)b->blocks, MOE_ASSIGN_PART, 36 * E},
        [PARTS] = {(unsigned)b->blocks, MOE_ASSIGN_PART, 36 * E},
    };
    void *args[] = {&b->args};
    return b->driver.launch(b->function[kernel], shape[kernel].grid, 1, 1, shape[kernel].block,
                            1, 1, shape[kernel].smem, s, args, NULL);
}

static moert_result call_assign(void *user, moert_stream s) {
    struct assign_bench *b = user;
    for (int i = 0; i < ASSIGN_REPEATS; i++)
        for (const int *k = b->sequence; *k >= 0; k++)
            if (launch_assign(b, *k, s))
                return MOERT_CUDA;
    return MOERT_OK;
}

/* Median microseconds of one pass through the sequence, from a graph of many. */
static bool time_assign(struct assign_bench *b, const int *sequence, double *us) {
    b->sequence = sequence;
    bool ok = time_replays(&b->e, call_assign, b, us);
    if (ok)
        *us /= ASSIGN_REPEATS;
    return ok;
}

static bool run_once(struct assign_bench *b, const int *sequence) {
    for (const int *k = sequence; *k >= 0; k++)
        if (launch_assign(b, *k, NULL))
            return why(&b->e, "%s cannot be launched", assign_expressions[*k]);
    return good(&b->e, moert_tool_sync(b->e.context, NULL), "sync") &&
           good(&b->e,
                moert_tool_download(b->e.context, b->target, b->assign.target,
                                    4 * (size_t)b->entries),
                "download") &&
           good(&b->e, moert_tool_download(b->e.context, b->ends, b->assign.ends, 4 * 288),
                "ends") &&
           good(&b->e, moert_tool_download(b->e.context, b->total, b->assign.total, 4 * 256),
                "total");
}

/* After the first launch, from zeros: what all ranks counted. */
static bool check_factor(struct assign_bench *b) {
    float factor[256];
    if (moert_tool_download(b->e.context, factor, b->assign.factor, sizeof factor) != MOERT_OK)
        return ASSIGN_NO(&b->t, "factors cannot be read");
    for (int e = 0; e < 256; e++) {
        int sum = 0;
        for (int r = 0; r < b->t.ranks; r++)
            sum += b->t.counts[r * 256 + e];
        if (factor[e] != (float)sum)
            return ASSIGN_NO(&b->t, "expert %d: factor %g, not %d", e, factor[e], sum);
    }
    return true;
}

static bool check_result(struct assign_bench *b, const int *sequence, double *figure) {
    struct assign_trial *t = &b->t;
    bool ok = true;
    for (const int *k = sequence; ok && *k >= 0; k++) {
        if (*k == TALLY)
            ok = !memcmp(b->total, t->counts + b->rank * 256, 4 * 256) ||
                 ASSIGN_NO(t, "entries are counted wrong");
        if (*k == FACTOR)
            ok = check_factor(b);
        if (*k == TURNS)
            ok = assign_check_turns(t, b->rank, b->rank, ASSIGN_NONE, b->target);
        if (*k == SHARES)
            ok = assign_check_shares(t, b->rank, ASSIGN_NONE, b->target, figure);
        if (*k == SPLIT)
            ok = assign_check_split(t, b->ends, 5e-3, figure);
        if (*k == PARTS)
            ok = assign_check_parts(t, b->rank, ASSIGN_NONE, b->ends, b->target);
    }
    return ok || why(&b->e, "%s", t->why);
}

/* The same bits in every run. */
static bool check_runs(struct assign_bench *b, const int *sequence) {
    int32_t *first = malloc(4 * (size_t)b->entries);
    bool ok = run_once(b, sequence);
    memcpy(first, b->target, 4 * (size_t)b->entries);
    for (int i = 0; ok && i < ASSIGN_RUNS; i++)
        ok = run_once(b, sequence) && (!memcmp(first, b->target, 4 * (size_t)b->entries) ||
                                       why(&b->e, "run %d differs", i));
    free(first);
    return ok;
}

static void run_assign(void) {
    static const struct {
        const char *name;
        double most; /* microseconds; 0: only told */
        int kernels[4];
    } rows[] = {
        {"roundrobin", 5, {TURNS, -1}},
        {"share", 0, {TALLY, SHARES, -1}},
        {"balanced", 15, {TALLY, SPLIT, PARTS, -1}},
        {"of which counting", 0, {TALLY, -1}},
        {"of which the split", 0, {SPLIT, -1}},
        {"of which the entries", 0, {PARTS, -1}},
        {"decayed factors", 0, {FACTOR, -1}},
    };
    static struct assign_bench b;
    bool open = open_bench(&b);
    if (!open)
        verdict(false, "assign", b.e.why);
    for (size_t i = 0; open && i < sizeof rows / sizeof *rows; i++) {
        double us = 0, figure = 0;
        char title[200];
        bool ok = run_once(&b, rows[2].kernels) && run_once(&b, rows[i].kernels) &&
                  check_result(&b, rows[i].kernels, &figure) &&
                  check_runs(&b, rows[i].kernels) && time_assign(&b, rows[i].kernels, &us) &&
                  (!rows[i].most || us <= rows[i].most ||
                   why(&b.e, "%.2f us, at most %.0f", us, rows[i].most));
        snprintf(title, sizeof title, "assign, %s: %.2f us (%g)", rows[i].name, us, figure);
        verdict(ok, title, b.e.why);
    }
    free(b.target);
    free(b.ends);
    free(b.total);
    assign_close(&b.t);
    env_close(&b.e);
}

#endif
