/* The bundle: compiles the plan's kernels and writes the directory, all or nothing. */
#define _GNU_SOURCE 1 /* renameat2 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "moec.h"

/* ---- where ---- */

/* ./NAME.moe, NAME from the argument's file name; a config.json's name says nothing, the model's
 * does. */
static char *default_out(struct arena *a, const struct deployment *dep) {
    const char *slash = dep->path ? strrchr(dep->path, '/') : NULL;
    const char *name = slash ? slash + 1 : dep->path;
    if (!name || !strcmp(name, "config.json"))
        return arena_printf(a, "%s.moe", dep->model->name);
    const char *dot = strrchr(name, '.');
    return arena_printf(a, "%.*s.moe",
                        (int)(dot && dot > name ? dot - name : (int)strlen(name)), name);
}

/* Without slashes at the end: the temporary name stands beside it, not in it. */
static char *given_out(struct arena *a, const char *out) {
    size_t n = strlen(out);
    while (n > 1 && out[n - 1] == '/')
        n--;
    return arena_printf(a, "%.*s", (int)n, out);
}

static bool is_bundle(struct arena *a, const char *path) {
    char *text;
    size_t len;
    return !file_read(a, path_join(a, path, "MANIFEST"), 64 << 20, &text, &len) &&
           !strncmp(text, "moec-bundle ", 12);
}

static bool is_empty(const char *path) {
    DIR *dir = opendir(path);
    int names = 0;
    while (dir && names <= 2 && readdir(dir))
        names++; /* . and .. among them */
    if (dir)
        closedir(dir);
    return dir && names == 2;
}

/* Only a bundle, an empty directory or nothing may be replaced. */
static bool may_replace(struct arena *a, struct diags *d, const char *out) {
    struct stat st;
    struct loc none = {0};
    if (lstat(out, &st) && errno == ENOENT)
        return true;
    if (S_ISDIR(st.st_mode) && (is_bundle(a, out) || is_empty(out)))
        return true;
    diag_error(d, none, "%s is there and is no bundle: it stays; choose another -o", out);
    return false;
}

/* Puts the finished directory in its place; readers see the old bundle or the new one. */
static int put_in_place(struct arena *a, const char *temp, const char *out) {
    if (!rename(temp, out))
        return 0;
    if (errno != ENOTEMPTY && errno != EEXIST)
        return errno;
    if (!renameat2(AT_FDCWD, temp, AT_FDCWD, out, RENAME_EXCHANGE)) {
        dir_remove(temp); /* the old bundle now; what stays of it is swept later */
        return 0;
    }
    char *old = arena_printf(a, "%s.old.%ld", out, (long)getpid());
    if (rename(out, old))
        return errno;
    if (rename(temp, out)) {
        int err = errno;
        rename(old, out);
        return err;
    }
    return dir_remove(old);
}

/* ---- the temporary folder: OUT.tmp.PID, locked while its process lives ---- */

/* Returns its descriptor, which holds the lock, or -1. */
static int temp_open(const char *temp) {
    struct stat st;
    while (!mkdir(temp, 0777) || errno == EEXIST) {
        int fd = open(temp, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0 && errno == ENOENT) /* swept away already */
            continue;
        if (fd < 0)
            return -1;
        flock(fd, LOCK_EX);
        if (!fstat(fd, &st) && st.st_nlink) /* not swept away before it was locked */
            return fd;
        close(fd);
    }
    return -1;
}

/* Removes what killed processes left beside out: folders of that name that nobody locks. */
static void temp_sweep(struct arena *a, const char *out) {
    const char *slash = strrchr(out, '/'), *folder = path_dir(a, out);
    const char *prefix = arena_printf(a, "%s.tmp.", slash ? slash + 1 : out);
    size_t n = strlen(prefix);
    DIR *dir = opendir(folder);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (strncmp(e->d_name, prefix, n) || !e->d_name[n] ||
            e->d_name[n + strspn(e->d_name + n, "0123456789")])
            continue;
        const char *path = path_join(a, folder, e->d_name);
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB))
            dir_remove(path);
        if (fd >= 0)
            close(fd);
    }
    if (dir)
        closedir(dir);
}

/* ---- compiling ---- */

/* Kernels of GPU targets in the plan's order; the jobs' order is theirs. */
struct compilation {
    struct compile_job *jobs;
    int *kernel_of_job;
    int n;
};

/* The class that a kernel was made for. */
static int class_of_kernel(const struct plan *p, int kernel) {
    for (uint32_t t = 0; t < p->count[MOE_SECTION_TARGET]; t++)
        for (int b = 0; b < p->targets[t].num_buckets; b++) {
            const struct moe_plan_bucket *bucket = &p->buckets[p->targets[t].first_bucket + b];
            for (int l = 0; l < bucket->num_launches; l++)
                if (p->launches[bucket->first_launch + l].kernel == kernel)
                    return p->targets[t].class_index;
        }
    return -1;
}

static void list_jobs(struct arena *a, const struct plan *p, const struct buf *sources,
                      struct compilation *c) {
    int kernels = (int)p->count[MOE_SECTION_KERNEL];
    c->n = 0;
    c->jobs = arena_array(a, struct compile_job, kernels);
    c->kernel_of_job = arena_array(a, int, kernels);
    for (int k = 0; k < kernels; k++) {
        if (p->kernels[k].target == MOE_TARGET_HOST)
            continue;
        int class_index = class_of_kernel(p, k);
        c->kernel_of_job[c->n] = k;
        c->jobs[c->n++] =
            (struct compile_job){.source = sources[class_index].data,
                                 .source_name = plan_string(p, p->classes[class_index].source),
                                 .expression = plan_string(p, p->kernels[k].expression),
                                 .target = p->kernels[k].target};
    }
}

/* ---- writing ---- */

struct out_file {
    const char *path;
    char hash[65];
    size_t bytes;
};
struct writer {
    struct arena *arena;
    struct diags *diags;
    const char *dir;
    struct out_file *files;
    int n;
};

static bool write_file(struct writer *w, const char *path, const void *data, size_t len) {
    struct loc none = {0};
    char *full = path_join(w->arena, w->dir, path);
    int err = dir_make(path_dir(w->arena, full));
    if (!err)
        err = file_write(full, data, len);
    if (err) {
        diag_error(w->diags, none, "%s: %s", full, strerror(err));
        return false;
    }
    struct out_file *f = &w->files[w->n++];
    f->path = path;
    f->bytes = len;
    hash_hex(data, len, f->hash);
    return true;
}

static int by_path(const void *a, const void *b) {
    return strcmp(((const struct out_file *)a)->path, ((const struct out_file *)b)->path);
}

static bool write_manifest(struct writer *w, const char *plan_hash, bool uses_nvrtc) {
    struct buf m = {.arena = w->arena};
    int major = 0, minor = 0;
    buf_printf(&m, "moec-bundle %d\ncompiler %s\n", MOE_MANIFEST_VERSION, MOEC_VERSION);
    if (uses_nvrtc && nvrtc_version(&major, &minor))
        buf_printf(&m, "nvrtc %d.%d\n", major, minor);
    else
        buf_printf(&m, "nvrtc none\n");
    buf_printf(&m, "plan %s\n", plan_hash);
    qsort(w->files, (size_t)w->n, sizeof *w->files, by_path);
    for (int i = 0; i < w->n; i++)
        buf_printf(&m, "file %s %zu %s\n", w->files[i].hash, w->files[i].bytes,
                   w->files[i].path);
    return write_file(w, "MANIFEST", m.data, m.len);
}

static bool write_all(struct writer *w, struct plan *p, const struct buf *sources,
                      const struct compilation *c) {
    struct buf yaml = {.arena = w->arena}, bin = {.arena = w->arena};
    char plan_hash[65];
    plan_yaml(p, &yaml);
    plan_binary(p, &bin);
    hash_hex(yaml.data, yaml.len, plan_hash);
    bool ok = write_file(w, "plan.yaml", yaml.data, yaml.len) &&
              write_file(w, "plan.bin", bin.data, bin.len);
    for (uint32_t i = 0; ok && i < p->count[MOE_SECTION_CLASS]; i++)
        ok = write_file(w, plan_string(p, p->classes[i].source), sources[i].data,
                        sources[i].len);
    for (int i = 0; ok && i < c->n; i++)
        ok = write_file(w, plan_string(p, p->kernels[c->kernel_of_job[i]].file),
                        c->jobs[i].cubin, c->jobs[i].cubin_len);
    return ok && write_manifest(w, plan_hash, c->n > 0);
}

static bool write_bundle(struct arena *a, struct diags *d, struct plan *p,
                         const struct buf *sources, const struct compilation *c,
                         struct build_report *r) {
    struct loc none = {0};
    char *temp = arena_printf(a, "%s.tmp.%ld", r->out, (long)getpid());
    int most = (int)p->count[MOE_SECTION_CLASS] + c->n + 3;
    struct writer w = {a, d, temp, arena_array(a, struct out_file, most), 0};
    int err = dir_make(path_dir(a, r->out));
    if (!err)
        temp_sweep(a, r->out);
    int lock = err ? -1 : temp_open(temp);
    err = err ? err : lock < 0 ? errno : 0;
    bool ok = !err && write_all(&w, p, sources, c);
    if (ok)
        err = put_in_place(a, temp, r->out);
    if (err)
        diag_error(d, none, "%s: %s", r->out, strerror(err));
    if (lock >= 0 && (!ok || err))
        dir_remove(temp);
    if (lock >= 0)
        close(lock);
    for (int i = 0; i < w.n; i++)
        r->bytes += (long long)w.files[i].bytes;
    return ok && !err;
}

/* ---- all of it ---- */

bool bundle_build(struct arena *a, struct diags *d, struct plan *p,
                  const struct build_options *o, struct build_report *r) {
    struct compilation c;
    struct buf *sources = arena_array(a, struct buf, p->count[MOE_SECTION_CLASS]);
    double start = now_seconds();
    r->out = o->out ? given_out(a, o->out) : default_out(a, p->dep);
    if (!may_replace(a, d, r->out))
        return false;
    for (uint32_t i = 0; i < p->count[MOE_SECTION_CLASS]; i++) {
        sources[i].arena = a;
        emit_source(p, (int)i, o->unbake, &sources[i]);
    }
    list_jobs(a, p, sources, &c);
    if (!nvrtc_compile(a, d, c.jobs, c.n, o->jobs, o->progress, NULL))
        return false;
    r->compile_seconds = now_seconds() - start;
    for (int i = 0; i < c.n; i++) {
        p->kernels[c.kernel_of_job[i]].symbol = plan_intern(p, c.jobs[i].symbol);
        r->cached += c.jobs[i].cached;
    }
    r->kernels = c.n;
    return write_bundle(a, d, p, sources, &c, r);
}
