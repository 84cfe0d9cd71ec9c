/* Diagnostics: a list that passes append to, printed once with source lines and carets. */
#include "moec.h"

#include <string.h>

enum {
    MAX_ERRORS = 100,
    MAX_LINE = 100, /* longer source lines are shown as a window around the caret, bytes */
};

static void append(struct diags *d, enum severity s, struct loc loc, const char *text) {
    struct diag *g = arena_array(d->arena, struct diag, 1);
    *g = (struct diag){.severity = s, .loc = loc, .text = text};
    if (d->last)
        d->last->next = g;
    else
        d->first = g;
    d->last = g;
}

void diag_add(struct diags *d, enum severity s, struct loc loc, const char *fmt, ...) {
    char text[2048];
    if (s == DIAG_ERROR)
        d->errors++;
    if (d->errors > MAX_ERRORS) { /* the notes of an error that was dropped go, too */
        if (s == DIAG_ERROR && d->errors == MAX_ERRORS + 1)
            append(d, s, (struct loc){0}, "too many errors, the rest is not shown");
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (n >= (int)sizeof text)
        memcpy(text + sizeof text - 4, "...", 4);
    append(d, s, loc, arena_strdup(d->arena, text));
}

static bool is_continuation(char c) {
    return ((unsigned char)c & 0xc0) == 0x80;
}

/* Bytes of the UTF-8 character at s, 0 when there is none or it is a control character. */
static size_t printable(const char *s, size_t n) {
    unsigned char c = (unsigned char)*s;
    if (c < 0x80)
        return c == '\t' || (c >= 0x20 && c != 0x7f);
    size_t len = c >= 0xf0 && c < 0xf5   ? 4
                 : c >= 0xe0 && c < 0xf0 ? 3
                 : c >= 0xc2 && c < 0xe0 ? 2
                                         : 0;
    if (len > n || (c == 0xc2 && n > 1 && (unsigned char)s[1] < 0xa0)) /* C1 controls */
        return 0;
    for (size_t i = 1; i < len; i++)
        if (!is_continuation(s[i]))
            return 0;
    return len;
}

/* Text of a file may hold anything: what is not text must not reach a terminal. */
static void print_safe(const char *s, size_t n, FILE *out) {
    for (size_t i = 0; i < n;) {
        size_t len = printable(s + i, n - i);
        fwrite(len ? s + i : "?", 1, len ? len : 1, out);
        i += len ? len : 1;
    }
}

/* First byte of a line (from 1), or NULL when the text has fewer. */
static const char *find_line(const struct source *s, int line) {
    const char *p = s->text, *end = s->text + s->len;
    for (; line > 1 && p; line--) {
        p = memchr(p, '\n', (size_t)(end - p));
        p = p ? p + 1 : NULL;
    }
    return p;
}

/* The part of a line that is shown: at most MAX_LINE bytes around the caret, whole characters.
 */
static void window(const char *line, size_t len, size_t at, size_t *from, size_t *to) {
    *from = 0;
    *to = len;
    if (len <= MAX_LINE)
        return;
    *from = at > MAX_LINE / 2 ? at - MAX_LINE / 2 : 0;
    *to = *from + MAX_LINE < len ? *from + MAX_LINE : len;
    while (*from > 0 && is_continuation(line[*from]))
        --*from;
    while (*to < len && is_continuation(line[*to]))
        ++*to;
}

static void print_caret(const struct loc *loc, FILE *out) {
    const char *line = find_line(loc->source, loc->line);
    if (!line)
        return;
    const char *end = memchr(line, '\n', (size_t)(loc->source->text + loc->source->len - line));
    size_t len = (size_t)((end ? end : loc->source->text + loc->source->len) - line);
    if (len && line[len - 1] == '\r')
        len--;
    size_t at = (size_t)loc->col - 1 < len ? (size_t)loc->col - 1 : len;
    size_t from, to;
    window(line, len, at, &from, &to);
    fprintf(out, "%6d | %s", loc->line, from ? "..." : "");
    print_safe(line + from, to - from, out);
    fprintf(out, "%s\n       | %s", to < len ? "..." : "", from ? "   " : "");
    for (size_t i = from; i < at; i++)
        if (!is_continuation(line[i]))
            fputc(line[i] == '\t' ? '\t' : ' ', out);
    fputs("^\n", out);
}

void diag_print(const struct diags *d, FILE *out) {
    static const char *const names[] = {"error", "warning", "note"};
    for (const struct diag *g = d->first; g; g = g->next) {
        const struct source *s = g->loc.source;
        print_safe(s ? s->path : "moec", strlen(s ? s->path : "moec"), out);
        if (s && g->loc.line > 0)
            fprintf(out, ":%d:%d", g->loc.line, g->loc.col);
        fprintf(out, ": %s: ", names[g->severity]);
        print_safe(g->text, strlen(g->text), out);
        fputc('\n', out);
        if (s && s->text && g->loc.line > 0)
            print_caret(&g->loc, out);
    }
}
