/* The error text of a thread, the version, and structs that begin with their size. */
#include "internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char error_text[2048];

moert_result rt_fail(moert_result r, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(error_text, sizeof error_text, fmt, ap);
    va_end(ap);
    return r;
}

moert_result rt_no_memory(size_t bytes) {
    return rt_fail(MOERT_NO_MEMORY, "out of memory: %zu bytes", bytes);
}

moert_result rt_system(const char *what, const char *path) {
    int code = errno;
    return rt_fail(code == ENOENT ? MOERT_NOT_FOUND : MOERT_SYSTEM, "%s %s: %s", what, path,
                   strerror(code));
}

const char *moert_last_error(void) {
    return error_text;
}

const char *moert_result_text(moert_result r) {
    switch (r) {
    case MOERT_OK:
        return "no error";
    case MOERT_INVALID:
        return "invalid argument";
    case MOERT_NOT_FOUND:
        return "not found";
    case MOERT_CORRUPT:
        return "corrupt file";
    case MOERT_VERSION:
        return "made by another version";
    case MOERT_UNSUPPORTED:
        return "not supported";
    case MOERT_NO_DEVICE:
        return "no device";
    case MOERT_NO_MEMORY:
        return "out of memory";
    case MOERT_SYSTEM:
        return "system call failed";
    case MOERT_CUDA:
        return "CUDA error";
    case MOERT_PEER:
        return "another rank did not answer";
    }
    return "unknown result";
}

int moert_version(void) {
    return MOERT_VERSION_CODE;
}

/* No public struct comes near this; a size beyond it is an uninitialised one. */
enum { SIZE_LIMIT = 4096 };

moert_result rt_config(void *dst, size_t dst_size, const void *src, const char *what) {
    size_t size;
    if (!src)
        return rt_fail(MOERT_INVALID, "%s is NULL", what);
    memcpy(&size, src, sizeof size);
    if (size < sizeof size || size > SIZE_LIMIT)
        return rt_fail(MOERT_INVALID, "%s has size %zu; initialise it with its _INIT macro",
                       what, size);
    const unsigned char *bytes = src;
    for (size_t i = dst_size; i < size; i++)
        if (bytes[i])
            return rt_fail(MOERT_VERSION, "%s uses fields that this library does not know",
                           what);
    memcpy(dst, src, size < dst_size ? size : dst_size);
    memcpy(dst, &dst_size, sizeof dst_size);
    return MOERT_OK;
}
