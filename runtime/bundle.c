/* Opening a bundle: the manifest, every file's length and hash, then plan.bin.
 *
 * Files are read once, through descriptors that follow no symbolic link, and what was hashed is
 * what is used later: nothing is read from the folder again. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_FILES = 65536, MAX_MANIFEST = 16 << 20 };
static const int64_t max_file = (int64_t)1 << 30;

void rt_hash_hex(const void *data, size_t bytes, char hex[65]) {
    unsigned char hash[32];
    crypto_generichash(hash, sizeof hash, data, bytes, NULL, 0);
    sodium_bin2hex(hex, 65, hash, sizeof hash);
}

/* Opens a path of plain names below the folder, refusing symbolic links at every step. */
static int open_beneath(int dir, const char *path) {
    int at = dir;
    while (true) {
        const char *slash = strchr(path, '/');
        char name[NAME_MAX + 1];
        size_t len = slash ? (size_t)(slash - path) : strlen(path);
        if (len > NAME_MAX) {
            errno = ENAMETOOLONG;
            len = 0;
        }
        memcpy(name, path, len);
        name[len] = 0;
        int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | (slash ? O_DIRECTORY : 0);
        int fd = len ? openat(at, name, flags) : -1;
        int code = errno;
        if (at != dir)
            close(at);
        errno = code;
        if (fd < 0 || !slash)
            return fd;
        at = fd;
        path = slash + 1;
    }
}

/* A whole regular file of at most limit bytes, NUL-terminated for those that are text. */
static moert_result read_file(int dir, const char *path, int64_t limit, unsigned char **data,
                              size_t *bytes) {
    int fd = open_beneath(dir, path);
    if (fd < 0 && errno == ELOOP)
        return rt_fail(MOERT_CORRUPT, "bundle: %s is a symbolic link", path);
    if (fd < 0)
        return rt_system("bundle: cannot open", path);
    struct stat st;
    moert_result r = MOERT_OK;
    if (fstat(fd, &st) < 0)
        r = rt_system("bundle: cannot stat", path);
    else if (!S_ISREG(st.st_mode) || st.st_size > limit)
        r = rt_fail(MOERT_CORRUPT, "bundle: %s is not a regular file of at most %lld bytes",
                    path, (long long)limit);
    else if (!(*data = malloc((size_t)st.st_size + 1)))
        r = rt_no_memory((size_t)st.st_size + 1);
    if (r != MOERT_OK) {
        close(fd);
        return r;
    }
    size_t have = 0, want = (size_t)st.st_size;
    while (have < want) {
        ssize_t n = read(fd, *data + have, want - have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        have += (size_t)n;
    }
    close(fd);
    (*data)[have] = 0;
    *bytes = have;
    if (have < want) {
        free(*data);
        *data = NULL;
        return rt_fail(MOERT_SYSTEM, "bundle: %s could not be read whole", path);
    }
    return MOERT_OK;
}

/* ---- MANIFEST ---- */

/* Cuts the next line off the text; NULL at its end or when the last line has no newline. */
static char *next_line(char **text) {
    char *line = *text, *end = strchr(line, '\n');
    if (!end)
        return NULL;
    *end = 0;
    *text = end + 1;
    return line;
}

static bool is_hash(const char *s) {
    return strspn(s, "0123456789abcdef") == 64;
}

/* Relative, of plain names: no empty one, no "." and "..", no control characters. */
static bool is_plain_path(const char *path) {
    for (const char *name = path;; name++) {
        size_t len = strcspn(name, "/");
        if (!len || len > NAME_MAX || (len <= 2 && !strncmp(name, "..", len)))
            return false;
        for (size_t i = 0; i < len; i++)
            if ((unsigned char)name[i] <= ' ' || name[i] == 127)
                return false;
        name += len;
        if (!*name)
            return name - path < PATH_MAX;
    }
}

/* "file HASH BYTES PATH" */
static bool parse_file_line(char *line, struct rt_file *f) {
    if (strncmp(line, "file ", 5) || !is_hash(line + 5) || line[69] != ' ')
        return false;
    memcpy(f->hash, line + 5, 64);
    f->hash[64] = 0;
    char *number = line + 70, *end;
    size_t digits = strspn(number, "0123456789");
    if (!digits || digits > 12 || number[digits] != ' ' || (*number == '0' && digits > 1))
        return false;
    f->bytes = strtoull(number, &end, 10);
    f->path = end + 1;
    return is_plain_path(f->path) && strcmp(f->path, "MANIFEST");
}

static moert_result bad_manifest(int line, const char *what) {
    return rt_fail(MOERT_CORRUPT, "bundle: MANIFEST:%d: %s", line, what);
}

static moert_result add_file(moert_bundle *b, char *text, int line) {
    struct rt_file *f = &b->files[b->num_files];
    if (!parse_file_line(text, f))
        return bad_manifest(line, "expected \"file HASH BYTES PATH\"");
    if (b->num_files && strcmp(f[-1].path, f->path) >= 0)
        return bad_manifest(line, "paths are not in ascending order");
    b->num_files++;
    return MOERT_OK;
}

static moert_result parse_manifest(moert_bundle *b, size_t bytes, char plan_hash[65]) {
    char *text = b->manifest, *line = NULL;
    if (strlen(text) != bytes)
        return bad_manifest(1, "holds a NUL byte");
    if (!(line = next_line(&text)) || strncmp(line, "moec-bundle ", 12))
        return rt_fail(MOERT_CORRUPT, "bundle: %s: MANIFEST is not a bundle's", b->dir);
    if (strcmp(line + 12, "1"))
        return rt_fail(MOERT_VERSION, "bundle: format version %.20s; this library reads %d",
                       line + 12, MOE_MANIFEST_VERSION);
    if (!(line = next_line(&text)) || strncmp(line, "compiler ", 9))
        return bad_manifest(2, "expected \"compiler VERSION\"");
    if (!(line = next_line(&text)) || strncmp(line, "nvrtc ", 6))
        return bad_manifest(3, "expected \"nvrtc VERSION\"");
    if (!(line = next_line(&text)) || strncmp(line, "plan ", 5) || !is_hash(line + 5) ||
        line[69])
        return bad_manifest(4, "expected \"plan HASH\"");
    memcpy(plan_hash, line + 5, 65);
    int lines = 0;
    for (const char *p = text; *p; p++)
        lines += *p == '\n';
    if (lines > MAX_FILES)
        return bad_manifest(5, "names too many files");
    b->files = calloc((size_t)lines + 1, sizeof *b->files);
    if (!b->files)
        return rt_no_memory((size_t)lines * sizeof *b->files);
    for (int i = 0; i < lines; i++)
        RT_TRY(add_file(b, next_line(&text), i + 5));
    return *text ? bad_manifest(lines + 5, "the last line has no newline") : MOERT_OK;
}

/* ---- files ---- */

static moert_result load_file(int dir, struct rt_file *f) {
    size_t said = f->bytes, bytes = 0;
    unsigned char *data = NULL;
    RT_TRY(read_file(dir, f->path, max_file, &data, &bytes));
    f->data = data;
    f->bytes = bytes;
    if (bytes != said)
        return rt_fail(MOERT_CORRUPT, "bundle: %s has %zu bytes, MANIFEST says %zu", f->path,
                       bytes, said);
    char hex[65];
    rt_hash_hex(data, bytes, hex);
    if (strcmp(hex, f->hash))
        return rt_fail(MOERT_CORRUPT, "bundle: %s is damaged: its hash is not the manifest's",
                       f->path);
    return MOERT_OK;
}

const struct rt_file *rt_bundle_file(const moert_bundle *b, const char *path) {
    int low = 0, high = b->num_files;
    while (low < high) {
        int mid = (low + high) / 2, order = strcmp(path, b->files[mid].path);
        if (!order)
            return &b->files[mid];
        if (order < 0)
            high = mid;
        else
            low = mid + 1;
    }
    return NULL;
}

static moert_result open_files(moert_bundle *b, int dir) {
    size_t bytes;
    char plan_hash[65];
    RT_TRY(read_file(dir, "MANIFEST", MAX_MANIFEST, (unsigned char **)&b->manifest, &bytes));
    RT_TRY(parse_manifest(b, bytes, plan_hash));
    for (int i = 0; i < b->num_files; i++)
        RT_TRY(load_file(dir, &b->files[i]));
    const struct rt_file *yaml = rt_bundle_file(b, "plan.yaml");
    const struct rt_file *plan = rt_bundle_file(b, "plan.bin");
    if (!yaml || strcmp(yaml->hash, plan_hash))
        return rt_fail(MOERT_CORRUPT, "bundle: plan.yaml is not the plan that MANIFEST names");
    if (!plan)
        return rt_fail(MOERT_CORRUPT, "bundle: MANIFEST names no plan.bin");
    return rt_plan_check(b, plan);
}

/* ---- public ---- */

moert_result moert_bundle_open(const char *dir, moert_bundle **out) {
    if (!dir || !out)
        return rt_fail(MOERT_INVALID, "moert_bundle_open: dir and out must be given");
    *out = NULL;
    if (sodium_init() < 0)
        return rt_fail(MOERT_SYSTEM, "libsodium does not start");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return rt_system("bundle: cannot open folder", dir);
    moert_bundle *b = calloc(1, sizeof *b);
    moert_result r = b && (b->dir = strdup(dir)) ? open_files(b, fd) : rt_no_memory(sizeof *b);
    close(fd);
    if (r != MOERT_OK) {
        moert_bundle_close(b);
        return r;
    }
    *out = b;
    return MOERT_OK;
}

void moert_bundle_close(moert_bundle *b) {
    if (!b)
        return;
    for (int i = 0; i < b->num_files; i++)
        free(b->files[i].data);
    free(b->files);
    free(b->manifest);
    free(b->dir);
    free(b);
}

int moert_bundle_num_layers(const moert_bundle *b) {
    return b ? (int)b->count[MOE_SECTION_LAYER] : 0;
}

int moert_bundle_layer(const moert_bundle *b, int i) {
    return i >= 0 && i < moert_bundle_num_layers(b) ? b->layers[i].layer : -1;
}

int rt_bundle_find(const moert_bundle *b, int layer) {
    int low = 0, high = (int)b->count[MOE_SECTION_LAYER];
    while (low < high) {
        int mid = (low + high) / 2;
        if (b->layers[mid].layer == layer)
            return mid;
        if (b->layers[mid].layer < layer)
            low = mid + 1;
        else
            high = mid;
    }
    return -1;
}

moert_result moert_bundle_layer_info(const moert_bundle *b, int layer, moert_layer_info *info) {
    moert_layer_info full = MOERT_LAYER_INFO_INIT;
    if (!b || !info)
        return rt_fail(MOERT_INVALID, "moert_bundle_layer_info: bundle and info must be given");
    size_t size = info->size;
    RT_TRY(rt_config(&full, sizeof full, info, "moert_layer_info"));
    int i = rt_bundle_find(b, layer);
    if (i < 0)
        return rt_fail(MOERT_NOT_FOUND, "the bundle has no layer %d", layer);
    const struct moe_plan_class *c = &b->classes[b->layers[i].class_index];
    full.layer = layer;
    full.hidden = c->hidden;
    full.inter = c->inter;
    full.experts = c->experts;
    full.topk = c->topk;
    full.max_tokens = c->max_tokens;
    full.ranks = c->ranks;
    full.slots_per_rank = c->slots_per_rank;
    full.shared_inter = c->shared_inter;
    full.weight_bytes = rt_layer_parts(c, c->slots_per_rank).bytes;
    size_t known = size < sizeof full ? size : sizeof full;
    memcpy(info, &full, known);
    info->size = size;
    return MOERT_OK;
}
