/* Source text to cubins: NVRTC, opened at run time, on several threads and through the cache.
 * One program per kernel, so that kernels compile side by side and are cached alone. */
#define _GNU_SOURCE 1 /* memrchr */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../runtime/tool.h"
#include "moec.h"

/* ---- the library ---- */

/* As nvrtc.h declares them; results are 0 for success, programs are opaque pointers. */
#define NVRTC_API(X) \
    X(Version, (int *major, int *minor)) \
    X(CreateProgram, (void **prog, const char *src, const char *name, int num_headers, \
                      const char *const *headers, const char *const *include_names)) \
    X(DestroyProgram, (void **prog)) \
    X(AddNameExpression, (void *prog, const char *expression)) \
    X(CompileProgram, (void *prog, int num_options, const char *const *options)) \
    X(GetProgramLogSize, (void *prog, size_t *size)) \
    X(GetProgramLog, (void *prog, char *log)) \
    X(GetLoweredName, (void *prog, const char *expression, const char **lowered)) \
    X(GetCUBINSize, (void *prog, size_t *size)) \
    X(GetCUBIN, (void *prog, char *cubin))

static struct {
    bool loaded;
#define X(name, args) int(*name) args;
    NVRTC_API(X)
#undef X
} nvrtc;

static void load(void) {
    void *lib = moert_tool_nvrtc();
    if (!lib)
        return;
    nvrtc.loaded = true;
#define X(name, args) \
    *(void **)&nvrtc.name = dlsym(lib, "nvrtc" #name); \
    nvrtc.loaded = nvrtc.loaded && nvrtc.name;
    NVRTC_API(X)
#undef X
}

bool nvrtc_version(int *major, int *minor) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    return nvrtc.loaded && !nvrtc.Version(major, minor);
}

/* ---- one kernel ---- */

static const char *const fixed_options[] = {"-std=c++17", "-default-device"};
enum { NUM_FIXED = sizeof fixed_options / sizeof *fixed_options };

/* What the threads share. Results and messages lie in the workers' arenas until all have ended. */
struct pool {
    struct compile_job *jobs;
    const char **failure; /* per job: why it failed, or NULL */
    int n, next, done;
    bool stop; /* a job failed: start no more */
    struct cache *cache;
    char toolchain[256]; /* version and options, part of every key */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
};
struct worker {
    struct pool *pool;
    struct arena arena;
    pthread_t thread;
};

static void describe_toolchain(struct pool *p) {
    int major = 0, minor = 0;
    nvrtc_version(&major, &minor);
    int n = snprintf(p->toolchain, sizeof p->toolchain, "cubin 1 nvrtc %d.%d", major, minor);
    for (int i = 0; i < NUM_FIXED; i++)
        n += snprintf(p->toolchain + n, sizeof p->toolchain - (size_t)n, " %s",
                      fixed_options[i]);
}

static void job_key(struct arena *a, const struct pool *p, const struct compile_job *j,
                    char key[65]) {
    char source[65];
    hash_hex(j->source, strlen(j->source), source);
    const char *text = arena_printf(a, "%s\n%s\n%s\n%s\n", p->toolchain,
                                    target_names[j->target], j->expression, source);
    hash_hex(text, strlen(text), key);
}

bool nvrtc_unpack(struct arena *a, char *entry, size_t len, char **label, char **symbol,
                  char **cubin, size_t *cubin_len) {
    char *end = memchr(entry, '\n', len);
    char *space = end ? memrchr(entry, ' ', (size_t)(end - entry)) : NULL;
    if (!space)
        return false;
    *label = arena_printf(a, "%.*s", (int)(space - entry), entry);
    *symbol = arena_printf(a, "%.*s", (int)(end - space - 1), space + 1);
    *cubin = end + 1;
    *cubin_len = len - (size_t)(end + 1 - entry);
    return true;
}

static bool job_cached(struct arena *a, struct pool *p, struct compile_job *j,
                       const char key[65]) {
    char *entry, *label;
    size_t len;
    return p->cache && cache_get(p->cache, a, key, &entry, &len) &&
           nvrtc_unpack(a, entry, len, &label, &j->symbol, &j->cubin, &j->cubin_len);
}

static void job_store(struct arena *a, struct pool *p, const struct compile_job *j,
                      const char key[65]) {
    struct buf b = {.arena = a};
    buf_printf(&b, "%s %s %s\n", target_names[j->target], j->expression, j->symbol);
    buf_add(&b, j->cubin, j->cubin_len);
    cache_put(p->cache, key, b.data, b.len); /* a full disk costs the next build time only */
}

static const char *program_log(struct arena *a, void *prog) {
    size_t size = 0;
    if (nvrtc.GetProgramLogSize(prog, &size) || !size)
        return "no log";
    char *log = arena_alloc(a, size + 1);
    return nvrtc.GetProgramLog(prog, log) ? "no log" : log;
}

/* NULL, or what went wrong. */
static const char *compile_program(struct arena *a, struct compile_job *j, void *prog) {
    const char *options[NUM_FIXED + 1], *lowered;
    options[0] = arena_printf(a, "--gpu-architecture=%s", target_names[j->target]);
    memcpy(options + 1, fixed_options, sizeof fixed_options);
    if (nvrtc.AddNameExpression(prog, j->expression))
        return "not a name expression";
    if (nvrtc.CompileProgram(prog, NUM_FIXED + 1, options))
        return program_log(a, prog);
    if (nvrtc.GetLoweredName(prog, j->expression, &lowered))
        return "no such kernel in the source";
    j->symbol = arena_strdup(a, lowered);
    if (nvrtc.GetCUBINSize(prog, &j->cubin_len) || !j->cubin_len)
        return "NVRTC made no cubin";
    j->cubin = arena_alloc(a, j->cubin_len);
    return nvrtc.GetCUBIN(prog, j->cubin) ? "NVRTC gave no cubin" : NULL;
}

static const char *job_compile(struct arena *a, struct compile_job *j) {
    void *prog;
    if (nvrtc.CreateProgram(&prog, j->source, j->source_name, 0, NULL, NULL))
        return "NVRTC cannot start";
    const char *why = compile_program(a, j, prog);
    nvrtc.DestroyProgram(&prog);
    return why;
}

static const char *job_run(struct arena *a, struct pool *p, struct compile_job *j) {
    char key[65];
    double start = now_seconds();
    const char *why = NULL;
    job_key(a, p, j, key);
    j->cached = job_cached(a, p, j, key);
    if (!j->cached) {
        int lock = p->cache ? cache_lock(p->cache, key) : -1;
        j->cached = job_cached(a, p, j, key); /* another process may just have made it */
        if (!j->cached)
            why = job_compile(a, j);
        if (!j->cached && !why && p->cache)
            job_store(a, p, j, key);
        if (lock >= 0)
            close(lock);
    }
    j->seconds = now_seconds() - start;
    return why;
}

/* ---- many ---- */

static void *work(void *arg) {
    struct worker *w = arg;
    struct pool *p = w->pool;
    pthread_mutex_lock(&p->mutex);
    while (p->next < p->n && !p->stop) {
        int i = p->next++;
        pthread_mutex_unlock(&p->mutex);
        const char *why = job_run(&w->arena, p, &p->jobs[i]);
        pthread_mutex_lock(&p->mutex);
        p->failure[i] = why;
        p->stop = p->stop || why;
        p->done++;
        pthread_cond_signal(&p->changed);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

/* Returns how many threads started. */
static int start(struct pool *p, struct worker *workers, int n) {
    for (int i = 0; i < n; i++) {
        workers[i].pool = p;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            return i;
    }
    return n;
}

/* Until every job that was started has ended; the last progress is n of n, failed or not, so that a
 * bar does not stay in front of the messages. */
static void wait_all(struct pool *p, void (*progress)(int, int, void *), void *user) {
    pthread_mutex_lock(&p->mutex);
    while (p->done < (p->stop ? p->next : p->n)) {
        pthread_cond_wait(&p->changed, &p->mutex);
        if (progress && p->done < p->n)
            progress(p->done, p->n, user);
    }
    pthread_mutex_unlock(&p->mutex);
    if (progress)
        progress(p->n, p->n, user);
}

/* A note per line of NVRTC's log. */
static void add_log(struct arena *a, struct diags *d, const char *log) {
    struct loc none = {0};
    char *save, *text = arena_strdup(a, log);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        diag_add(d, DIAG_NOTE, none, "%s", line);
}

/* Moves results from the workers' arenas to the caller's; reports the first job that failed. */
static bool collect(struct arena *a, struct diags *d, struct pool *p) {
    for (int i = 0; i < p->n; i++) {
        struct compile_job *j = &p->jobs[i];
        struct loc none = {0};
        if (p->failure[i]) {
            diag_error(d, none, "%s: %s for %s does not compile", j->source_name, j->expression,
                       target_names[j->target]);
            add_log(a, d, p->failure[i]);
            return false;
        }
        if (p->stop)
            continue;
        char *cubin = arena_alloc(a, j->cubin_len);
        memcpy(cubin, j->cubin, j->cubin_len);
        j->cubin = cubin;
        j->symbol = arena_strdup(a, j->symbol);
    }
    return true;
}

bool nvrtc_compile(struct arena *a, struct diags *d, struct compile_job *jobs, int n,
                   int n_threads, void (*progress)(int done, int n, void *user), void *user) {
    struct loc none = {0};
    int major, minor;
    if (n == 0)
        return true;
    if (!nvrtc_version(&major, &minor)) {
        diag_error(
            d, none,
            "target %s needs NVRTC, and no libnvrtc was found: install the CUDA toolkit, "
            "or set CUDA_HOME to where it is, or build with --target host",
            target_names[jobs[0].target]);
        return false;
    }
    struct pool p = {.jobs = jobs,
                     .n = n,
                     .failure = arena_array(a, const char *, n),
                     .cache = cache_open(a, d),
                     .mutex = PTHREAD_MUTEX_INITIALIZER,
                     .changed = PTHREAD_COND_INITIALIZER};
    n_threads = n_threads < 1 ? 1 : n_threads > n ? n : n_threads;
    struct worker *workers = arena_array(a, struct worker, n_threads);
    describe_toolchain(&p);
    int started = start(&p, workers, n_threads);
    if (started)
        wait_all(&p, progress, user);
    else
        diag_error(d, none, "cannot start a thread");
    for (int i = 0; i < started; i++)
        pthread_join(workers[i].thread, NULL);
    bool ok = started && collect(a, d, &p);
    for (int i = 0; i < started; i++)
        arena_free(&workers[i].arena);
    return ok;
}
