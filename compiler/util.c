/* Arena, growing text, files, hashes: what every pass needs and no pass owns. */
#define _GNU_SOURCE 1 /* nftw, sched_getaffinity */
#include "moec.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <math.h>
#include <sched.h>
#include <sodium.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- arena: one list of blocks, newest first; only the newest has room ---- */

/* Under AddressSanitizer every allocation is its own block, so that overruns are seen. */
#ifdef __SANITIZE_ADDRESS__
enum { BLOCK_BYTES = 0 };
#else
enum { BLOCK_BYTES = 64 << 10 };
#endif

struct arena_block {
    struct arena_block *next;
    size_t size, used; /* bytes of data[] */
    _Alignas(16) unsigned char data[];
};

static struct arena_block *block_new(size_t bytes) {
    size_t size = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
    struct arena_block *b = size > SIZE_MAX / 2 ? NULL : calloc(1, sizeof *b + size);
    if (!b) {
        fprintf(stderr, "moec: out of memory (%zu bytes)\n", bytes);
        abort();
    }
    b->size = size;
    return b;
}

void *arena_alloc(struct arena *a, size_t bytes) {
    if (bytes > SIZE_MAX / 2)
        block_new(bytes); /* aborts */
    bytes = (bytes + !bytes + 15) & ~(size_t)15;
    if (!a->head || a->head->size - a->head->used < bytes) {
        struct arena_block *b = block_new(bytes);
        b->next = a->head;
        a->head = b;
    }
    void *p = a->head->data + a->head->used;
    a->head->used += bytes;
    return p;
}

void arena_free(struct arena *a) {
    while (a->head) {
        struct arena_block *next = a->head->next;
        free(a->head);
        a->head = next;
    }
}

char *arena_strdup(struct arena *a, const char *s) {
    size_t n = strlen(s) + 1;
    return memcpy(arena_alloc(a, n), s, n);
}

static char *arena_vprintf(struct arena *a, size_t *len, const char *fmt, va_list ap) {
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    if (n < 0)
        abort(); /* only a wrong format can do this */
    char *s = arena_alloc(a, (size_t)n + 1);
    vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(again);
    *len = (size_t)n;
    return s;
}

char *arena_printf(struct arena *a, const char *fmt, ...) {
    va_list ap;
    size_t len;
    va_start(ap, fmt);
    char *s = arena_vprintf(a, &len, fmt, ap);
    va_end(ap);
    return s;
}

/* ---- growing text ---- */

void buf_add(struct buf *b, const void *bytes, size_t n) {
    if (b->cap - b->len <= n) { /* one byte stays for the NUL */
        size_t cap = b->cap ? b->cap : 256;
        while (cap - b->len <= n)
            cap *= 2;
        char *data = arena_alloc(b->arena, cap);
        if (b->len)
            memcpy(data, b->data, b->len);
        b->data = data;
        b->cap = cap;
    }
    if (n)
        memcpy(b->data + b->len, bytes, n);
    b->len += n;
    b->data[b->len] = 0;
}

void buf_printf(struct buf *b, const char *fmt, ...) {
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n >= 0 && n < (int)sizeof line) {
        buf_add(b, line, (size_t)n);
        return;
    }
    size_t len;
    va_start(ap, fmt);
    char *s = arena_vprintf(b->arena, &len, fmt, ap);
    va_end(ap);
    buf_add(b, s, len);
}

/* Bytes of the UTF-8 character at s; 0 when there is none. */
static size_t utf8_bytes(const char *s) {
    const unsigned char *c = (const unsigned char *)s;
    static const unsigned char least[] = {0, 0, 0x80, 0xa0, 0x90},
                               most[] = {0, 0, 0xbf, 0x9f, 0x8f};
    size_t n = *c < 0x80   ? 1
               : *c < 0xc2 ? 0
               : *c < 0xe0 ? 2
               : *c < 0xf0 ? 3
               : *c < 0xf5 ? 4
                           : 0;
    bool narrow = *c == 0xe0 || *c == 0xf0, wide = *c == 0xed || *c == 0xf4;
    for (size_t i = 1; i < n; i++)
        if ((c[i] & 0xc0) != 0x80)
            return 0;
    if ((narrow && c[1] < least[n]) || (wide && c[1] > most[n]))
        return 0;
    return n;
}

void buf_json_string(struct buf *b, const char *s) {
    buf_add(b, "\"", 1);
    for (size_t n; *s; s += n ? n : 1) {
        unsigned char c = (unsigned char)*s;
        n = utf8_bytes(s);
        if (c == '"' || c == '\\')
            buf_printf(b, "\\%c", c);
        else if (c == '\n')
            buf_add(b, "\\n", 2);
        else if (c == '\t')
            buf_add(b, "\\t", 2);
        else if (c < 0x20)
            buf_printf(b, "\\u%04x", c);
        else if (n)
            buf_add(b, s, n);
        else
            buf_printf(b, "\\ufffd");
    }
    buf_add(b, "\"", 1);
}

void buf_json_double(struct buf *b, double v) {
    isfinite(v) ? buf_printf(b, "%.3e", v) : buf_printf(b, "null");
}

const char *layer_ranges(struct arena *a, const int *layers, int n) {
    struct buf b = {.arena = a};
    for (int i = 0, from = 0; i < n; i++) {
        if (i + 1 < n && layers[i + 1] == layers[i] + 1)
            continue;
        buf_printf(&b, "%s%d", from ? ", " : "", layers[from]);
        if (i > from)
            buf_printf(&b, "-%d", layers[i]);
        from = i + 1;
    }
    return b.data ? b.data : "none";
}

/* ---- files ---- */

/* Reads to the end or to the limit; works on pipes, too, so the size is not asked for. */
static int read_all(struct buf *b, int fd, size_t limit) {
    char *chunk = malloc(1 << 16);
    int err = chunk ? 0 : ENOMEM;
    while (!err) {
        ssize_t n = read(fd, chunk, 1 << 16);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            err = errno;
        else if ((size_t)n > limit - b->len)
            err = EFBIG;
        else if (n == 0)
            break;
        else
            buf_add(b, chunk, (size_t)n);
    }
    free(chunk);
    return err;
}

int file_read(struct arena *a, const char *path, size_t limit, char **data, size_t *len) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    struct buf b = {.arena = a};
    buf_add(&b, "", 0);
    int err = read_all(&b, fd, limit);
    close(fd);
    if (err)
        return err;
    *data = b.data;
    *len = b.len;
    return 0;
}

static int write_all(int fd, const char *data, size_t len) {
    while (len) {
        ssize_t n = write(fd, data, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        data += n;
        len -= (size_t)n;
    }
    return 0;
}

/* /dev/null, a pipe: what is no regular file is written to, not replaced. */
static int write_in_place(const char *path, const void *data, size_t len) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int err = write_all(fd, data, len);
    return close(fd) && !err ? errno : err;
}

int file_write(const char *path, const void *data, size_t len) {
    static atomic_uint serial; /* threads of one process write side by side */
    char temp[PATH_MAX];
    struct stat st;
    if (!stat(path, &st) && !S_ISREG(st.st_mode))
        return write_in_place(path, data, len);
    int n = snprintf(temp, sizeof temp, "%s.%ld-%u.tmp", path, (long)getpid(),
                     atomic_fetch_add(&serial, 1u));
    if (n >= (int)sizeof temp)
        return ENAMETOOLONG;
    int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0)
        return errno;
    int err = write_all(fd, data, len);
    if (!err && fsync(fd))
        err = errno;
    if (close(fd) && !err)
        err = errno;
    if (!err && rename(temp, path))
        err = errno;
    if (err)
        unlink(temp);
    return err;
}

static int dir_make_one(const char *path) {
    struct stat st;
    if (!mkdir(path, 0777))
        return 0;
    if (errno != EEXIST)
        return errno;
    if (stat(path, &st))
        return errno;
    return S_ISDIR(st.st_mode) ? 0 : ENOTDIR;
}

int dir_make(const char *path) {
    char part[PATH_MAX];
    size_t n = strlen(path);
    if (n >= sizeof part)
        return ENAMETOOLONG;
    memcpy(part, path, n + 1);
    for (size_t i = 1; i < n; i++) {
        if (part[i] != '/')
            continue;
        part[i] = 0;
        int err = dir_make_one(part);
        if (err)
            return err;
        part[i] = '/';
    }
    return dir_make_one(part);
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *where) {
    (void)st, (void)type, (void)where;
    return remove(path) ? errno : 0;
}

int dir_remove(const char *path) {
    int err = nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    return err < 0 ? errno : err;
}

char *path_join(struct arena *a, const char *dir, const char *path) {
    if (path[0] == '/' || !strcmp(dir, ".") || !*dir)
        return arena_strdup(a, path);
    size_t n = strlen(dir);
    return arena_printf(a, "%s%s%s", dir, dir[n - 1] == '/' ? "" : "/", path);
}

char *path_dir(struct arena *a, const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash)
        return arena_strdup(a, ".");
    return arena_printf(a, "%.*s", (int)(slash == path ? 1 : slash - path), path);
}

/* ---- hash, clock, spelling ---- */

void hash_hex(const void *data, size_t len, char out[65]) {
    unsigned char h[32];
    crypto_generichash(h, sizeof h, data, len, NULL, 0);
    sodium_bin2hex(out, 65, h, sizeof h);
}

int core_count(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { WORD_MAX = 64 }; /* longer words have no near neighbour worth naming */

static int min3(int a, int b, int c) {
    int m = a < b ? a : b;
    return m < c ? m : c;
}

/* Edits between a and b, both at most WORD_MAX long: insert, delete, replace, swap two
 * neighbours; upper and lower case are the same letter. */
static int edit_distance(const char *a, int la, const char *b, int lb) {
    int d[WORD_MAX + 1][WORD_MAX + 1];
    for (int i = 0; i <= la; i++)
        d[i][0] = i;
    for (int j = 0; j <= lb; j++)
        d[0][j] = j;
#define SAME(i, j) (tolower((unsigned char)a[i]) == tolower((unsigned char)b[j]))
    for (int i = 1; i <= la; i++)
        for (int j = 1; j <= lb; j++) {
            d[i][j] =
                min3(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + !SAME(i - 1, j - 1));
            if (i > 1 && j > 1 && SAME(i - 1, j - 2) && SAME(i - 2, j - 1) &&
                d[i - 2][j - 2] + 1 < d[i][j])
                d[i][j] = d[i - 2][j - 2] + 1;
        }
#undef SAME
    return d[la][lb];
}

/* Letters that two words begin with in common; upper and lower case are the same. */
static int common_start(const char *a, const char *b) {
    int n = 0;
    while (a[n] && tolower((unsigned char)a[n]) == tolower((unsigned char)b[n]))
        n++;
    return n;
}

const char *nearest(const char *word, const char *const *names, int n) {
    size_t len = strlen(word);
    if (len > WORD_MAX)
        return NULL;
    int best = (int)len / 3 > 1 ? (int)len / 3 : 1, start = -1;
    const char *found = NULL;
    for (int i = 0; i < n; i++) {
        size_t l = strlen(names[i]);
        if (l > WORD_MAX)
            continue;
        int dist = edit_distance(word, (int)len, names[i], (int)l);
        int common = common_start(word, names[i]);
        if (dist < best || (dist == best && common > start)) {
            best = dist;
            start = common;
            found = names[i];
        }
    }
    return found;
}
