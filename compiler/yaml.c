/* YAML and JSON to a tree of nodes, and typed reads from it.
 *
 * libyaml gives events; this file adds exact places, the limits, and the refusals: what a
 * deployment never needs (aliases, tags, several documents, duplicate keys) is an error. JSON is
 * parsed as the YAML it nearly is; surrogate pairs, which libyaml rejects, are rewritten first. */
#define _GNU_SOURCE 1 /* memmem */
#include "moec.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml.h>

enum {
    MAX_BYTES = 64 << 20,
    MAX_DEPTH = 64,
    MAX_SCALAR = 1 << 20,
    MAX_NODES = 4 << 20,
    MAX_KEY = 1024,      /* libyaml's */
    PAIR_BYTES = 12,     /* \ud83d\ude00 in the file */
    PAIR_REWRITTEN = 10, /* \U0001f600 as libyaml sees it */
};

struct parser {
    struct arena *arena;
    struct diags *diags;
    struct source *source;
    yaml_parser_t yaml;
    yaml_event_t event;
    bool failed; /* an error that parsing went on after */
    int nodes;
    /* Children of the open collections, innermost on top. */
    struct node **stack;
    size_t height, capacity;
    /* Offsets of the rewritten surrogate pairs, ascending. */
    size_t *pairs;
    int num_pairs;
    /* libyaml counts characters, a diagnostic bytes: the last place that was translated. */
    struct {
        size_t chars, offset, line_start;
        int line, pair;
    } at;
};

/* ---- places ---- */

static size_t char_bytes(const char *text, size_t offset, size_t len) {
    size_t n = 1;
    while (offset + n < len && ((unsigned char)text[offset + n] & 0xc0) == 0x80)
        n++;
    return n;
}

/* The place of libyaml's character index; moves forward from the last one asked for. */
static struct loc loc_of(struct parser *p, size_t chars) {
    const struct source *s = p->source;
    if (chars < p->at.chars || !p->at.line) {
        memset(&p->at, 0, sizeof p->at);
        p->at.line = 1;
    }
    while (p->at.chars < chars && p->at.offset < s->len) {
        if (p->at.pair < p->num_pairs && p->pairs[p->at.pair] == p->at.offset) {
            p->at.pair++;
            p->at.chars += PAIR_REWRITTEN;
            p->at.offset += PAIR_BYTES;
            continue;
        }
        bool newline = s->text[p->at.offset] == '\n';
        p->at.chars++;
        p->at.offset += char_bytes(s->text, p->at.offset, s->len);
        if (newline) {
            p->at.line++;
            p->at.line_start = p->at.offset;
        }
    }
    return (struct loc){s, p->at.line, (int)(p->at.offset - p->at.line_start) + 1};
}

static struct loc loc_of_byte(struct parser *p, size_t offset) {
    struct loc loc = {p->source, 1, 1};
    for (size_t i = 0; i < offset && i < p->source->len; i++) {
        loc.col++;
        if (p->source->text[i] == '\n') {
            loc.line++;
            loc.col = 1;
        }
    }
    return loc;
}

/* ---- surrogate pairs ---- */

static int hex4(const char *s, const char *end) {
    int v = 0;
    if (end - s < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        const char *digits = "0123456789abcdef0123456789ABCDEF";
        const char *d = s[i] ? strchr(digits, s[i]) : NULL;
        if (!d)
            return -1;
        v = v * 16 + (int)(d - digits) % 16;
    }
    return v;
}

/* The surrogate that the escape at s (at its backslash) spells, or 0. */
static int surrogate(const char *s, const char *end) {
    int v = end - s >= 6 && s[0] == '\\' && s[1] == 'u' ? hex4(s + 2, end) : -1;
    return v >= 0xd800 && v <= 0xdfff ? v : 0;
}

static void remember_pair(struct parser *p, size_t offset) {
    if (!(p->num_pairs & (p->num_pairs - 1))) { /* grows at 0, 1, 2, 4, ... */
        size_t *grown = arena_array(p->arena, size_t, p->num_pairs ? p->num_pairs * 2 : 1);
        if (p->num_pairs)
            memcpy(grown, p->pairs, sizeof *grown * (size_t)p->num_pairs);
        p->pairs = grown;
    }
    p->pairs[p->num_pairs++] = offset;
}

/* The pair at s in libyaml's spelling, with what stands before it since *done; false with an error
 * when it is half a pair. */
static bool join_pair(struct parser *p, const char *text, const char *end, const char *s,
                      const char **done, struct buf *out) {
    int high = surrogate(s, end), low = surrogate(s + 6, end);
    if (high >= 0xdc00 || low < 0xdc00) {
        diag_error(p->diags, loc_of_byte(p, (size_t)(s - text)),
                   "'%.6s' is half of a surrogate pair", s);
        return false;
    }
    buf_add(out, *done, (size_t)(s - *done));
    buf_printf(out, "\\U%08x", 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00));
    remember_pair(p, (size_t)(s - text));
    *done = s + PAIR_BYTES;
    return true;
}

/* Rewrites \uHHHH\uLLLL in double-quoted strings; NULL with an error when there is half a pair.
 * Only JSON needs it, and only there are double quotes sure to mean a string. */
static const char *join_surrogates(struct parser *p, const char *text, size_t *len) {
    const char *s = text, *end = text + *len, *done = text;
    if (*len >= 3 && !memcmp(s, "\xef\xbb\xbf", 3)) /* byte order mark */
        s += 3;
    while (s < end && strchr(" \t\r\n", *s))
        s++;
    if (s == end || (*s != '{' && *s != '[') || !memmem(s, (size_t)(end - s), "\\u", 2))
        return text;
    struct buf out = {.arena = p->arena};
    bool string = false;
    for (; s < end; s++) {
        string ^= *s == '"';
        if (!string || *s != '\\')
            continue;
        if (!surrogate(s, end))
            s++; /* the escaped character opens and closes nothing */
        else if (join_pair(p, text, end, s, &done, &out))
            s = done - 1;
        else
            return NULL;
    }
    if (!p->num_pairs)
        return text;
    buf_add(&out, done, (size_t)(end - done));
    *len = out.len;
    return out.data;
}

/* ---- syntax errors ---- */

/* libyaml's words, and ours where its are of no help. */
static const struct {
    const char *theirs, *ours;
} messages[] = {
    {"mapping values are not allowed in this context", "unexpected ':'"},
    {"block sequence entries are not allowed in this context", "a list cannot start here"},
    {"mapping keys are not allowed in this context", "a key cannot start here"},
    {"did not find expected key",
     "expected a key (is the line indented like the ones above it?)"},
    {"did not find expected '-' indicator",
     "expected '-' (is the line indented like the ones above it?)"},
    {"did not find expected ',' or '}'", "expected ',' or '}'"},
    {"did not find expected ',' or ']'", "expected ',' or ']'"},
    {"did not find expected node content", "expected a value"},
    {"did not find expected <document start>", "expected the end of the file"},
    {"found character that cannot start any token",
     "this character cannot start a value (put the value in quotes)"},
    {"found unexpected document indicator", "a document ends inside a quoted string"},
    {"found a tab character that violates indentation", "a tab cannot indent; use spaces"},
    {"found a tab character where an indentation space is expected",
     "a tab cannot indent; use spaces"},
    {"found unknown escape character", "unknown escape sequence in a quoted string"},
    {"found invalid Unicode character escape code", "this escape is no Unicode character"},
    {"found incompatible YAML document", "this YAML version is not accepted; 1.1 and 1.2 are"},
    {"control characters are not allowed", "a control character, which is not allowed"},
};

static const char *our_words(const char *problem) {
    for (size_t i = 0; i < sizeof messages / sizeof *messages; i++)
        if (!strcmp(messages[i].theirs, problem))
            return messages[i].ours;
    return problem;
}

static void bad_encoding(struct parser *p) {
    size_t offset = p->yaml.problem_offset;
    for (int i = 0; i < p->num_pairs && p->pairs[i] < offset; i++)
        offset += PAIR_BYTES - PAIR_REWRITTEN;
    struct loc loc = loc_of_byte(p, offset);
    if (!strcmp(p->yaml.problem, "control characters are not allowed"))
        diag_error(p->diags, loc, "control character 0x%02x, which is not allowed",
                   (unsigned)p->yaml.problem_value);
    else
        diag_error(p->diags, loc, "not UTF-8: %s", p->yaml.problem);
}

/* The character that the last translated place points at; NUL at the end of the file. */
static char char_at(const struct parser *p) {
    return p->at.offset < p->source->len ? p->source->text[p->at.offset] : 0;
}

/* Whether that place has only spaces before it on its line. */
static bool leads_line(const struct parser *p) {
    for (size_t i = p->at.line_start; i < p->at.offset; i++)
        if (p->source->text[i] != ' ')
            return false;
    return true;
}

/* A ':' that libyaml did not expect: which of the usual reasons it is. */
static const char *stray_colon(const struct parser *p, const char *words) {
    const char *text = p->source->text;
    size_t at = p->at.offset, end = at;
    while (end && strchr(" \t\r\n", text[end - 1]))
        end--;
    size_t open = end - (end > 0);
    while (open && (text[open - 1] != '"' || (open > 1 && text[open - 2] == '\\')))
        open--;
    bool string = end && text[end - 1] == '"';
    if (at - p->at.line_start > MAX_KEY && (!string || end - open > MAX_KEY))
        return "keys longer than 1024 characters are not accepted";
    if (string && memchr(text + end, '\n', at - end))
        return "the ':' must be on the line of its key";
    if (!strncmp(words, "expected", 8))
        return arena_printf(p->arena, "%s before ':' (is one missing before this key?)", words);
    if (memmem(text + p->at.line_start, at - p->at.line_start, ": ", 2))
        return "unexpected ':' (a value that holds ': ' needs quotes)";
    return "unexpected ':' (does the line above lack its ':'?)";
}

static const char *explain(const struct parser *p, const char *words) {
    if (char_at(p) == ':' &&
        (!strncmp(words, "expected ','", 12) || !strncmp(words, "unexpected ':'", 14)))
        return stray_colon(p, words);
    if (char_at(p) == '\t' && !strncmp(words, "this character", 14))
        return "a tab cannot indent; use spaces";
    if (p->at.offset >= p->source->len && !strncmp(words, "expected", 8))
        return arena_printf(p->arena, "%s, but the text ends", words);
    if (!strncmp(words, "expected a key", 14) && !leads_line(p))
        return "unexpected text after a value";
    if (!strcmp(words, "expected the end of the file") && leads_line(p))
        return "expected the end of the file (is the line indented like the ones above it?)";
    return words;
}

static void syntax_error(struct parser *p) {
    const yaml_parser_t *y = &p->yaml;
    if (y->error == YAML_MEMORY_ERROR)
        abort();
    if (y->error == YAML_READER_ERROR) {
        bad_encoding(p);
        return;
    }
    static const char *const at_start[][2] = {
        {"found unexpected end of stream", "this string has no closing quote"},
        {"could not find expected ':'", "expected ':' after this key"},
    };
    for (int i = 0; i < 2; i++)
        if (!strcmp(y->problem, at_start[i][0])) {
            diag_error(p->diags, loc_of(p, y->context_mark.index), "%s", at_start[i][1]);
            return;
        }
    struct loc loc = loc_of(p, y->problem_mark.index);
    diag_error(p->diags, loc, "%s", explain(p, our_words(y->problem)));
    if (!y->context || y->context_mark.index >= y->problem_mark.index)
        return;
    const char *what = strstr(y->context, "sequence") || strstr(y->context, "collection")
                           ? "list"
                       : strstr(y->context, "mapping") ? "map"
                                                       : NULL;
    if (what)
        diag_add(p->diags, DIAG_NOTE, loc_of(p, y->context_mark.index), "the %s starts here",
                 what);
}

/* ---- events to nodes ---- */

static bool next(struct parser *p) {
    yaml_event_delete(&p->event);
    if (yaml_parser_parse(&p->yaml, &p->event))
        return true;
    syntax_error(p);
    return false;
}

__attribute__((format(printf, 3, 4))) static void refuse(struct parser *p, struct loc loc,
                                                         const char *fmt, ...) {
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    diag_error(p->diags, loc, "%s", text);
    p->failed = true;
}

static void refuse_properties(struct parser *p, struct loc loc, const yaml_char_t *anchor,
                              const yaml_char_t *tag) {
    if (anchor)
        refuse(p, loc, "anchors are not accepted ('&%.40s'): write the value where it is used",
               anchor);
    if (tag)
        refuse(p, loc, "tags are not accepted ('%.60s'): write the plain value", tag);
}

static void push(struct parser *p, struct node *n) {
    if (p->height == p->capacity) {
        p->capacity = p->capacity ? p->capacity * 2 : 256;
        p->stack = realloc(p->stack, p->capacity * sizeof(struct node *));
        if (!p->stack)
            abort();
    }
    p->stack[p->height++] = n;
}

static struct node *node_new(struct parser *p, enum node_kind kind) {
    struct node *n = arena_array(p->arena, struct node, 1);
    n->kind = kind;
    n->loc = loc_of(p, p->event.start_mark.index);
    if (++p->nodes <= MAX_NODES)
        return n;
    diag_error(p->diags, n->loc, "more than %d values in one file", MAX_NODES);
    return NULL;
}

static struct node *scalar(struct parser *p) {
    struct node *n = node_new(p, NODE_SCALAR);
    if (!n)
        return NULL;
    size_t len = p->event.data.scalar.length;
    const char *text = (const char *)p->event.data.scalar.value;
    n->quoted = p->event.data.scalar.style != YAML_PLAIN_SCALAR_STYLE;
    refuse_properties(p, n->loc, p->event.data.scalar.anchor, p->event.data.scalar.tag);
    if (len > MAX_SCALAR)
        refuse(p, n->loc, "a value of %zu bytes; the limit is %d", len, MAX_SCALAR);
    else if (memchr(text, 0, len))
        refuse(p, n->loc, "a NUL character inside a string");
    n->text = arena_strdup(p->arena, text);
    return n;
}

static struct node *node_read(struct parser *p, int depth);

/* Items until the end event, on the stack; from the event after the start. */
static bool children(struct parser *p, yaml_event_type_t end, int depth) {
    while (next(p)) {
        if (p->event.type == end)
            return true;
        struct node *n = node_read(p, depth + 1);
        if (!n)
            return false;
        push(p, n);
    }
    return false;
}

/* Pointers into a map's keys: by text, then as they stand in the file. */
static int by_text(const void *a, const void *b) {
    struct node *const *x = *(struct node *const *const *)a;
    struct node *const *y = *(struct node *const *const *)b;
    int c = strcmp((*x)->text, (*y)->text);
    return c ? c : (x > y) - (x < y);
}

static void refuse_duplicates(struct parser *p, const struct node *map) {
    size_t n = (size_t)map->count;
    struct node ***sorted = calloc(n + 1, sizeof *sorted),
                **first = calloc(n + 1, sizeof *first);
    if (!sorted || !first)
        abort();
    for (size_t i = 0; i < n; i++)
        sorted[i] = &map->keys[i];
    qsort(sorted, n, sizeof *sorted, by_text);
    for (size_t i = 1, head = 0; i < n; i++)
        if (strcmp((*sorted[i])->text, (*sorted[head])->text))
            head = i;
        else
            first[sorted[i] - map->keys] = *sorted[head];
    for (size_t i = 0; i < n; i++) {
        if (!first[i])
            continue;
        refuse(p, map->keys[i]->loc, "duplicate key '%.60s'", map->keys[i]->text);
        diag_add(p->diags, DIAG_NOTE, first[i]->loc, "first given here");
    }
    free(sorted);
    free(first);
}

static bool keys_are_names(struct parser *p, const struct node *map) {
    bool ok = true;
    for (int i = 0; i < map->count; i++) {
        if (map->keys[i]->kind != NODE_SCALAR)
            refuse(p, map->keys[i]->loc, "a key must be a name, but is a %s",
                   map->keys[i]->kind == NODE_LIST ? "list" : "map");
        else if (!map->keys[i]->text[0] && !map->keys[i]->quoted)
            refuse(p, map->keys[i]->loc, "a key is missing before ':'");
        else
            continue;
        ok = false;
    }
    return ok;
}

static struct node *collection(struct parser *p, int depth) {
    bool list = p->event.type == YAML_SEQUENCE_START_EVENT;
    struct node *n = node_new(p, list ? NODE_LIST : NODE_MAP);
    if (!n)
        return NULL;
    if (list)
        refuse_properties(p, n->loc, p->event.data.sequence_start.anchor,
                          p->event.data.sequence_start.tag);
    else
        refuse_properties(p, n->loc, p->event.data.mapping_start.anchor,
                          p->event.data.mapping_start.tag);
    if (depth >= MAX_DEPTH) {
        diag_error(p->diags, n->loc, "lists and maps are nested more than %d deep", MAX_DEPTH);
        return NULL;
    }
    size_t base = p->height;
    if (!children(p, list ? YAML_SEQUENCE_END_EVENT : YAML_MAPPING_END_EVENT, depth))
        return NULL;
    int step = list ? 1 : 2;
    n->count = (int)(p->height - base) / step;
    n->items = arena_array(p->arena, struct node *, n->count);
    n->keys = list ? NULL : arena_array(p->arena, struct node *, n->count);
    for (int i = 0; i < n->count; i++) {
        if (!list)
            n->keys[i] = p->stack[base + (size_t)i * 2];
        n->items[i] = p->stack[base + (size_t)(i * step + step - 1)];
    }
    p->height = base;
    if (!list && keys_are_names(p, n))
        refuse_duplicates(p, n);
    return n;
}

/* The node that starts with the current event. NULL: parsing cannot go on. */
static struct node *node_read(struct parser *p, int depth) {
    struct node *n;
    switch (p->event.type) {
    case YAML_SCALAR_EVENT:
        return scalar(p);
    case YAML_ALIAS_EVENT:
        if (!(n = node_new(p, NODE_SCALAR)))
            return NULL;
        refuse(p, n->loc, "aliases are not accepted ('*%.40s'): write the value out",
               p->event.data.alias.anchor);
        n->text = arena_printf(p->arena, "*%s", p->event.data.alias.anchor);
        return n;
    default:
        return collection(p, depth);
    }
}

static struct node *document(struct parser *p) {
    if (!next(p) || !next(p)) /* stream start, document start or stream end */
        return NULL;
    if (p->event.type == YAML_STREAM_END_EVENT) {
        diag_error(p->diags, loc_of(p, 0), "the file is empty");
        return NULL;
    }
    if (p->event.data.document_start.tag_directives.start !=
        p->event.data.document_start.tag_directives.end)
        refuse(p, loc_of(p, p->event.start_mark.index), "tags are not accepted ('%%TAG')");
    if (!next(p))
        return NULL;
    struct node *root = node_read(p, 0);
    if (!root || !next(p) || !next(p)) /* document end, stream end or another document */
        return NULL;
    if (p->event.type != YAML_STREAM_END_EVENT) {
        diag_error(p->diags, loc_of(p, p->event.start_mark.index),
                   "a second document starts here; a file holds one");
        return NULL;
    }
    return p->failed ? NULL : root;
}

struct node *yaml_parse(struct arena *a, struct diags *d, const char *name, const char *text,
                        size_t len) {
    struct parser p = {.arena = a, .diags = d};
    p.source = arena_array(a, struct source, 1);
    *p.source = (struct source){arena_strdup(a, name), text, len};
    if (len > MAX_BYTES) {
        diag_error(d, ((struct loc){p.source, 1, 1}), "the file is larger than %d MiB",
                   MAX_BYTES >> 20);
        return NULL;
    }
    const char *input = join_surrogates(&p, text, &len);
    if (!input)
        return NULL;
    if (!yaml_parser_initialize(&p.yaml))
        abort(); /* out of memory */
    yaml_parser_set_encoding(&p.yaml, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&p.yaml, (const unsigned char *)input, len);
    struct node *root = document(&p);
    yaml_event_delete(&p.event);
    yaml_parser_delete(&p.yaml);
    free(p.stack);
    return root;
}

struct node *yaml_read(struct arena *a, struct diags *d, const char *path) {
    char *text;
    size_t len;
    int err = file_read(a, path, MAX_BYTES, &text, &len);
    if (!err)
        return yaml_parse(a, d, path, text, len);
    if (err == EFBIG)
        diag_error(d, (struct loc){0}, "%s is larger than %d MiB", path, MAX_BYTES >> 20);
    else
        diag_error(d, (struct loc){0}, "cannot read %s: %s", path, strerror(err));
    return NULL;
}

/* ---- maps ---- */

struct node *map_get(struct node *map, const char *key) {
    for (int i = 0; i < map->count && map->kind == NODE_MAP; i++)
        if (!strcmp(map->keys[i]->text, key)) {
            map->items[i]->used = true;
            return map->items[i];
        }
    return NULL;
}

/* "a, b or c", at most 16 of them, else "". */
static const char *listing(struct buf *b, const char *const *names, int n) {
    enum { SHOWN = 16 };
    if (n > SHOWN)
        return "";
    for (int i = 0; i < n; i++)
        buf_printf(b, "%s%s", i == 0 ? "" : i == n - 1 ? " or " : ", ", names[i]);
    return b->data ? b->data : "";
}

bool map_unused(struct diags *d, struct node *map, const char *what, const char *const *legal,
                int n) {
    bool ok = true;
    for (int i = 0; i < map->count; i++) {
        if (map->items[i]->used)
            continue;
        ok = false;
        const char *key = map->keys[i]->text, *near = nearest(key, legal, n);
        struct buf all = {.arena = d->arena};
        if (near)
            diag_error(d, map->keys[i]->loc, "unknown key '%.60s' in %s; did you mean '%s'?",
                       key, what, near);
        else if (*listing(&all, legal, n))
            diag_error(d, map->keys[i]->loc, "unknown key '%.60s' in %s; it takes %s", key,
                       what, all.data);
        else
            diag_error(d, map->keys[i]->loc, "unknown key '%.60s' in %s", key, what);
    }
    return ok;
}

/* ---- typed reads ---- */

bool node_is_null(const struct node *n) {
    static const char *const spellings[] = {"", "~", "null", "Null", "NULL"};
    for (int i = 0; i < 5; i++)
        if (n->kind == NODE_SCALAR && !n->quoted && !strcmp(n->text, spellings[i]))
            return true;
    return false;
}

/* What is there, for "must be X, but is ...". */
static const char *describe(struct diags *d, const struct node *n) {
    if (n->kind == NODE_LIST)
        return n->count ? "a list" : "an empty list";
    if (n->kind == NODE_MAP)
        return "a map";
    if (node_is_null(n))
        return "empty";
    int shown = (int)strlen(n->text);
    if (shown > 40)
        for (shown = 40; ((unsigned char)n->text[shown] & 0xc0) == 0x80;)
            shown--;
    const char *dots = n->text[shown] ? "..." : "";
    if (n->quoted)
        return arena_printf(d->arena, "the string \"%.*s%s\"", shown, n->text, dots);
    return arena_printf(d->arena, "%.*s%s", shown, n->text, dots);
}

static bool must_be(struct diags *d, const struct node *n, const char *key, const char *what) {
    diag_error(d, n->loc, "%s must be %s, but is %s", key, what, describe(d, n));
    return false;
}

bool node_kind_is(struct diags *d, const struct node *n, const char *key, enum node_kind kind) {
    static const char *const names[] = {"a single value", "a list", "a map"};
    return n->kind == kind || must_be(d, n, key, names[kind]);
}

/* [-+]?(0|[1-9][0-9]*) */
static bool is_whole(const char *s) {
    s += *s == '-' || *s == '+';
    size_t digits = strspn(s, "0123456789");
    return digits && !s[digits] && (digits == 1 || *s != '0');
}

bool node_int(struct diags *d, const struct node *n, const char *key, long long min,
              long long max, int *out) {
    max = max > INT_MAX ? INT_MAX : max;
    min = min < INT_MIN ? INT_MIN : min;
    if (n->kind != NODE_SCALAR || n->quoted || !is_whole(n->text)) {
        bool only_quotes = n->kind == NODE_SCALAR && n->quoted && is_whole(n->text);
        return must_be(d, n, key,
                       only_quotes ? "a whole number (without quotes)" : "a whole number");
    }
    errno = 0;
    long long v = strtoll(n->text, NULL, 10);
    if (errno || v < min || v > max)
        return must_be(
            d, n, key,
            max == INT_MAX && v < min && !errno ? arena_printf(d->arena, "at least %lld", min)
            : min == max                        ? arena_printf(d->arena, "%lld", min)
                         : arena_printf(d->arena, "between %lld and %lld", min, max));
    *out = (int)v;
    return true;
}

/* [-+]?(digits[.digits?]|.digits)([eE][-+]?digits)?, as YAML 1.2 and JSON have it */
static bool is_number(const char *s) {
    const char *digits = "0123456789";
    s += *s == '-' || *s == '+';
    size_t whole = strspn(s, digits), part = 0;
    s += whole;
    if (*s == '.') {
        part = strspn(++s, digits);
        s += part;
    }
    if (!whole && !part)
        return false;
    if (*s != 'e' && *s != 'E')
        return !*s;
    s++;
    s += *s == '-' || *s == '+';
    size_t exponent = strspn(s, digits);
    return exponent && !s[exponent];
}

bool node_double(struct diags *d, const struct node *n, const char *key, double min, double max,
                 double *out) {
    if (n->kind != NODE_SCALAR || n->quoted || !is_number(n->text)) {
        bool only_quotes = n->kind == NODE_SCALAR && n->quoted && is_number(n->text);
        return must_be(d, n, key, only_quotes ? "a number (without quotes)" : "a number");
    }
    double v = strtod(n->text, NULL);
    if (!(v >= min && v <= max) || v > 1e300 || v < -1e300)
        return must_be(d, n, key,
                       max >= 1e300 ? arena_printf(d->arena, "a number from %g", min)
                                    : arena_printf(d->arena, "between %g and %g", min, max));
    *out = v;
    return true;
}

bool node_bool(struct diags *d, const struct node *n, const char *key, bool *out) {
    static const char *const names[] = {"false", "true", "False", "True", "FALSE", "TRUE"};
    for (int i = 0; i < 6; i++)
        if (n->kind == NODE_SCALAR && !n->quoted && !strcmp(n->text, names[i])) {
            *out = i & 1;
            return true;
        }
    return must_be(d, n, key, "true or false");
}

bool node_string(struct diags *d, const struct node *n, const char *key, const char **out) {
    if (n->kind != NODE_SCALAR || node_is_null(n))
        return must_be(d, n, key, "a string");
    if (!*n->text) {
        diag_error(d, n->loc, "%s must not be empty", key);
        return false;
    }
    *out = n->text;
    return true;
}

const char *node_path(struct arena *a, struct diags *d, const struct node *n, const char *key) {
    const char *name = NULL;
    struct stat st;
    if (!node_string(d, n, key, &name))
        return NULL;
    const char *path = path_join(a, path_dir(a, n->loc.source->path), name);
    int err = access(path, R_OK) || stat(path, &st) ? errno : S_ISDIR(st.st_mode) ? EISDIR : 0;
    if (!err)
        return path;
    diag_error(d, n->loc, "%s: cannot read %s: %s", key, path, strerror(err));
    return NULL;
}

bool node_enum(struct diags *d, const struct node *n, const char *key, const char *const *names,
               int count, int *out) {
    for (int i = 0; i < count && n->kind == NODE_SCALAR; i++)
        if (!strcmp(n->text, names[i])) {
            *out = i;
            return true;
        }
    struct buf all = {.arena = d->arena};
    const char *near = n->kind == NODE_SCALAR ? nearest(n->text, names, count) : NULL;
    const char *what = listing(&all, names, count);
    if (near)
        diag_error(d, n->loc, "%s must be %s, but is %s; did you mean '%s'?", key,
                   *what ? what : "a known name", describe(d, n), near);
    else
        must_be(d, n, key, *what ? what : "a known name");
    return false;
}
