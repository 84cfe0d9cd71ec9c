/* Kernels' source text compiled by $CXX for the CPU, loaded, and launched one by one: for tests
 * that want the kernels alone, without bundle and runtime. */
#ifndef KERNELS_H
#define KERNELS_H

#include "../compiler/moec.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct kernels {
    void *library;
    int (*launch)(const char *expression, const unsigned grid[3], unsigned block, unsigned smem,
                  const struct moe_args *args, int threads, char *error, unsigned error_bytes);
    int (*abi)(void);
    char why[512]; /* of the last failure */
};

static const char *kernels_env(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

/* Compiles the file at `source` (optimised as `flags` says, sanitized as the tests are) and opens
 * it. */
static bool kernels_open(struct kernels *k, const char *source, const char *flags) {
    char library[256], command[1024];
    *k = (struct kernels){0};
    snprintf(library, sizeof library, "%s.so", source);
    snprintf(command, sizeof command,
             "%s -std=c++17 %s %s -w -fPIC -shared -pthread -x c++ '%s' -o '%s' 2>'%s.log'",
             kernels_env("CXX", "c++"), kernels_env("MOERT_CXXFLAGS", ""), flags, source,
             library, source);
    if (system(command)) {
        snprintf(k->why, sizeof k->why, "does not compile, see %.200s.log", source);
        return false;
    }
    k->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!k->library) {
        snprintf(k->why, sizeof k->why, "%.500s", dlerror());
        return false;
    }
    *(void **)&k->launch = dlsym(k->library, "moe_host_launch");
    *(void **)&k->abi = dlsym(k->library, "moe_host_abi");
    return k->launch && k->abi;
}

#endif
