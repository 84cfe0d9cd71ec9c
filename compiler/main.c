/* moec: picks the command. Exit 0: done, 1: failed, 2: wrong usage. */
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

int main(int argc, char **argv) {
    if (argc < 2) {
        help(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        help(stdout);
        return 0;
    }
    if (!strcmp(argv[1], "--version")) {
        printf("moec %s\n", MOEC_VERSION);
        return 0;
    }
    for (int i = 0; i < NUM_COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    return unknown(argv[1]);
}
