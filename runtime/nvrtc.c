/* A kernel that the bundle holds no cubin of: its source compiled here, through the cache. Key and
 * options are the compiler's own, so that each finds what the other made. */
#define _GNU_SOURCE 1 /* dlinfo, GLOB_BRACE */
#include "internal.h"

#include <dlfcn.h>
#include <glob.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NVRTC_CALLS(X) \
    X(Version, (int *major, int *minor)) \
    X(CreateProgram, (void **program, const char *source, const char *name, int headers, \
                      const char *const *texts, const char *const *names)) \
    X(DestroyProgram, (void **program)) \
    X(AddNameExpression, (void *program, const char *expression)) \
    X(CompileProgram, (void *program, int options, const char *const *option)) \
    X(GetProgramLogSize, (void *program, size_t *bytes)) \
    X(GetProgramLog, (void *program, char *log)) \
    X(GetLoweredName, (void *program, const char *expression, const char **lowered)) \
    X(GetCUBINSize, (void *program, size_t *bytes)) \
    X(GetCUBIN, (void *program, char *cubin))

static struct {
    bool there;
#define X(name, args) int(*name) args;
    NVRTC_CALLS(X)
#undef X
} nvrtc;

/* The newest libnvrtc of a toolkit; base may be a pattern. */
static void *open_in_toolkit(const char *base) {
    char pattern[PATH_MAX];
    glob_t found;
    void *library = NULL;
    int n = snprintf(pattern, sizeof pattern, "%s/{lib64,lib,targets/*/lib}/libnvrtc.so.[0-9]*",
                     base);
    if (n >= (int)sizeof pattern || glob(pattern, GLOB_BRACE, NULL, &found))
        return NULL;
    for (size_t i = found.gl_pathc; !library && i; i--)
        library = dlopen(found.gl_pathv[i - 1], RTLD_NOW | RTLD_LOCAL);
    globfree(&found);
    return library;
}

/* NVRTC opens its builtins by name alone and finds them only on the loader's path, or when they
 * are loaded: so they are, from NVRTC's own folder. What does not work here NVRTC will name. */
static void open_builtins(void *library) {
    int (*version)(int *major, int *minor);
    char dir[PATH_MAX], path[PATH_MAX + 64];
    int major, minor;
    *(void **)&version = dlsym(library, "nvrtcVersion");
    if (!version || version(&major, &minor) || dlinfo(library, RTLD_DI_ORIGIN, dir))
        return;
    snprintf(path, sizeof path, "%s/libnvrtc-builtins.so.%d.%d", dir, major, minor);
    dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

void *moert_tool_nvrtc(void) {
    static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"};
    const char *const homes[] = {getenv("CUDA_HOME"), getenv("CUDA_PATH")};
    void *library = NULL;
    for (int i = 0; !library && i < 2; i++)
        if (homes[i] && *homes[i])
            library = open_in_toolkit(homes[i]);
    for (int i = 0; !library && i < 3; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library)
        library = open_in_toolkit("/usr/local/cuda");
    if (!library)
        library = open_in_toolkit("/usr/local/cuda-*");
    if (library)
        open_builtins(library);
    return library;
}

static void open_nvrtc(void) {
    void *library = moert_tool_nvrtc();
    if (!library)
        return;
    nvrtc.there = true;
#define X(name, args) \
    *(void **)&nvrtc.name = dlsym(library, "nvrtc" #name); \
    nvrtc.there = nvrtc.there && nvrtc.name;
    NVRTC_CALLS(X)
#undef X
}

static moert_result compile_failed(void *program, const char *expression, const char *target) {
    size_t bytes = 0;
    char *log = NULL;
    if (!nvrtc.GetProgramLogSize(program, &bytes) && (log = calloc(1, bytes + 1)))
        nvrtc.GetProgramLog(program, log);
    moert_result r = rt_fail(MOERT_CUDA, "%s for %s does not compile: %.1500s", expression,
                             target, log ? log : "no log");
    free(log);
    return r;
}

/* Compiles and puts into the cache. */
static moert_result compile(void *program, const char *expression, const char *target,
                            const char *dir, const char *key) {
    static const char *const fixed[] = {"-std=c++17", "-default-device"};
    char arch[64], label[256];
    const char *option[] = {arch, fixed[0], fixed[1]}, *symbol;
    size_t bytes = 0;
    snprintf(arch, sizeof arch, "--gpu-architecture=%s", target);
    snprintf(label, sizeof label, "%s %s", target, expression);
    if (nvrtc.AddNameExpression(program, expression) ||
        nvrtc.CompileProgram(program, 3, option) ||
        nvrtc.GetLoweredName(program, expression, &symbol) ||
        nvrtc.GetCUBINSize(program, &bytes))
        return compile_failed(program, expression, target);
    char *cubin = malloc(bytes + 1);
    if (!cubin)
        return rt_no_memory(bytes);
    moert_result r = nvrtc.GetCUBIN(program, cubin)
                         ? compile_failed(program, expression, target)
                         : rt_cache_put(dir, key, label, symbol, cubin, bytes);
    free(cubin);
    return r;
}

static void make_key(const struct rt_file *source, const char *expression, const char *target,
                     char key[65]) {
    char hash[65], text[1024];
    int major = 0, minor = 0;
    nvrtc.Version(&major, &minor);
    rt_hash_hex(source->data, source->bytes, hash);
    int n = snprintf(text, sizeof text,
                     "cubin 1 nvrtc %d.%d -std=c++17 -default-device\n%s\n%.600s\n%s\n", major,
                     minor, target, expression, hash);
    rt_hash_hex(text, (size_t)n, key);
}

moert_result rt_nvrtc(const struct rt_file *source, const char *expression,
                      enum moe_target target, struct rt_entry *out) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const char *name = rt_target_name(target);
    char dir[4096], key[65];
    void *program = NULL;
    pthread_once(&once, open_nvrtc);
    if (!nvrtc.there)
        return rt_fail(
            MOERT_NO_DEVICE,
            "the bundle has no cubin of %s for %s, and without libnvrtc it cannot be "
            "compiled here",
            expression, name);
    RT_TRY(rt_cache_dir(dir, sizeof dir));
    make_key(source, expression, name, key);
    if (rt_cache_get(dir, key, out))
        return MOERT_OK;
    int lock = rt_cache_lock(dir, key);
    moert_result r = MOERT_OK;
    if (!rt_cache_get(dir, key, out)) { /* another process may just have made it */
        r = nvrtc.CreateProgram(&program, (const char *)source->data, source->path, 0, NULL,
                                NULL)
                ? rt_fail(MOERT_CUDA, "NVRTC does not start")
                : compile(program, expression, name, dir, key);
        if (program)
            nvrtc.DestroyProgram(&program);
        if (r == MOERT_OK && !rt_cache_get(dir, key, out))
            r = rt_fail(MOERT_SYSTEM, "the kernel cache %s does not keep what is put in", dir);
    }
    if (lock >= 0)
        close(lock);
    return r;
}
