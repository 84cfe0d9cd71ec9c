/* The kernel cache: verified files by key in a private folder, shared by processes. */
#define _GNU_SOURCE 1 /* F_OFD_SETLKW */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "moec.h"

enum { ENTRY_MAX = 256 << 20 }; /* bytes */

struct cache {
    const char *dir;
};

/* An entry's file: this, then the value. */
struct entry_header {
    char magic[8]; /* "MOECACHE" */
    uint64_t bytes;
    char hash
        [64]; /* BLAKE2b of the value under the entry's key, hex: another key's entry is none */
};
static const char entry_magic[8] = {'M', 'O', 'E', 'C', 'A', 'C', 'H', 'E'};

/* ---- opening ---- */

static char *cache_path(struct arena *a) {
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (xdg && xdg[0] == '/')
        return path_join(a, xdg, "moec");
    if (home && home[0] == '/')
        return path_join(a, home, ".cache/moec");
    return NULL;
}

/* Kernels are code: a folder that others may write to is not used. */
static const char *not_private(const char *dir) {
    struct stat st;
    if (stat(dir, &st))
        return strerror(errno);
    if (!S_ISDIR(st.st_mode))
        return "not a directory";
    if (st.st_uid != geteuid())
        return "it belongs to another user";
    if (st.st_mode & (S_IWGRP | S_IWOTH))
        return "others may write to it (chmod 700 makes it private)";
    return NULL;
}

static const char *make_private(struct arena *a, const char *dir) {
    int err = dir_make(path_dir(a, dir));
    if (err)
        return strerror(err);
    if (mkdir(dir, 0700) && errno != EEXIST)
        return strerror(errno);
    return not_private(dir);
}

struct cache *cache_open(struct arena *a, struct diags *d) {
    struct loc none = {0};
    const char *dir = cache_path(a);
    const char *why = dir ? make_private(a, dir) : "neither XDG_CACHE_HOME nor HOME is set";
    if (why) {
        diag_add(d, DIAG_WARNING, none, "no kernel cache: %s%s%s", dir ? dir : "",
                 dir ? ": " : "", why);
        return NULL;
    }
    struct cache *c = arena_alloc(a, sizeof *c);
    c->dir = dir;
    return c;
}

const char *cache_dir(const struct cache *c) {
    return c->dir;
}

/* ---- entries ---- */

bool cache_is_key(const char *name) {
    size_t n = strspn(name, "0123456789abcdef");
    return n == 64 && !name[n];
}

static void entry_hash(const char key[65], const void *value, size_t len, char hash[65]) {
    unsigned char h[32];
    crypto_generichash(h, sizeof h, value, len, (const unsigned char *)key, 64);
    sodium_bin2hex(hash, 65, h, sizeof h);
}

static bool entry_valid(const char key[65], const char *data, size_t len) {
    struct entry_header h;
    char hash[65];
    if (len < sizeof h)
        return false;
    memcpy(&h, data, sizeof h);
    if (memcmp(h.magic, entry_magic, sizeof h.magic) || h.bytes != len - sizeof h)
        return false;
    entry_hash(key, data + sizeof h, len - sizeof h, hash);
    return !memcmp(hash, h.hash, sizeof h.hash);
}

bool cache_get(struct cache *c, struct arena *a, const char key[65], char **data, size_t *len) {
    const char *path = path_join(a, c->dir, key);
    if (file_read(a, path, ENTRY_MAX, data, len))
        return false;
    if (!entry_valid(key, *data, *len)) {
        unlink(path);
        return false;
    }
    *data += sizeof(struct entry_header);
    *len -= sizeof(struct entry_header);
    return true;
}

bool cache_put(struct cache *c, const char key[65], const void *data, size_t len) {
    struct arena scratch = {NULL};
    struct buf b = {.arena = &scratch};
    struct entry_header h = {.bytes = len};
    char hash[65];
    entry_hash(key, data, len, hash);
    memcpy(h.magic, entry_magic, sizeof h.magic);
    memcpy(h.hash, hash, sizeof h.hash);
    buf_add(&b, &h, sizeof h);
    buf_add(&b, data, len);
    int err = file_write(path_join(&scratch, c->dir, key), b.data, b.len);
    arena_free(&scratch);
    return !err;
}

/* One file carries all locks: a key's lock is the byte at the offset that its first 60 bits name.
 * Locks belong to the open file, so threads exclude each other like processes. */
int cache_lock(struct cache *c, const char key[65]) {
    struct arena scratch = {NULL};
    char digits[16];
    memcpy(digits, key, 15);
    digits[15] = 0;
    struct flock lock = {.l_type = F_WRLCK,
                         .l_whence = SEEK_SET,
                         .l_start = (off_t)strtoull(digits, NULL, 16),
                         .l_len = 1};
    int fd = open(path_join(&scratch, c->dir, "lock"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    arena_free(&scratch);
    while (fd >= 0 && fcntl(fd, F_OFD_SETLKW, &lock)) {
        if (errno == EINTR)
            continue;
        close(fd);
        return -1;
    }
    return fd;
}

/* ---- listing ---- */

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int cache_list(const struct cache *c, struct arena *a, char ***names) {
    int n = 0, cap = 0;
    *names = NULL;
    DIR *dir = opendir(c->dir);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") || !strcmp(e->d_name, "lock"))
            continue;
        if (n == cap) {
            char **more = arena_array(a, char *, cap = cap ? 2 * cap : 64);
            if (n)
                memcpy(more, *names, sizeof **names * (size_t)n);
            *names = more;
        }
        (*names)[n++] = arena_strdup(a, e->d_name);
    }
    if (dir)
        closedir(dir);
    if (n)
        qsort(*names, (size_t)n, sizeof **names, by_name);
    return n;
}
