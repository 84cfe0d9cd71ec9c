/* Safetensors files: 8 bytes of header length, a JSON header, the tensors' bytes.
 *
 * The header of a large checkpoint has 17 MB and 138,000 tensors, so it is read in one pass into
 * a sorted index, and the bytes are mapped. A file is taken only when it is sound as a whole:
 * every tensor inside the file, of the size its shape says, none over another, no gap, no name
 * twice. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_HEADER = 256 << 20, MAX_INDEX = 256 << 20, MAX_DEPTH = 32 };

static const char *const dtype_names[] = {
#define X(name, spelling, bits) spelling,
    RT_DTYPES(X)
#undef X
};
static const int dtype_bits[] = {
#define X(name, spelling, bits) bits,
    RT_DTYPES(X)
#undef X
};

/* ---- a strict JSON reader over a private copy of the text ---- */

/* Strings are decoded in place (a decoded string is never longer than its source) and
 * NUL-terminated over their closing quote. The first error sticks and stops everything. */
struct json {
    const char *file;
    char *at, *end, *start;
    bool failed;
};

static bool json_fail(struct json *j, const char *what) {
    if (!j->failed)
        rt_fail(MOERT_CORRUPT, "%s: header, byte %td: %s", j->file, j->at - j->start, what);
    j->failed = true;
    return false;
}

static void json_space(struct json *j) {
    while (j->at < j->end && strchr(" \t\n\r", *j->at) && *j->at)
        j->at++;
}

static bool json_peek(struct json *j, char c) {
    json_space(j);
    return !j->failed && j->at < j->end && *j->at == c;
}

static bool json_take(struct json *j, char c) {
    if (!json_peek(j, c))
        return false;
    j->at++;
    return true;
}

static bool json_expect(struct json *j, char c) {
    if (json_take(j, c))
        return true;
    char what[] = "expected 'x'";
    what[10] = c;
    return json_fail(j, what);
}

static int json_hex4(struct json *j) {
    int v = 0;
    for (int i = 0; i < 4; i++) {
        char c = j->at < j->end ? *j->at++ : 0;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) {
            json_fail(j, "bad \\u escape");
            return 0;
        }
        v = v << 4 | digit;
    }
    return v;
}

/* After "\u". Surrogates must come in pairs; U+0000 would end a name early. */
static char *json_unicode(struct json *j, char *to) {
    int v = json_hex4(j);
    if (v >= 0xd800 && v < 0xdc00) {
        int low = 0;
        if (j->end - j->at >= 6 && j->at[0] == '\\' && j->at[1] == 'u') {
            j->at += 2;
            low = json_hex4(j);
        }
        if (low < 0xdc00 || low > 0xdfff)
            json_fail(j, "half a surrogate pair");
        v = 0x10000 + ((v - 0xd800) << 10) + (low - 0xdc00);
    } else if (!v || (v >= 0xdc00 && v < 0xe000)) {
        json_fail(j, "bad \\u escape");
    }
    if (v < 0x80) {
        *to++ = (char)v;
    } else if (v < 0x800) {
        *to++ = (char)(0xc0 | v >> 6);
        *to++ = (char)(0x80 | (v & 63));
    } else {
        if (v < 0x10000) {
            *to++ = (char)(0xe0 | v >> 12);
        } else {
            *to++ = (char)(0xf0 | v >> 18);
            *to++ = (char)(0x80 | (v >> 12 & 63));
        }
        *to++ = (char)(0x80 | (v >> 6 & 63));
        *to++ = (char)(0x80 | (v & 63));
    }
    return to;
}

/* NULL after an error. */
static char *json_string(struct json *j) {
    if (!json_expect(j, '"'))
        return NULL;
    char *text = j->at, *to = text;
    while (!j->failed && j->at < j->end && *j->at != '"') {
        unsigned char c = (unsigned char)*j->at++;
        if (c < ' ') {
            json_fail(j, "control character in a string");
        } else if (c != '\\') {
            *to++ = (char)c;
        } else {
            static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
            char e = j->at < j->end ? *j->at++ : 0;
            const char *known = e ? strchr(from, e) : NULL;
            if (known)
                *to++ = into[known - from];
            else if (e == 'u')
                to = json_unicode(j, to);
            else
                json_fail(j, "unknown escape");
        }
    }
    if (!j->failed && j->at >= j->end)
        json_fail(j, "string without end");
    if (j->failed)
        return NULL;
    j->at++;
    *to = 0;
    return text;
}

/* A non-negative integer below 2^62. */
static bool json_int(struct json *j, int64_t *out) {
    json_space(j);
    int64_t v = 0;
    char *first = j->at;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9' && v < INT64_MAX / 20)
        v = v * 10 + (*j->at++ - '0');
    if (j->at == first || (*first == '0' && j->at - first > 1) ||
        (j->at < j->end && strchr("0123456789.eE", *j->at) && *j->at))
        return json_fail(j, "expected a whole number");
    *out = v;
    return true;
}

/* "key": ; false at the object's end or after an error. */
static bool json_key(struct json *j, bool first, char **key) {
    if (json_take(j, '}'))
        return false;
    if (!first && !json_expect(j, ','))
        return false;
    *key = json_string(j);
    return *key && json_expect(j, ':');
}

static void json_skip(struct json *j, int depth);

static void json_skip_object(struct json *j, int depth) {
    char *key;
    for (bool first = true; json_key(j, first, &key); first = false)
        json_skip(j, depth);
}

static void json_skip_list(struct json *j, int depth) {
    for (bool first = true; !j->failed && !json_take(j, ']'); first = false)
        if (first || json_expect(j, ','))
            json_skip(j, depth);
}

static void json_skip(struct json *j, int depth) {
    if (depth > MAX_DEPTH) {
        json_fail(j, "too deep");
    } else if (json_peek(j, '"')) {
        json_string(j);
    } else if (json_take(j, '{')) {
        json_skip_object(j, depth + 1);
    } else if (json_take(j, '[')) {
        json_skip_list(j, depth + 1);
    } else { /* a number, true, false or null */
        json_space(j);
        size_t n = 0, left = (size_t)(j->end - j->at);
        while (n < left && j->at[n] &&
               strchr("+-.0123456789abcdefghijklmnopqrstuvwxyzE", j->at[n]))
            n++;
        if (!n)
            json_fail(j, "expected a value");
        j->at += n;
    }
}

/* ---- one file ---- */

struct entry { /* a tensor of a file */
    const char *name;
    const char *dtype;
    int rank;
    int64_t shape[RT_MAX_RANK];
    int64_t begin, end; /* bytes behind the header */
};

struct shard {
    const char *path;
    bool open;
    unsigned char *map;
    size_t map_bytes;
    char *header;          /* a copy; strings of the entries point into it */
    struct entry *entries; /* ascending names */
    int num_entries, cap;
    size_t data; /* where the tensors' bytes begin */
};

static bool read_shape(struct json *j, struct entry *e) {
    if (!json_expect(j, '['))
        return false;
    while (!json_take(j, ']')) {
        if (e->rank == RT_MAX_RANK)
            return json_fail(j, "more than 8 dimensions");
        if ((e->rank && !json_expect(j, ',')) || !json_int(j, &e->shape[e->rank]))
            return false;
        e->rank++;
    }
    return true;
}

static bool read_entry(struct json *j, struct entry *e) {
    char *key;
    bool dtype = false, shape = false, offsets = false;
    if (!json_expect(j, '{'))
        return false;
    for (bool first = true; json_key(j, first, &key); first = false) {
        bool *seen = !strcmp(key, "dtype")          ? &dtype
                     : !strcmp(key, "shape")        ? &shape
                     : !strcmp(key, "data_offsets") ? &offsets
                                                    : NULL;
        if (!seen || *seen)
            return json_fail(j, seen ? "a key comes twice" : "unknown key of a tensor");
        *seen = true;
        if (seen == &dtype)
            e->dtype = json_string(j);
        else if (seen == &shape)
            read_shape(j, e);
        else if (json_expect(j, '[') && json_int(j, &e->begin) && json_expect(j, ',') &&
                 json_int(j, &e->end))
            json_expect(j, ']');
    }
    return !j->failed && ((dtype && shape && offsets) ||
                          json_fail(j, "a tensor needs dtype, shape and data_offsets"));
}

static struct entry *new_entry(struct shard *s) {
    if (s->num_entries == s->cap) {
        int cap = s->cap ? 2 * s->cap : 64;
        struct entry *grown = realloc(s->entries, (size_t)cap * sizeof *grown);
        if (!grown)
            return NULL;
        s->entries = grown;
        s->cap = cap;
    }
    struct entry *e = &s->entries[s->num_entries++];
    memset(e, 0, sizeof *e);
    return e;
}

static moert_result read_header(struct shard *s, size_t bytes) {
    struct json j = {s->path, s->header, s->header + bytes, s->header, false};
    char *name;
    json_expect(&j, '{');
    for (bool first = true; !j.failed && json_key(&j, first, &name); first = false) {
        if (!strcmp(name, "__metadata__")) {
            json_skip(&j, 0);
            continue;
        }
        struct entry *e = new_entry(s);
        if (!e)
            return rt_no_memory((size_t)s->num_entries * sizeof *e);
        e->name = name;
        if (!read_entry(&j, e))
            break;
    }
    json_space(&j);
    if (!j.failed && j.at != j.end)
        json_fail(&j, "text behind the header's object");
    return j.failed ? MOERT_CORRUPT : MOERT_OK;
}

static enum rt_dtype find_dtype(const char *spelling) {
    int i = 0;
    while (i < RT_DTYPE_COUNT && strcmp(dtype_names[i], spelling))
        i++;
    return (enum rt_dtype)i;
}

/* Bytes of the shape; -1 when they do not fit, or the type is not known. */
static int64_t entry_bytes(const struct entry *e) {
    enum rt_dtype dtype = find_dtype(e->dtype);
    if (dtype == RT_DTYPE_COUNT)
        return -1;
    int64_t n = dtype_bits[dtype] / 8;
    for (int i = 0; i < e->rank; i++)
        if (__builtin_mul_overflow(n, e->shape[i], &n))
            return -1;
    return n;
}

static int by_offset(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_name(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* The tensors cover the file behind the header exactly; names are distinct. Leaves the entries
 * in order of names. */
static moert_result check_entries(struct shard *s) {
    int64_t at = 0, data_bytes = (int64_t)(s->map_bytes - s->data);
    if (s->num_entries)
        qsort(s->entries, (size_t)s->num_entries, sizeof *s->entries, by_offset);
    for (int i = 0; i < s->num_entries; i++) {
        const struct entry *e = &s->entries[i];
        if (e->begin > e->end || e->end > data_bytes)
            return rt_fail(MOERT_CORRUPT, "%s: tensor %s lies outside the file (truncated?)",
                           s->path, e->name);
        if (e->begin != at)
            return rt_fail(MOERT_CORRUPT, "%s: tensor %s lies over another or behind a gap",
                           s->path, e->name);
        if (find_dtype(e->dtype) != RT_DTYPE_COUNT && entry_bytes(e) != e->end - e->begin)
            return rt_fail(MOERT_CORRUPT,
                           "%s: tensor %s has %lld bytes, not what its shape says", s->path,
                           e->name, (long long)(e->end - e->begin));
        at = e->end;
    }
    if (at != data_bytes)
        return rt_fail(MOERT_CORRUPT, "%s: %lld bytes belong to no tensor", s->path,
                       (long long)(data_bytes - at));
    if (s->num_entries)
        qsort(s->entries, (size_t)s->num_entries, sizeof *s->entries, by_name);
    for (int i = 1; i < s->num_entries; i++)
        if (!strcmp(s->entries[i - 1].name, s->entries[i].name))
            return rt_fail(MOERT_CORRUPT, "%s: tensor %s comes twice", s->path,
                           s->entries[i].name);
    return MOERT_OK;
}

/* Maps a regular file read-only. An empty one maps nothing. */
static moert_result map_file(const char *path, unsigned char **map, size_t *bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return rt_system("cannot open", path);
    struct stat st;
    moert_result r = MOERT_OK;
    if (fstat(fd, &st) < 0) {
        r = rt_system("cannot stat", path);
    } else if (!S_ISREG(st.st_mode)) {
        r = rt_fail(MOERT_INVALID, "%s is not a regular file", path);
    } else if ((*bytes = (size_t)st.st_size)) {
        void *p = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED)
            r = rt_system("cannot map", path);
        else
            *map = p;
    }
    close(fd);
    return r;
}

static void shard_close(struct shard *s) {
    if (s->map)
        munmap(s->map, s->map_bytes);
    free(s->entries);
    free(s->header);
    s->map = NULL;
    s->entries = NULL;
    s->header = NULL;
    s->num_entries = s->cap = 0;
    s->open = false;
}

static moert_result shard_read(struct shard *s) {
    RT_TRY(map_file(s->path, &s->map, &s->map_bytes));
    uint64_t header = 0;
    if (s->map_bytes < sizeof header)
        return rt_fail(MOERT_CORRUPT, "%s: too short for a safetensors file", s->path);
    memcpy(&header, s->map, sizeof header);
    if (header > s->map_bytes - sizeof header || header > MAX_HEADER)
        return rt_fail(MOERT_CORRUPT,
                       "%s: no safetensors file, or truncated: header of %llu bytes", s->path,
                       (unsigned long long)header);
    if (!(s->header = malloc(header + 1)))
        return rt_no_memory(header + 1);
    memcpy(s->header, s->map + sizeof header, header);
    s->header[header] = 0;
    s->data = sizeof header + header;
    RT_TRY(read_header(s, header));
    return check_entries(s);
}

static moert_result shard_open(struct shard *s) {
    if (s->open)
        return MOERT_OK;
    moert_result r = shard_read(s);
    if (r != MOERT_OK)
        shard_close(s);
    else
        s->open = true;
    return r;
}

static const struct entry *shard_find(const struct shard *s, const char *name) {
    struct entry key = {.name = name};
    if (!s->num_entries)
        return NULL;
    return bsearch(&key, s->entries, (size_t)s->num_entries, sizeof key, by_name);
}

/* ---- a checkpoint: names over shards ---- */

struct name {
    const char *name;
    int shard;
};

struct rt_checkpoint {
    char *index; /* model.safetensors.index.json; names point into it */
    struct shard *shards;
    int num_shards;
    struct name *names; /* ascending */
    int num_names, cap;
};

static char *join(const char *dir, const char *file) {
    char *path = malloc(strlen(dir) + strlen(file) + 2);
    if (path)
        sprintf(path, "%s/%s", dir, file);
    return path;
}

/* Takes the path over. */
static moert_result add_shard(struct rt_checkpoint *c, char *path, int *out) {
    struct shard *grown =
        path ? realloc(c->shards, ((size_t)c->num_shards + 1) * sizeof *grown) : NULL;
    if (!grown) {
        free(path);
        return rt_no_memory(sizeof *grown);
    }
    c->shards = grown;
    *out = c->num_shards++;
    c->shards[*out] = (struct shard){.path = path};
    return MOERT_OK;
}

static moert_result add_name(struct rt_checkpoint *c, const char *name, int shard) {
    if (c->num_names == c->cap) {
        int cap = c->cap ? 2 * c->cap : 256;
        struct name *grown = realloc(c->names, (size_t)cap * sizeof *grown);
        if (!grown)
            return rt_no_memory((size_t)cap * sizeof *grown);
        c->names = grown;
        c->cap = cap;
    }
    c->names[c->num_names++] = (struct name){name, shard};
    return MOERT_OK;
}

static moert_result open_single(struct rt_checkpoint *c, char *path) {
    int shard = 0;
    RT_TRY(add_shard(c, path, &shard));
    struct shard *s = &c->shards[shard];
    RT_TRY(shard_open(s));
    for (int i = 0; i < s->num_entries; i++)
        RT_TRY(add_name(c, s->entries[i].name, shard));
    return MOERT_OK;
}

/* A shard is a plain file name beside the index. Most names repeat the one before. */
static moert_result find_shard(struct rt_checkpoint *c, const char *dir, const char *file,
                               int *out) {
    if (!*file || strchr(file, '/') || !strcmp(file, ".") || !strcmp(file, ".."))
        return rt_fail(MOERT_CORRUPT, "%s/model.safetensors.index.json: bad file name \"%s\"",
                       dir, file);
    size_t skip = strlen(dir) + 1;
    for (int i = c->num_shards; i-- > 0;)
        if (!strcmp(c->shards[i].path + skip, file)) {
            *out = i;
            return MOERT_OK;
        }
    return add_shard(c, join(dir, file), out);
}

static moert_result read_weight_map(struct rt_checkpoint *c, struct json *j, const char *dir) {
    char *name;
    json_expect(j, '{');
    for (bool first = true; !j->failed && json_key(j, first, &name); first = false) {
        const char *file = json_string(j);
        int shard = 0;
        if (!file)
            break;
        RT_TRY(find_shard(c, dir, file, &shard));
        RT_TRY(add_name(c, name, shard));
    }
    return j->failed ? MOERT_CORRUPT : MOERT_OK;
}

static int compare_names(const void *a, const void *b) {
    const struct name *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static moert_result read_index(struct rt_checkpoint *c, const char *path, const char *dir,
                               size_t bytes) {
    struct json j = {path, c->index, c->index + bytes, c->index, false};
    char *key;
    bool found = false;
    json_expect(&j, '{');
    for (bool first = true; !j.failed && json_key(&j, first, &key); first = false) {
        if (strcmp(key, "weight_map")) {
            json_skip(&j, 0);
            continue;
        }
        if (found)
            json_fail(&j, "weight_map comes twice");
        found = true;
        RT_TRY(read_weight_map(c, &j, dir));
    }
    json_space(&j);
    if (!j.failed && (!found || j.at != j.end))
        json_fail(&j, found ? "text behind the index" : "no weight_map");
    if (j.failed)
        return MOERT_CORRUPT;
    if (c->num_names)
        qsort(c->names, (size_t)c->num_names, sizeof *c->names, compare_names);
    for (int i = 1; i < c->num_names; i++)
        if (!strcmp(c->names[i - 1].name, c->names[i].name))
            return rt_fail(MOERT_CORRUPT, "%s: tensor %s comes twice", path, c->names[i].name);
    return MOERT_OK;
}

static moert_result open_index(struct rt_checkpoint *c, const char *path, const char *dir) {
    unsigned char *map = NULL;
    size_t bytes = 0;
    RT_TRY(map_file(path, &map, &bytes));
    if (bytes <= MAX_INDEX && (c->index = malloc(bytes + 1))) {
        if (bytes)
            memcpy(c->index, map, bytes);
        c->index[bytes] = 0;
    }
    if (map)
        munmap(map, bytes);
    if (bytes > MAX_INDEX)
        return rt_fail(MOERT_CORRUPT, "%s: %zu bytes are no index", path, bytes);
    return c->index ? read_index(c, path, dir, bytes) : rt_no_memory(bytes + 1);
}

static moert_result open_folder(struct rt_checkpoint *c, const char *dir) {
    char *single = join(dir, "model.safetensors");
    if (!single)
        return rt_no_memory(PATH_MAX);
    if (!access(single, F_OK))
        return open_single(c, single);
    free(single);
    char *index = join(dir, "model.safetensors.index.json");
    if (!index)
        return rt_no_memory(PATH_MAX);
    moert_result r = access(index, F_OK) ? rt_fail(MOERT_NOT_FOUND,
                                                   "%s: neither model.safetensors nor "
                                                   "model.safetensors.index.json",
                                                   dir)
                                         : open_index(c, index, dir);
    free(index);
    return r;
}

static moert_result open_path(struct rt_checkpoint *c, const char *path) {
    struct stat st;
    if (stat(path, &st) < 0)
        return rt_system("cannot open", path);
    if (S_ISDIR(st.st_mode))
        return open_folder(c, path);
    char *copy = strdup(path);
    return copy ? open_single(c, copy) : rt_no_memory(strlen(path));
}

moert_result rt_checkpoint_open(const char *path, struct rt_checkpoint **out) {
    struct rt_checkpoint *c = calloc(1, sizeof *c);
    if (!c)
        return rt_no_memory(sizeof *c);
    moert_result r = open_path(c, path);
    if (r != MOERT_OK) {
        rt_checkpoint_close(c);
        return r;
    }
    *out = c;
    return MOERT_OK;
}

void rt_checkpoint_close(struct rt_checkpoint *c) {
    if (!c)
        return;
    for (int i = 0; i < c->num_shards; i++) {
        shard_close(&c->shards[i]);
        free((char *)c->shards[i].path);
    }
    free(c->shards);
    free(c->names);
    free(c->index);
    free(c);
}

int rt_checkpoint_count(const struct rt_checkpoint *c) {
    return c->num_names;
}

const char *rt_checkpoint_name(const struct rt_checkpoint *c, int i) {
    return c->names[i].name;
}

int rt_checkpoint_lower(const struct rt_checkpoint *c, const char *name) {
    int low = 0, high = c->num_names;
    while (low < high) {
        int mid = (low + high) / 2;
        if (strcmp(c->names[mid].name, name) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

int rt_checkpoint_index(const struct rt_checkpoint *c, const char *name) {
    int i = rt_checkpoint_lower(c, name);
    return i < c->num_names && !strcmp(c->names[i].name, name) ? i : -1;
}

moert_result rt_checkpoint_get(struct rt_checkpoint *c, int i, struct rt_tensor *out) {
    struct shard *s = &c->shards[c->names[i].shard];
    RT_TRY(shard_open(s));
    const struct entry *e = shard_find(s, c->names[i].name);
    if (!e)
        return rt_fail(MOERT_CORRUPT, "%s: tensor %s is not there, though the index says so",
                       s->path, c->names[i].name);
    out->name = e->name;
    out->dtype = find_dtype(e->dtype);
    out->dtype_name = e->dtype;
    out->rank = e->rank;
    memcpy(out->shape, e->shape, sizeof out->shape);
    out->data = s->map + s->data + e->begin;
    out->bytes = (size_t)(e->end - e->begin);
    return MOERT_OK;
}
