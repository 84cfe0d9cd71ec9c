/* The private cache, $XDG_CACHE_HOME/moec or ~/.cache/moec: code that this user compiled. The
 * compiler keeps its kernels in the same folder in the same format (`moec cache`). */
#define _GNU_SOURCE 1 /* F_OFD_SETLKW */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_ENTRY = 256 << 20 };

struct entry_header { /* then the value */
    char magic[8];
    uint64_t bytes;
    char hash[64]; /* BLAKE2b-256 of the value under the entry's key, hex */
};
static const char entry_magic[8] = {'M', 'O', 'E', 'C', 'A', 'C', 'H', 'E'};

static bool make_parents(char *path) {
    for (char *p = path + 1; *p; p++)
        if (*p == '/') {
            *p = 0;
            bool made = !mkdir(path, 0777) || errno == EEXIST;
            *p = '/';
            if (!made)
                return false;
        }
    return true;
}

moert_result rt_cache_dir(char *out, size_t size) {
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    bool use_xdg = xdg && xdg[0] == '/', use_home = home && home[0] == '/';
    if (!use_xdg && !use_home)
        return rt_fail(MOERT_SYSTEM, "no kernel cache: neither XDG_CACHE_HOME nor HOME is set");
    int n = use_xdg ? snprintf(out, size, "%s/moec", xdg)
                    : snprintf(out, size, "%s/.cache/moec", home);
    if (n >= (int)size)
        return rt_fail(MOERT_SYSTEM, "no kernel cache: its path is too long");
    struct stat st;
    if (!make_parents(out) || (mkdir(out, 0700) && errno != EEXIST) || stat(out, &st))
        return rt_system("no kernel cache:", out);
    if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() || st.st_mode & (S_IWGRP | S_IWOTH))
        return rt_fail(MOERT_SYSTEM,
                       "no kernel cache: %s must be a folder of yours that nobody else may "
                       "write to (chmod 700)",
                       out);
    return MOERT_OK;
}

static unsigned char *read_entry(const char *path, size_t *bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    struct stat st;
    unsigned char *data = NULL;
    if (fd < 0)
        return NULL;
    if (!fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_size <= MAX_ENTRY &&
        (data = malloc((size_t)st.st_size + 1))) {
        ssize_t n = 1;
        for (*bytes = 0; *bytes < (size_t)st.st_size && n > 0;
             *bytes += (size_t)(n > 0 ? n : 0))
            n = read(fd, data + *bytes, (size_t)st.st_size - *bytes);
    }
    close(fd);
    return data;
}

static void entry_hash(const char key[65], const void *value, size_t bytes, char hash[65]) {
    unsigned char h[32];
    crypto_generichash(h, sizeof h, value, bytes, (const unsigned char *)key, 64);
    sodium_bin2hex(hash, 65, h, sizeof h);
}

/* Cuts the value's first line into label and symbol. */
static bool unpack(const char key[65], unsigned char *data, size_t bytes,
                   struct rt_entry *out) {
    struct entry_header h;
    char hash[65];
    if (bytes < sizeof h)
        return false;
    memcpy(&h, data, sizeof h);
    unsigned char *value = data + sizeof h;
    if (memcmp(h.magic, entry_magic, sizeof h.magic) || h.bytes != bytes - sizeof h)
        return false;
    entry_hash(key, value, bytes - sizeof h, hash);
    unsigned char *end = memchr(value, '\n', bytes - sizeof h);
    unsigned char *space = end ? memrchr(value, ' ', (size_t)(end - value)) : NULL;
    if (memcmp(hash, h.hash, sizeof h.hash) || !space)
        return false;
    *end = 0;
    out->memory = data;
    out->symbol = (const char *)space + 1;
    out->code = end + 1;
    out->bytes = (size_t)(data + bytes - (end + 1));
    return true;
}

bool rt_cache_get(const char *dir, const char key[65], struct rt_entry *out) {
    char path[PATH_MAX];
    size_t bytes = 0;
    if (snprintf(path, sizeof path, "%s/%s", dir, key) >= (int)sizeof path)
        return false;
    unsigned char *data = read_entry(path, &bytes);
    if (!data)
        return false;
    if (unpack(key, data, bytes, out))
        return true;
    unlink(path); /* damaged: made again */
    free(data);
    return false;
}

static bool write_all(int fd, const void *data, size_t bytes) {
    const char *p = data;
    while (bytes) {
        ssize_t n = write(fd, p, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        bytes -= (size_t)n;
    }
    return true;
}

moert_result rt_cache_put(const char *dir, const char key[65], const char *label,
                          const char *symbol, const void *code, size_t bytes) {
    char temp[PATH_MAX], path[PATH_MAX];
    size_t line = strlen(label) + strlen(symbol) + 2;
    char *value = malloc(line + 1 + bytes);
    if (!value)
        return rt_no_memory(line + bytes);
    snprintf(value, line + 1, "%s %s\n", label, symbol);
    memcpy(value + line, code, bytes);
    struct entry_header h = {.bytes = line + bytes};
    char hash[65];
    entry_hash(key, value, line + bytes, hash);
    memcpy(h.magic, entry_magic, sizeof h.magic);
    memcpy(h.hash, hash, sizeof h.hash);
    snprintf(path, sizeof path, "%s/%s", dir, key);
    int fd = snprintf(temp, sizeof temp, "%s/.%s.XXXXXX", dir, key) < (int)sizeof temp
                 ? mkostemp(temp, O_CLOEXEC)
                 : -1;
    bool ok = fd >= 0 && write_all(fd, &h, sizeof h) && write_all(fd, value, line + bytes) &&
              !fsync(fd) && !rename(temp, path);
    moert_result r = ok ? MOERT_OK : rt_system("cannot write the kernel cache's", path);
    if (fd >= 0) {
        close(fd);
        if (!ok)
            unlink(temp);
    }
    free(value);
    return r;
}

/* One file carries all locks: a key's is the byte at the offset that its first 60 bits name. */
int rt_cache_lock(const char *dir, const char key[65]) {
    char path[PATH_MAX], digits[16];
    memcpy(digits, key, 15);
    digits[15] = 0;
    struct flock lock = {.l_type = F_WRLCK,
                         .l_whence = SEEK_SET,
                         .l_start = (off_t)strtoull(digits, NULL, 16),
                         .l_len = 1};
    if (snprintf(path, sizeof path, "%s/lock", dir) >= (int)sizeof path)
        return -1;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    while (fd >= 0 && fcntl(fd, F_OFD_SETLKW, &lock)) {
        if (errno == EINTR)
            continue;
        close(fd);
        return -1;
    }
    return fd;
}
