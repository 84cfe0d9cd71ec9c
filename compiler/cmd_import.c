/* moec import: a Hugging Face config.json becomes a model file. */
#include "moec.h"

#include <string.h>

static const char usage[] =
    "usage: moec import CONFIG.JSON [-o MODEL.YAML]\n"
    "\n"
    "Reads the config.json of a Hugging Face model and writes the model file moec\n"
    "makes of it, to standard output or to MODEL.YAML. What the config does not say\n"
    "and had to be assumed is said as notes, and in comments of the file.\n"
    "\n"
    "  -o FILE   write FILE instead of standard output\n"
    "  --help    show this\n";

static int wrong_usage(const char *what, const char *arg) {
    fprintf(stderr, "moec import: %s%s\n%s", what, arg, usage);
    return 2;
}

/* 0, or the exit code plus one when the command ends here. */
static int read_arguments(int argc, char **argv, const char **in, const char **out) {
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            fputs(usage, stdout);
            return 1;
        }
        if (!strcmp(argv[i], "-o")) {
            if (++i == argc)
                return 1 + wrong_usage("-o wants a file", "");
            *out = argv[i];
        } else if (argv[i][0] == '-' && argv[i][1]) {
            return 1 + wrong_usage("unknown option ", argv[i]);
        } else if (*in) {
            return 1 + wrong_usage("more than one file: ", argv[i]);
        } else {
            *in = argv[i];
        }
    }
    return *in ? 0 : 1 + wrong_usage("no file given", "");
}

/* One comment line, whatever the text quotes. */
static void write_comment(struct buf *text, const char *what, const char *s) {
    buf_printf(text, "# %s", what);
    for (; *s; s++) {
        char c = (unsigned char)*s < 0x20 || *s == 0x7f ? '?' : *s;
        buf_add(text, &c, 1);
    }
    buf_add(text, "\n", 1);
}

static void write_model(struct buf *text, const char *in, const struct diags *d,
                        const struct model *m) {
    const char *slash = strrchr(in, '/');
    write_comment(text, "from ", slash ? slash + 1 : in);
    for (const struct diag *g = d->first; g; g = g->next)
        write_comment(text, g->severity == DIAG_WARNING ? "warning: " : "note: ", g->text);
    model_write(text, m);
}

static bool put(struct diags *d, const char *out, const struct buf *text) {
    if (out) {
        int err = file_write(out, text->data, text->len);
        if (err)
            diag_error(d, (struct loc){0}, "cannot write %s: %s", out, strerror(err));
        return !err;
    }
    if (fwrite(text->data, 1, text->len, stdout) == text->len && !fflush(stdout))
        return true;
    diag_error(d, (struct loc){0}, "cannot write to standard output");
    return false;
}

int cmd_import(int argc, char **argv) {
    const char *in = NULL, *out = NULL;
    int end = read_arguments(argc, argv, &in, &out);
    if (end)
        return end - 1;
    struct arena a = {0};
    struct diags d = {.arena = &a};
    struct buf text = {.arena = &a};
    bool ok = false;
    struct node *root = yaml_read(&a, &d, in);
    if (root && !model_is_config(root))
        diag_error(&d, root->loc, "this is no config.json: it has no model_type");
    else if (root) {
        struct model *m = model_import(&a, &d, root, model_config_name(&a, in));
        if (m)
            write_model(&text, in, &d, m);
        ok = m && put(&d, out, &text);
    }
    diag_print(&d, stderr);
    arena_free(&a);
    return ok ? 0 : 1;
}
