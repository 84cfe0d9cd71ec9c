/* The CPU as a device: the bundle's verified source, compiled by $CXX into the private cache and
 * loaded. Calls return when the work is done; there are no streams. */
#define _GNU_SOURCE 1 /* memfd_create, pipe2 */
#include "internal.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* What every host source exports: runs one kernel over its grid; 0, or an error's text. */
typedef int launch_fn(const char *expression, const unsigned grid[3], unsigned block,
                      unsigned smem, const struct moe_args *args, int threads, char *error,
                      unsigned error_bytes);

struct library {
    const struct rt_file *source;
    void *handle;
    int fd; /* stays open: its number is part of the loaded library's name */
    launch_fn *launch;
};

struct host {
    int threads;
    double mark[2]; /* us */
    struct library *libraries;
    int num_libraries;
};

/* ---- running a compiler ---- */

enum { MAX_WORDS = 64 };
struct command {
    char *text; /* owns the words that were split */
    char *words[MAX_WORDS + 1];
    int n;
};

static bool add_word(struct command *c, char *word) {
    if (c->n == MAX_WORDS)
        return false;
    c->words[c->n++] = word;
    c->words[c->n] = NULL;
    return true;
}

/* Adds the words of a text between spaces; the text is cut up. */
static bool add_words(struct command *c, char *text) {
    char *rest = NULL;
    for (char *w = strtok_r(text, " \t\n", &rest); w; w = strtok_r(NULL, " \t\n", &rest))
        if (!add_word(c, w))
            return false;
    return true;
}

/* Runs a program without a shell: stdin from a descriptor, stdout and stderr to another. */
static moert_result run(struct command *c, int in, int out, int *status) {
    pid_t pid = fork();
    if (pid < 0)
        return rt_system("cannot start", c->words[0]);
    if (!pid) {
        if (dup2(in, 0) >= 0 && dup2(out, 1) >= 0 && dup2(out, 2) >= 0)
            execvp(c->words[0], c->words);
        _exit(127);
    }
    while (waitpid(pid, status, 0) < 0)
        if (errno != EINTR)
            return rt_system("cannot wait for", c->words[0]);
    return MOERT_OK;
}

/* What a program printed, at most size-1 bytes. */
static void read_output(int fd, char *out, size_t size) {
    ssize_t n = pread(fd, out, size - 1, 0);
    out[n > 0 ? n : 0] = 0;
}

static moert_result memory_file(const void *data, size_t bytes, int *fd) {
    const char *p = data;
    *fd = memfd_create("moec", MFD_CLOEXEC);
    if (*fd < 0)
        return rt_system("cannot make", "a file in memory");
    while (bytes) {
        ssize_t n = write(*fd, p, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            close(*fd);
            return rt_system("cannot write", "a file in memory");
        }
        p += n;
        bytes -= (size_t)n;
    }
    lseek(*fd, 0, SEEK_SET);
    return MOERT_OK;
}

/* ---- a class's library ---- */

static const char compiler_flags[] = "-std=c++17 -O2 -fPIC -shared -pthread";

struct job {
    const struct rt_file *source;
    char cxx[1024], extra[1024], version[1024];
    char dir[PATH_MAX], key[65];
};

static moert_result copy_setting(const char *name, const char *otherwise, char out[1024]) {
    const char *value = getenv(name);
    if (!value || (!*value && *otherwise))
        value = otherwise;
    if (strlen(value) >= 1024)
        return rt_fail(MOERT_INVALID, "$%s is too long", name);
    strcpy(out, value);
    return MOERT_OK;
}

/* The compiler's own description of itself, which is part of the key. */
static moert_result ask_version(struct job *j) {
    char text[1024];
    struct command c = {.n = 0};
    int status = 0, out = memfd_create("moec", MFD_CLOEXEC);
    int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
    strcpy(text, j->cxx);
    moert_result r =
        out < 0 || in < 0 ? rt_system("cannot make", "a file in memory") : MOERT_OK;
    if (r == MOERT_OK && (!add_words(&c, text) || !c.n || !add_word(&c, (char *)"--version")))
        r = rt_fail(MOERT_INVALID, "$CXX is no command: \"%.200s\"", j->cxx);
    if (r == MOERT_OK)
        r = run(&c, in, out, &status);
    if (r == MOERT_OK && status)
        r = rt_fail(MOERT_NO_DEVICE,
                    "the host device needs a C++ compiler: \"%.200s --version\" does not run "
                    "(set CXX)",
                    j->cxx);
    if (r == MOERT_OK)
        read_output(out, j->version, sizeof j->version);
    if (in >= 0)
        close(in);
    if (out >= 0)
        close(out);
    return r;
}

static void make_key(struct job *j) {
    char source[65], text[4096];
    rt_hash_hex(j->source->data, j->source->bytes, source);
    int n = snprintf(text, sizeof text, "host 1\n%s\n%s\n%s\n%s\n%s\n", j->cxx, compiler_flags,
                     j->extra, j->version, source);
    rt_hash_hex(text, (size_t)n, j->key);
}

static moert_result run_compiler(struct job *j, const char *object, int in, int out) {
    char cxx[1024], flags[sizeof compiler_flags], extra[1024], said[1600];
    struct command c = {.n = 0};
    int status = 0;
    strcpy(cxx, j->cxx);
    strcpy(flags, compiler_flags);
    strcpy(extra, j->extra);
    if (!add_words(&c, cxx) || !add_words(&c, flags) || !add_words(&c, extra) ||
        !add_word(&c, (char *)"-x") || !add_word(&c, (char *)"c++") ||
        !add_word(&c, (char *)"-") || !add_word(&c, (char *)"-o") ||
        !add_word(&c, (char *)object))
        return rt_fail(MOERT_INVALID, "$CXX and $MOERT_CXXFLAGS have too many words");
    RT_TRY(run(&c, in, out, &status));
    if (!status)
        return MOERT_OK;
    read_output(out, said, sizeof said);
    return rt_fail(MOERT_NO_DEVICE, "%s does not compile with %.200s (exit %d): %s",
                   j->source->path, j->cxx, WIFEXITED(status) ? WEXITSTATUS(status) : -1, said);
}

static moert_result keep_object(const struct job *j, const char *object) {
    char label[PATH_MAX];
    struct stat st;
    int fd = open(object, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st)) {
        if (fd >= 0)
            close(fd);
        return rt_system("cannot read", object);
    }
    void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return rt_system("cannot map", object);
    snprintf(label, sizeof label, "host %s", j->source->path);
    moert_result r =
        rt_cache_put(j->dir, j->key, label, "moe_host_launch", map, (size_t)st.st_size);
    munmap(map, (size_t)st.st_size);
    return r;
}

static moert_result compile(struct job *j) {
    char object[PATH_MAX + 128];
    int in = -1, out = -1;
    snprintf(object, sizeof object, "%s/.%s.%ld.so", j->dir, j->key, (long)getpid());
    RT_TRY(memory_file(j->source->data, j->source->bytes, &in));
    moert_result r = memory_file("", 0, &out);
    if (r == MOERT_OK)
        r = run_compiler(j, object, in, out);
    if (r == MOERT_OK)
        r = keep_object(j, object);
    unlink(object);
    close(in);
    if (out >= 0)
        close(out);
    return r;
}

/* From the cache, else compiled by one process while others wait. */
static moert_result find_or_compile(struct job *j, const struct rt_log *log,
                                    struct rt_entry *out) {
    if (rt_cache_get(j->dir, j->key, out))
        return MOERT_OK;
    int lock = rt_cache_lock(j->dir, j->key);
    moert_result r = MOERT_OK;
    if (!rt_cache_get(j->dir, j->key, out)) {
        rt_log(log, MOERT_LOG_INFO, "compiling %s with %s", j->source->path, j->cxx);
        r = compile(j);
        if (r == MOERT_OK && !rt_cache_get(j->dir, j->key, out))
            r = rt_fail(MOERT_SYSTEM, "the kernel cache %s does not keep what is put in",
                        j->dir);
    }
    if (lock >= 0)
        close(lock);
    return r;
}

/* Loads what was verified, from memory: the file may change behind our back. */
static moert_result load_code(const struct rt_entry *e, struct library *l) {
    char path[64];
    RT_TRY(memory_file(e->code, e->bytes, &l->fd));
    snprintf(path, sizeof path, "/proc/self/fd/%d", l->fd);
    l->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!l->handle) {
        close(l->fd);
        return rt_fail(MOERT_SYSTEM, "cannot load the compiled %s: %s", l->source->path,
                       dlerror());
    }
    *(void **)&l->launch = dlsym(l->handle, "moe_host_launch");
    if (l->launch)
        return MOERT_OK;
    dlclose(l->handle);
    close(l->fd);
    return rt_fail(MOERT_CORRUPT, "%s exports no moe_host_launch", l->source->path);
}

static moert_result make_library(const struct rt_file *source, const struct rt_log *log,
                                 struct library *l) {
    struct job j = {.source = source};
    struct rt_entry e;
    RT_TRY(copy_setting("CXX", "c++", j.cxx));
    RT_TRY(copy_setting("MOERT_CXXFLAGS", "", j.extra));
    RT_TRY(rt_cache_dir(j.dir, sizeof j.dir));
    RT_TRY(ask_version(&j));
    make_key(&j);
    RT_TRY(find_or_compile(&j, log, &e));
    l->source = source;
    moert_result r = load_code(&e, l);
    free(e.memory);
    return r;
}

static moert_result host_load(void *device, const moert_bundle *b, const struct rt_file *source,
                              int i, const struct rt_log *log, struct rt_kernel *out) {
    struct host *d = device;
    struct library *l = NULL;
    (void)b;
    (void)i;
    for (int n = 0; !l && n < d->num_libraries; n++)
        if (d->libraries[n].source == source)
            l = &d->libraries[n];
    if (!l) {
        struct library *grown =
            realloc(d->libraries, ((size_t)d->num_libraries + 1) * sizeof *grown);
        if (!grown)
            return rt_no_memory(sizeof *grown);
        d->libraries = grown;
        l = &grown[d->num_libraries];
        RT_TRY(make_library(source, log, l));
        d->num_libraries++;
    }
    *(launch_fn **)&out->function = l->launch;
    out->resident = 1;
    return MOERT_OK;
}

/* ---- device ---- */

moert_result rt_host_open(int threads, struct moert_tool_device *info, void **out) {
    struct host *d = calloc(1, sizeof *d);
    if (!d)
        return rt_no_memory(sizeof *d);
    long cores = sysconf(_SC_NPROCESSORS_ONLN), pages = sysconf(_SC_PHYS_PAGES);
    d->threads = threads > 0 ? threads : cores > 0 ? (int)cores : 1;
    snprintf(info->name, sizeof info->name, "host");
    info->sms = d->threads;
    info->memory = (size_t)(pages > 0 ? pages : 0) * (size_t)sysconf(_SC_PAGESIZE);
    *out = d;
    return MOERT_OK;
}

static void host_close(void *device) {
    struct host *d = device;
    for (int i = 0; i < d->num_libraries; i++) {
        dlclose(d->libraries[i].handle);
        close(d->libraries[i].fd);
    }
    free(d->libraries);
    free(d);
}

static moert_result host_enter(void *device) {
    (void)device;
    return MOERT_OK;
}

static void host_leave(void *device) {
    (void)device;
}

static moert_result host_alloc(void *device, size_t bytes, void **out) {
    (void)device;
    *out = aligned_alloc(256, (size_t)RT_ALIGN(bytes ? bytes : 1));
    return *out ? MOERT_OK : rt_no_memory(bytes);
}

static void host_free(void *device, void *p) {
    (void)device;
    free(p);
}

static moert_result host_map_shared(void *device, int fd, size_t bytes, void **out) {
    (void)device;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return rt_fail(MOERT_SYSTEM, "mapping %zu bytes: %s", bytes, strerror(errno));
    *out = p;
    return MOERT_OK;
}

static moert_result host_alloc_shared(void *device, size_t bytes, void **out, int *fd) {
    *fd = memfd_create("moert-arena", MFD_CLOEXEC);
    moert_result r = MOERT_OK;
    if (*fd < 0 || ftruncate(*fd, (off_t)bytes))
        r = rt_fail(MOERT_SYSTEM, "memory to share: %s", strerror(errno));
    if (r == MOERT_OK)
        r = host_map_shared(device, *fd, bytes, out);
    if (r != MOERT_OK && *fd >= 0)
        close(*fd);
    return r;
}

static void host_unmap_shared(void *device, void *p, size_t bytes) {
    (void)device;
    munmap(p, bytes);
}

static moert_result host_copy(void *device, void *dst, const void *src, size_t bytes) {
    (void)device;
    if (bytes)
        memcpy(dst, src, bytes);
    return MOERT_OK;
}

static moert_result host_set(void *device, void *dst, int byte, size_t bytes) {
    (void)device;
    if (bytes)
        memset(dst, byte, bytes);
    return MOERT_OK;
}

static moert_result host_stream_copy(void *device, void *dst, const void *src, size_t bytes,
                                     moert_stream s) {
    (void)s;
    return host_copy(device, dst, src, bytes);
}

static moert_result host_stream(void *device, moert_stream *out) {
    (void)device;
    *out = NULL;
    return MOERT_OK;
}

static void host_stream_free(void *device, moert_stream s) {
    (void)device;
    (void)s;
}

static moert_result host_sync(void *device, moert_stream s) {
    (void)device;
    (void)s;
    return MOERT_OK;
}

static moert_result host_launch(void *device, const struct rt_launch *l,
                                const struct moe_args *args, moert_stream s) {
    struct host *d = device;
    char error[512] = "";
    launch_fn *launch;
    (void)s;
    *(void **)&launch = l->kernel->function;
    if (launch(l->expression, l->grid, l->block, l->smem, args, d->threads, error,
               sizeof error))
        return rt_fail(MOERT_SYSTEM, "%s on the host: %s", l->expression, error);
    return MOERT_OK;
}

static moert_result host_begin_capture(void *device, moert_stream s) {
    (void)device;
    (void)s;
    return rt_fail(MOERT_UNSUPPORTED, "the host device has no graphs");
}

static moert_result host_end_capture(void *device, moert_stream s, bool keep, void **graph) {
    (void)keep;
    (void)graph;
    return host_begin_capture(device, s);
}

static moert_result host_replay(void *device, void *graph, moert_stream s) {
    (void)graph;
    return host_begin_capture(device, s);
}

static moert_result host_mark(void *device, int which, moert_stream s) {
    struct host *d = device;
    struct timespec t;
    (void)s;
    clock_gettime(CLOCK_MONOTONIC, &t);
    d->mark[which] = (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
    return MOERT_OK;
}

static moert_result host_elapsed(void *device, double *us) {
    struct host *d = device;
    *us = d->mark[1] - d->mark[0];
    return MOERT_OK;
}

const struct rt_ops rt_host_ops = {
    .close = host_close,
    .enter = host_enter,
    .leave = host_leave,
    .alloc = host_alloc,
    .free = host_free,
    .alloc_shared = host_alloc_shared,
    .map_shared = host_map_shared,
    .unmap_shared = host_unmap_shared,
    .alloc_host = host_alloc,
    .free_host = host_free,
    .upload = host_copy,
    .download = host_copy,
    .set = host_set,
    .copy = host_stream_copy,
    .stream = host_stream,
    .stream_free = host_stream_free,
    .sync = host_sync,
    .launch = host_launch,
    .begin_capture = host_begin_capture,
    .end_capture = host_end_capture,
    .replay = host_replay,
    .graph_free = host_free,
    .mark = host_mark,
    .elapsed = host_elapsed,
    .load = host_load,
};
