/* libmoert's insides: every type and function that crosses a file, in the order of use.
 *
 *   bundle -> device -> context -> layer (safetensors -> names -> pack) -> forward
 *
 * A function that can fail returns a moert_result and has set the thread's error text. Nothing
 * here is exported; the prefix rt_ keeps the static library apart from its host's names. */
#ifndef MOERT_INTERNAL_H
#define MOERT_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bundle.h"
#include "moert.h"
#include "tool.h"

/* ---- error.c: the thread's error text, and structs that cross the border ---- */

moert_result rt_fail(moert_result r, const char *fmt, ...)
    __attribute__((format(printf, 2, 3), cold));
moert_result rt_no_memory(size_t bytes);
moert_result rt_system(const char *what, const char *path); /* MOERT_SYSTEM and errno's text */
/* Copies a caller's size-first struct over dst, which holds the defaults. A struct of another
 * version may be shorter or longer; what this build does not know must be zero. */
moert_result rt_config(void *dst, size_t dst_size, const void *src, const char *what);

#define RT_TRY(call) \
    do { \
        moert_result try_ = (call); \
        if (try_ != MOERT_OK) \
            return try_; \
    } while (0)

/* ---- bundle.c: a verified bundle in memory; check.c: plan.bin's structure ---- */

struct rt_file {
    const char *path; /* relative to the bundle */
    char hash[65];
    unsigned char *data;
    size_t bytes;
};

struct moert_bundle {
    char *dir;
    char *manifest;        /* its text, cut into strings; paths of files point into it */
    struct rt_file *files; /* ascending paths */
    int num_files;
    /* plan.bin's sections, inside the file's data */
    const struct moe_plan_class *classes;
    const struct moe_plan_layer *layers;
    const int32_t *tables;
    const struct moe_plan_target *targets;
    const struct moe_plan_kernel *kernels;
    const struct moe_plan_buffer *buffers;
    const struct moe_plan_bucket *buckets;
    const struct moe_plan_launch *launches;
    const char *strings;
    uint32_t count[MOE_SECTION_COUNT];
};

const struct rt_file *rt_bundle_file(const moert_bundle *b, const char *path); /* or NULL */
/* Index into layers of the model's own layer number; -1: none. */
int rt_bundle_find(const moert_bundle *b, int layer);
/* Sets b's sections from plan.bin once everything in it has been checked. */
moert_result rt_plan_check(moert_bundle *b, const struct rt_file *plan);
void rt_hash_hex(const void *data, size_t bytes, char hex[65]); /* BLAKE2b-256 */
/* Bytes of a class's record parts; b1 and b2 are 0 without biases. inter: I or SI. */
struct rt_record {
    int64_t w1_rows, w1, w2, b1, b2;
};
struct rt_record rt_record_parts(const struct moe_plan_class *c, int inter, bool bias);
bool rt_gated(const struct moe_plan_class *c);
#define RT_ALIGN(n) (((int64_t)(n) + 255) & ~(int64_t)255)
/* Where a layer keeps what it owns, as offsets into its one allocation. */
struct rt_layer_parts {
    int64_t pool, shared, router, router_bias, correction, shared_gate, phys_of_slot,
        slot_of_expert, bytes;
};
struct rt_layer_parts rt_layer_parts(const struct moe_plan_class *c);

#endif
