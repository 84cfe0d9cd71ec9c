// The house: what is built, installed and promised outside the code. Runs the built programs.
#define _GNU_SOURCE
#include "../compiler/moec.h"

#include <criterion/criterion.h>

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char output[1 << 20]; // of the last command, stdout and stderr

static const char *build_dir(void) {
    const char *dir = getenv("B");
    return dir ? dir : "build";
}

static const char *sanitizers(void) {
    const char *flags = getenv("SAN");
    return flags ? flags : "";
}

// Exit status of a shell command; its output in output[].
static int shell(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static int shell(const char *fmt, ...) {
    char command[4096];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(command, sizeof command - 6, fmt, args);
    va_end(args);
    cr_assert(n > 0 && n < (int)sizeof command - 6);
    strcat(command, " 2>&1");
    FILE *pipe = popen(command, "r");
    cr_assert(pipe);
    size_t len = fread(output, 1, sizeof output - 1, pipe);
    output[len] = 0;
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// The end of it, for a message: Criterion's own protocol hangs on messages over 4 KiB.
static const char *said(void) {
    size_t len = strlen(output);
    return len > 1500 ? output + len - 1500 : output;
}

static char *temp_dir(void) {
    static char dir[] = "/tmp/moec-house-XXXXXX";
    cr_assert(mkdtemp(dir));
    return dir;
}

Test(house, makefile_and_public_header_stay_short) {
    cr_assert_eq(
        shell("[ $(wc -l <Makefile) -le 120 ] && [ $(wc -l <runtime/moert.h) -le 250 ]"), 0);
}

Test(house, help_lists_every_command) {
    cr_assert_eq(shell("%s/moec --help", build_dir()), 0, "%s", said());
#define X(name, what) cr_assert(strstr(output, #name), #name " is not in moec --help");
    MOEC_COMMANDS(X)
#undef X
}

Test(house, every_command_explains_itself) {
#define X(name, what) \
    cr_assert_eq(shell("%s/moec " #name " --help", build_dir()), 0, #name); \
    cr_assert(strstr(output, #name), "moec " #name " --help says: %s", said());
    MOEC_COMMANDS(X)
#undef X
}

/* Options in moec NAME --help that the NAME section of moec.1 does not have. */
Test(house, the_manual_knows_every_option) {
    char section[32];
#define X(name, what) \
    for (size_t i = 0; i <= strlen(#name); i++) \
        section[i] = (char)toupper(#name[i]); \
    cr_assert_eq(shell("sed -n '/^# %s$/,/^# [^%c]/p' compiler/moec.1.scd >%s/manual;" \
                       " %s/moec " #name " --help | grep -o -e '--[a-z][a-z-]*' | sort -u |" \
                       " grep -v -e '^--help$' | while read -r o; do" \
                       " grep -q -F -e \"*$o*\" %s/manual || echo $o; done", \
                       section, section[0], build_dir(), build_dir(), build_dir()), \
                 0); \
    cr_expect_str_eq(output, "", "moec.1, %s lacks: %s", section, said());
    MOEC_COMMANDS(X)
#undef X
}

Test(house, wrong_usage_exits_2) {
    static const char *const wrong[] = {"", "nonsense", "--nonsense", "cache nonsense"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(shell("%s/moec %s", build_dir(), wrong[i]), 2, "moec %s: %s", wrong[i],
                     said());
#define X(name, what) \
    cr_expect_eq(shell("%s/moec " #name " --nonsense", build_dir()), 2, "moec " #name ": %s", \
                 said());
    MOEC_COMMANDS(X)
#undef X
}

Test(house, output_that_cannot_be_written_is_a_failure) {
    static const char *const lines[] = {"--help", "--version", "build --help",
                                        "explain plans/tiny.yaml",
                                        "import tests/configs/dots1.json"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        cr_expect_eq(shell("( %s/moec %s >/dev/full )", build_dir(), lines[i]), 1, "%s",
                     lines[i]);
        cr_expect(strstr(output, "error: cannot write to standard output"), "%s", said());
    }
}

Test(house, library_exports_what_the_header_declares) {
    cr_assert_eq(shell("nm -D --defined-only %s/libmoert.so | awk '$2 ~ /[TDBRW]/ {print $3}' |"
                       " grep -v '^__\\|^_init$\\|^_fini$' | sort",
                       build_dir()),
                 0);
    char *exported = strdup(output);
    cr_assert_eq(
        shell("sed -n 's/^MOERT_API .*[ *]\\(moert_[a-z_]*\\)(.*/\\1/p' runtime/moert.h |"
              " sort"),
        0);
    cr_expect_str_eq(exported, output);
    free(exported);
    cr_assert_eq(shell("readelf -d %s/libmoert.so", build_dir()), 0);
    cr_expect(strstr(output, "libmoert.so.0"), "SONAME");
    cr_expect_not(strstr(output, "libsodium"), "libsodium is not linked statically");
}

Test(house, moec_needs_only_the_c_library) {
    cr_assert_eq(shell("readelf -d %s/moec", build_dir()), 0);
    cr_expect_not(strstr(output, "yaml"));
    cr_expect_not(strstr(output, "lua"));
    cr_expect_not(strstr(output, "sodium"));
    cr_expect_not(strstr(output, "cuda"));
}

// Installs, builds the examples against what pkg-config says and runs them on bundles.
Test(house, an_installed_library_serves_a_program) {
    const char *dir = temp_dir();
    cr_assert_eq(shell("MAKEFLAGS= make -s B=%s DESTDIR=%s/root PREFIX=/opt/moec install",
                       build_dir(), dir),
                 0, "%s", said());
    cr_assert_eq(shell("export PKG_CONFIG_PATH=%s/root/opt/moec/lib/pkgconfig"
                       " PKG_CONFIG_SYSROOT_DIR=%s/root;"
                       " for e in 01-forward 02-ranks; do"
                       " gcc -Wall -Wextra -Werror %s examples/$e/main.c"
                       " $(pkg-config --cflags --libs moert) -o %s/$e || exit 1; done",
                       dir, dir, sanitizers(), dir),
                 0, "%s", said());
    cr_assert_eq(shell("cd %s && root/opt/moec/bin/moec build --target host -o tiny.moe"
                       " root/opt/moec/share/moec/plans/tiny.yaml",
                       dir),
                 0, "%s", said());
    cr_assert_eq(
        shell("cd %s && LD_LIBRARY_PATH=root/opt/moec/lib ./01-forward tiny.moe 3", dir), 0,
        "%s", said());
    cr_expect(strstr(output, "token 2: experts "), "%s", said());
    cr_assert_eq(
        shell("cd %s && root/opt/moec/bin/moec build --target host --ep 2 -o two.moe"
              " root/opt/moec/share/moec/plans/tiny.yaml && export WORLD_SIZE=2"
              " LD_LIBRARY_PATH=root/opt/moec/lib MASTER_ADDR=127.0.0.1"
              " MASTER_PORT=$((27000 + $$ %% 2000)) &&"
              " { RANK=1 ./02-ranks two.moe 3 & RANK=0 ./02-ranks two.moe 3 && wait $!; }",
              dir),
        0, "%s", said());
    cr_expect(strstr(output, "rank 0, token 2: ") && strstr(output, "rank 1, token 1: "), "%s",
              said());
    cr_assert_eq(shell("MAKEFLAGS= make -s B=%s DESTDIR=%s/root PREFIX=/opt/moec uninstall &&"
                       " find %s/root -type f -o -type l",
                       build_dir(), dir, dir),
                 0, "%s", said());
    cr_expect_str_eq(output, "");
    shell("rm -rf %s", dir);
}

// Faults that only lint sees, each planted in a copy of the templates.
Test(house, lint_keeps_asm_and_the_host_in_one_header) {
    static const char *const plants[] = {
        "asm volatile(\"\");",      "__asm__(\"\");", "#ifdef __CUDACC_RTC__",
        "#if defined(__x86_64__)",  "# if 0",         "int host = MOE_HOST_ASAN;",
        "int arch = __CUDA_ARCH__;"};
    const char *dir = temp_dir();
    if (shell("command -v git"))
        cr_skip_test("no git here");
    cr_assert_eq(
        shell("mkdir %s/tests && cp -r Makefile templates %s && cp tests/lint.sh %s/tests"
              " && git init -q %s",
              dir, dir, dir, dir),
        0, "%s", said());
    for (size_t i = 0; i < sizeof plants / sizeof *plants; i++) {
        cr_assert_eq(
            shell("cp templates/combine.cuh %s/templates; echo '%s' >>%s/templates/combine.cuh",
                  dir, plants[i], dir),
            0);
        shell("%s/tests/lint.sh", dir);
        cr_expect(strstr(output, "only templates/prim.cuh may say: templates/combine.cuh"),
                  "%s: %s", plants[i], said());
    }
    shell("cp templates/combine.cuh %s/templates; %s/tests/lint.sh", dir, dir);
    cr_expect_not(strstr(output, "prim.cuh may say"), "%s", said());
    shell("rm -rf %s", dir);
}

// A machine with everything in place is left alone.
Test(house, setup_is_silent_when_nothing_is_missing) {
    cr_assert_eq(shell("PATH=$PATH:/sbin tests/setup.sh"), 0, "%s", said());
    cr_expect_not(strstr(output, "installing"), "%s", said());
}
