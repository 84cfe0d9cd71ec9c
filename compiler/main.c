/* moec: picks the command. Exit 0: done, 1: failed, 2: wrong usage. */
#include <errno.h>
#include <string.h>

#include "moec.h"

static const struct command {
    const char *name, *what;
    int (*run)(int argc, char **argv);
} commands[] = {
#define X(name, what) {#name, what, cmd_##name},
    MOEC_COMMANDS(X)
#undef X
};
enum { NUM_COMMANDS = sizeof commands / sizeof *commands };

static void help(FILE *out) {
    fprintf(out,
            "usage: moec COMMAND [OPTION...]\n\n"
            "Compiles Mixture-of-Experts layer plans into bundles that libmoert runs.\n\n");
    for (int i = 0; i < NUM_COMMANDS; i++)
        fprintf(out, "  %-8s %s\n", commands[i].name, commands[i].what);
    fprintf(out, "\nmoec COMMAND --help says more; moec --version prints the version.\n");
}

static int unknown(const char *word) {
    const char *names[NUM_COMMANDS], *near;
    for (int i = 0; i < NUM_COMMANDS; i++)
        names[i] = commands[i].name;
    near = nearest(word, names, NUM_COMMANDS);
    fprintf(stderr, "moec: error: unknown command '%s'", word);
    if (near)
        fprintf(stderr, "; did you mean '%s'?", near);
    fprintf(stderr, "\nmoec --help lists the commands\n");
    return 2;
}

/* What was printed and did not arrive is a failure. */
static int finish(int code) {
    if (!fflush(stdout) && !ferror(stdout))
        return code;
    if (!code)
        fprintf(stderr, "moec: error: cannot write to standard output: %s\n", strerror(errno));
    return code ? code : 1;
}

static int run(const struct command *c, int argc, char **argv) {
    char name[32]; /* getopt's messages begin with it */
    snprintf(name, sizeof name, "moec %s", c->name);
    argv[0] = name;
    return finish(c->run(argc, argv));
}

int main(int argc, char **argv) {
    if (argc < 2) {
        help(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        help(stdout);
        return finish(0);
    }
    if (!strcmp(argv[1], "--version")) {
        printf("moec %s\n", MOEC_VERSION);
        return finish(0);
    }
    for (int i = 0; i < NUM_COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name))
            return run(&commands[i], argc - 1, argv + 1);
    return unknown(argv[1]);
}
