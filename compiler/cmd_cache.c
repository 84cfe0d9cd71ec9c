/* moec cache: what the kernel cache holds, whether it is sound, and emptying it. */
#include <getopt.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "moec.h"

static const char usage[] =
    "usage: moec cache list|clear|verify [--json]\n"
    "\n"
    "The kernel cache is $XDG_CACHE_HOME/moec, else ~/.cache/moec.\n"
    "\n"
    "  list    its files, with size and what they are\n"
    "  verify  reads every kernel and removes those that are not what their hash says; exit 1\n"
    "          when there were any\n"
    "  clear   removes them all\n"
    "\n"
    "      --json   the result as JSON\n"
    "      --help\n";

/* One file of the cache. */
struct entry {
    const char *name;
    long long bytes;
    const char *label; /* "sm_90a moe_combine"; "" when it is no entry */
    bool corrupt;
};
struct listing {
    struct cache *cache;
    struct entry *entries;
    int n;
};

static void look(struct arena *a, struct cache *c, struct entry *e) {
    struct arena scratch = {NULL}; /* entries may be many and large */
    struct stat st;
    char *data, *label, *symbol, *value;
    size_t len;
    e->label = "";
    if (!stat(path_join(&scratch, cache_dir(c), e->name), &st))
        e->bytes = st.st_size;
    if (cache_is_key(e->name)) {
        e->corrupt = !cache_get(c, &scratch, e->name, &data, &len);
        if (!e->corrupt && nvrtc_unpack(&scratch, data, len, &label, &symbol, &value, &len))
            e->label = arena_strdup(a, label);
    }
    arena_free(&scratch);
}

static void list(struct arena *a, struct cache *c, struct listing *l) {
    char **names;
    l->cache = c;
    l->n = cache_list(c, a, &names);
    l->entries = arena_array(a, struct entry, l->n);
    for (int i = 0; i < l->n; i++) {
        l->entries[i].name = names[i];
        look(a, c, &l->entries[i]);
    }
}

static long long total(const struct listing *l) {
    long long bytes = 0;
    for (int i = 0; i < l->n; i++)
        bytes += l->entries[i].bytes;
    return bytes;
}

static void print_json(struct arena *a, const struct listing *l) {
    struct buf b = {.arena = a};
    buf_printf(&b, "{\"dir\": ");
    buf_json_string(&b, cache_dir(l->cache));
    buf_printf(&b, ", \"bytes\": %lld, \"files\": [", total(l));
    for (int i = 0; i < l->n; i++) {
        const struct entry *e = &l->entries[i];
        buf_printf(&b, "%s\n  {\"name\": ", i ? "," : "");
        buf_json_string(&b, e->name);
        buf_printf(&b, ", \"bytes\": %lld, \"what\": ", e->bytes);
        buf_json_string(&b, e->label);
        buf_printf(&b, ", \"corrupt\": %s}", e->corrupt ? "true" : "false");
    }
    buf_printf(&b, "%s]}\n", l->n ? "\n" : "");
    fputs(b.data, stdout);
}

static int show(struct arena *a, const struct listing *l, bool json) {
    if (json) {
        print_json(a, l);
        return 0;
    }
    for (int i = 0; i < l->n; i++)
        printf("%.12s %9lld  %s\n", l->entries[i].name, l->entries[i].bytes,
               l->entries[i].corrupt ? "corrupt, removed" : l->entries[i].label);
    printf("%s: %d files, %.1f MB\n", cache_dir(l->cache), l->n, (double)total(l) / 1e6);
    return 0;
}

static int verify(struct arena *a, const struct listing *l, bool json) {
    int corrupt = 0, kernels = 0;
    for (int i = 0; i < l->n; i++) {
        kernels += cache_is_key(l->entries[i].name);
        corrupt += l->entries[i].corrupt;
        if (l->entries[i].corrupt && !json)
            printf("%s: corrupt, removed\n", l->entries[i].name);
    }
    if (json)
        print_json(a, l);
    else
        printf("%s: %d kernels, %d corrupt\n", cache_dir(l->cache), kernels, corrupt);
    return corrupt > 0;
}

static int clear(struct arena *a, const struct listing *l, bool json) {
    int failed = 0;
    for (int i = 0; i < l->n; i++)
        failed += dir_remove(path_join(a, cache_dir(l->cache), l->entries[i].name)) != 0;
    if (json)
        print_json(a, l);
    else
        printf("%s: removed %d files, %.1f MB\n", cache_dir(l->cache), l->n - failed,
               (double)total(l) / 1e6);
    return failed > 0;
}

static int run(struct arena *a, const char *action, bool json) {
    static const struct {
        const char *name;
        int (*run)(struct arena *, const struct listing *, bool);
    } actions[] = {{"list", show}, {"clear", clear}, {"verify", verify}};
    struct diags diags = {.arena = a};
    struct listing l;
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(action, actions[i].name))
            continue;
        struct cache *c = cache_open(a, &diags);
        diag_print(&diags, stderr);
        if (!c)
            return 1;
        list(a, c, &l);
        return actions[i].run(a, &l, json);
    }
    fprintf(stderr, "moec cache: error: unknown action '%s': list, clear or verify\n", action);
    return 2;
}

int cmd_cache(int argc, char **argv) {
    static const struct option options[] = {
        {"json", no_argument, NULL, 'J'}, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    struct arena arena = {NULL};
    bool json = false;
    int opt;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (opt == 'h')
            fputs(usage, stdout);
        if (opt != 'J')
            return opt == 'h' ? 0 : 2;
        json = true;
    }
    if (argc - optind != 1) {
        fputs(usage, stderr);
        return 2;
    }
    int code = run(&arena, argv[optind], json);
    arena_free(&arena);
    return code;
}
