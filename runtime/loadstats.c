/* Counts, factors, recordings. */
#include "loadstats.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

void rt_load_count(const int32_t *ids, int64_t n, int experts, int32_t *count) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= 0 && ids[i] < experts)
            count[ids[i]]++;
}

void rt_load_decay(float *factor, const int32_t *count, int experts, float decay) {
    for (int e = 0; e < experts; e++)
        factor[e] = fmaf(factor[e], decay, (float)count[e]);
}

/* ---- recordings ---- */

enum { NAME = 40 }; /* bytes of a tensor's name */
static const size_t MOST = (size_t)8 << 30, MOST_TENSORS = (size_t)1 << 24;

struct rt_recorder {
    struct rt_recording what;
    char path[PATH_MAX - 64];
    int *layers;
    int64_t *count;      /* [stop - start][num_layers][E] */
    int64_t first, next; /* iterations that are there: [first, next) */
    bool written;
};

moert_result rt_recording_asked(struct rt_recording *r, int *asked) {
    const char *range = getenv("EXPERT_STATISTIC_ITER_RANGE");
    char *end;
    *asked = range && *range;
    if (!*asked)
        return MOERT_OK;
    r->path = getenv("EXPERT_STATISTIC_PATH");
    if (!r->path || !*r->path)
        return rt_fail(MOERT_INVALID, "EXPERT_STATISTIC_ITER_RANGE is set, but "
                                      "EXPERT_STATISTIC_PATH names no folder");
    errno = 0;
    r->start = strtoll(range, &end, 10);
    bool ok = *range >= '0' && *range <= '9' && *end == '-' && end[1] >= '0' && end[1] <= '9';
    r->stop = ok ? strtoll(end + 1, &end, 10) : 0;
    if (ok && !*end && !errno && r->start < r->stop)
        return MOERT_OK;
    return rt_fail(
        MOERT_INVALID,
        "EXPERT_STATISTIC_ITER_RANGE: expected START-STOP, two iterations of which the "
        "second is not recorded any more, not '%.40s'",
        range);
}

static bool rank_file(const char *name, int *rank) {
    int used = 0;
    return sscanf(name, "rank%d.safetensors%n", rank, &used) == 1 && used && !name[used];
}

/* What an earlier recording left: each rank its own file, rank 0 also those of ranks that are no more
 * and what says that a recording is whole. */
static moert_result clear(const struct rt_recorder *r) {
    char path[PATH_MAX];
    int rank;
    moert_result result = MOERT_OK;
    DIR *dir = opendir(r->path);
    if (!dir)
        return rt_system("cannot read", r->path);
    for (struct dirent *e; (e = readdir(dir));) {
        bool meta = !strcmp(e->d_name, "meta_info.json");
        bool file = rank_file(e->d_name, &rank), own = file && rank == r->what.rank;
        if (!own && (r->what.rank || !(meta || (file && rank >= r->what.ranks))))
            continue;
        if (snprintf(path, sizeof path, "%s/%s", r->path, e->d_name) < (int)sizeof path &&
            unlink(path) && errno != ENOENT && result == MOERT_OK)
            result = rt_system("cannot remove", path);
    }
    closedir(dir);
    return result;
}

static moert_result make_folder(const char *path) {
    char part[PATH_MAX];
    snprintf(part, sizeof part, "%s", path);
    for (char *slash = part + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = 0;
        mkdir(part, 0777);
    }
    if (mkdir(part, 0777) && errno != EEXIST)
        return rt_system("cannot make", path);
    return MOERT_OK;
}

static moert_result fill(struct rt_recorder *r, const struct rt_recording *what) {
    size_t n = (size_t)(what->stop - what->start);
    size_t row = (size_t)what->num_layers * (size_t)what->experts;
    r->what = *what;
    r->what.path = r->path;
    if (snprintf(r->path, sizeof r->path, "%s", what->path) >= (int)sizeof r->path)
        return rt_fail(MOERT_INVALID, "%s: the path is too long", what->path);
    if (n > MOST / sizeof *r->count / row || n > MOST_TENSORS / (size_t)what->num_layers)
        return rt_fail(MOERT_INVALID,
                       "a recording of %zu iterations of %d layers is too large; record fewer",
                       n, what->num_layers);
    r->layers = malloc(sizeof *r->layers * (size_t)what->num_layers);
    r->count = calloc(n * row, sizeof *r->count);
    if (!r->layers || !r->count)
        return rt_no_memory(n * row * sizeof *r->count);
    memcpy(r->layers, what->layers, sizeof *r->layers * (size_t)what->num_layers);
    RT_TRY(make_folder(r->path));
    return clear(r);
}

static void free_recorder(struct rt_recorder *r) {
    free(r->layers);
    free(r->count);
    free(r);
}

moert_result rt_recorder_open(const struct rt_recording *what, struct rt_recorder **out) {
    *out = NULL;
    if (what->start < 0 || what->start >= what->stop || what->rank < 0 ||
        what->rank >= what->ranks || what->num_layers < 1 || what->experts < 1)
        return rt_fail(MOERT_INVALID,
                       "a recording of iterations %" PRId64 " to %" PRId64
                       ", rank %d of %d, %d layers, %d experts",
                       what->start, what->stop, what->rank, what->ranks, what->num_layers,
                       what->experts);
    struct rt_recorder *r = calloc(1, sizeof *r);
    if (!r)
        return rt_no_memory(sizeof *r);
    moert_result result = fill(r, what);
    if (result == MOERT_OK)
        *out = r;
    else
        free_recorder(r);
    return result;
}

/* ---- files ---- */

static moert_result write_meta(const struct rt_recorder *r) {
    char path[PATH_MAX], temp[PATH_MAX];
    snprintf(path, sizeof path, "%s/meta_info.json", r->path);
    snprintf(temp, sizeof temp, "%s/.meta_info.%ld", r->path, (long)getpid());
    FILE *out = fopen(temp, "w");
    if (!out)
        return rt_system("cannot write", temp);
    bool ok = fprintf(out, "{\"num_experts\": %d, \"num_experts_per_token\": %d}\n",
                      r->what.experts, r->what.topk) > 0 &&
              !fflush(out) && !fsync(fileno(out));
    if (!fclose(out) && ok && !rename(temp, path))
        return MOERT_OK;
    moert_result result = rt_system("cannot write", path);
    unlink(temp);
    return result;
}

static moert_result write_counts(const struct rt_recorder *r) {
    int L = r->what.num_layers, E = r->what.experts;
    int64_t iterations = r->next - r->first, n = iterations * L;
    struct moert_tool_tensor *t = malloc(sizeof *t * (size_t)n);
    char *names = malloc((size_t)n * NAME), path[PATH_MAX];
    moert_result result = t && names ? MOERT_OK : rt_no_memory((size_t)n * NAME);
    for (int64_t i = 0; result == MOERT_OK && i < n; i++) {
        int64_t iteration = r->first + i / L;
        char *name = names + i * NAME;
        snprintf(name, NAME, "%" PRId64 "_%d", iteration, r->layers[i % L]);
        t[i] = (struct moert_tool_tensor){.name = name,
                                          .dtype = "I64",
                                          .rank = 1,
                                          .shape = {E},
                                          .data = r->count +
                                                  ((iteration - r->what.start) * L + i % L) * E,
                                          .bytes = sizeof *r->count * (size_t)E};
    }
    snprintf(path, sizeof path, "%s/rank%d.safetensors", r->path, r->what.rank);
    if (result == MOERT_OK)
        result = moert_tool_save(path, t, (int)n);
    free(t);
    free(names);
    return result;
}

static moert_result write_files(struct rt_recorder *r) {
    r->written = true;
    RT_TRY(write_counts(r));
    return r->what.rank ? MOERT_OK : write_meta(r);
}

moert_result rt_recorder_step(struct rt_recorder *r, int64_t iteration, const int32_t *count) {
    size_t row = (size_t)r->what.num_layers * (size_t)r->what.experts;
    if (r->written || iteration < r->what.start || iteration >= r->what.stop)
        return MOERT_OK;
    if (r->next > r->first && iteration != r->next)
        return rt_fail(MOERT_INVALID,
                       "recording: iteration %" PRId64 " follows %" PRId64
                       ": none may be missing",
                       iteration, r->next - 1);
    if (r->next == r->first)
        r->first = iteration;
    r->next = iteration + 1;
    int64_t *to = r->count + (size_t)(iteration - r->what.start) * row;
    for (size_t i = 0; i < row; i++)
        to[i] = count[i];
    return r->next == r->what.stop ? write_files(r) : MOERT_OK;
}

moert_result rt_recorder_close(struct rt_recorder *r) {
    moert_result result = MOERT_OK;
    if (r && !r->written && r->next > r->first)
        result = write_files(r);
    if (r)
        free_recorder(r);
    return result;
}
