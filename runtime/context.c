/* A bundle on a device: which target's kernels, loaded, and the workspace. */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const target_names[] = {
#define X(name, spelling, smem) spelling,
    MOE_TARGETS(X)
#undef X
};

const char *rt_target_name(int target) {
    return target_names[target];
}

const char *rt_string(const moert_bundle *b, uint32_t offset) {
    return b->strings + offset;
}

void rt_log(const struct rt_log *log, moert_log_level level, const char *fmt, ...) {
    char text[1024];
    va_list ap;
    if (!log->fn)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    log->fn(level, text, log->user);
}

/* ---- workspace ---- */

int64_t rt_workspace_layout(const moert_bundle *b, int64_t offset[MOE_WS_COUNT],
                            int64_t bytes[MOE_WS_COUNT]) {
    int64_t total = 0;
    memset(bytes, 0, MOE_WS_COUNT * sizeof *bytes);
    for (uint32_t i = 0; i < b->count[MOE_SECTION_CLASS]; i++)
        for (int j = 0; j < b->classes[i].num_buffers; j++) {
            const struct moe_plan_buffer *w = &b->buffers[b->classes[i].first_buffer + j];
            if (w->bytes > bytes[w->ws])
                bytes[w->ws] = w->bytes;
        }
    for (int w = 0; w < MOE_WS_COUNT; w++) {
        offset[w] = total;
        total += RT_ALIGN(bytes[w]);
    }
    return total;
}

size_t moert_workspace_bytes(const moert_bundle *b) {
    int64_t offset[MOE_WS_COUNT], bytes[MOE_WS_COUNT];
    return b ? (size_t)rt_workspace_layout(b, offset, bytes) : 0;
}

static bool is_zeroed(const moert_bundle *b, int ws) {
    for (uint32_t i = 0; i < b->count[MOE_SECTION_BUFFER]; i++)
        if (b->buffers[i].ws == ws && b->buffers[i].zero)
            return true;
    return false;
}

static moert_result make_workspace(moert_context *c, const moert_context_config *cfg) {
    int64_t offset[MOE_WS_COUNT], bytes[MOE_WS_COUNT];
    int64_t total = rt_workspace_layout(c->bundle, offset, bytes);
    void *memory = cfg->workspace;
    if (memory && ((uintptr_t)memory % 256 || cfg->workspace_bytes < (size_t)total))
        return rt_fail(MOERT_INVALID,
                       "the workspace of %zu bytes must be 256-byte aligned and have at least "
                       "%lld bytes",
                       cfg->workspace_bytes, (long long)total);
    if (!memory) {
        RT_TRY(c->ops->alloc(c->device, (size_t)total, &memory));
        c->own_workspace = true;
    }
    c->workspace = memory;
    for (int w = 0; w < MOE_WS_COUNT; w++) {
        c->ws[w] = bytes[w] ? c->workspace + offset[w] : NULL;
        if (c->own_workspace && is_zeroed(c->bundle, w))
            RT_TRY(c->ops->set(c->device, c->workspace + offset[w], 0, (size_t)bytes[w]));
    }
    return MOERT_OK;
}

/* ---- target ---- */

static const struct moe_plan_target *find_target(const moert_bundle *b, int class_index,
                                                 enum moe_target target) {
    for (uint32_t i = 0; i < b->count[MOE_SECTION_TARGET]; i++)
        if (b->targets[i].class_index == class_index && b->targets[i].target == (int)target)
            return &b->targets[i];
    return NULL;
}

static bool serves_all(const moert_bundle *b, enum moe_target target) {
    for (uint32_t i = 0; i < b->count[MOE_SECTION_CLASS]; i++)
        if (!find_target(b, (int)i, target))
            return false;
    return true;
}

static moert_result no_target(const moert_context *c, const enum moe_target *wanted, int n) {
    char have[256] = "";
    for (int t = 0; t < MOE_TARGET_COUNT; t++)
        if (serves_all(c->bundle, (enum moe_target)t))
            snprintf(have + strlen(have), sizeof have - strlen(have), "%s%s", *have ? ", " : "",
                     target_names[t]);
    if (!n)
        return rt_fail(MOERT_UNSUPPORTED,
                       "%s has compute capability %d.%d, which no target serves", c->info.name,
                       c->info.cc_major, c->info.cc_minor);
    return rt_fail(
        MOERT_UNSUPPORTED, "%s needs target %s, the bundle has %s; build it with --target %s",
        c->info.name, target_names[wanted[0]], *have ? have : "none", target_names[wanted[0]]);
}

static moert_result choose_target(moert_context *c, moert_device device) {
    enum moe_target wanted[2] = {MOE_TARGET_HOST};
    int n =
        device == MOERT_HOST ? 1 : rt_cuda_targets(c->info.cc_major, c->info.cc_minor, wanted);
    for (int i = 0; i < n; i++)
        if (serves_all(c->bundle, wanted[i])) {
            c->info.target = wanted[i];
            return MOERT_OK;
        }
    return no_target(c, wanted, n);
}

static moert_result load_class(moert_context *c, int class_index) {
    const moert_bundle *b = c->bundle;
    const struct moe_plan_target *t = find_target(b, class_index, c->info.target);
    const struct rt_file *source =
        rt_bundle_file(b, rt_string(b, b->classes[class_index].source));
    for (int i = 0; i < t->num_buckets; i++) {
        const struct moe_plan_bucket *u = &b->buckets[t->first_bucket + i];
        for (int j = 0; j < u->num_launches; j++) {
            int k = b->launches[u->first_launch + j].kernel;
            if (!c->kernels[k].function)
                RT_TRY(c->ops->load(c->device, b, source, k, &c->log, &c->kernels[k]));
        }
    }
    return MOERT_OK;
}

/* ---- public ---- */

static moert_result open_device(moert_context *c, const moert_context_config *cfg) {
    c->ops = cfg->device == MOERT_HOST ? &rt_host_ops : &rt_cuda_ops;
    if (cfg->device == MOERT_HOST)
        return rt_host_open(cfg->host_threads, &c->info, &c->device);
    return rt_cuda_open(cfg->ordinal, &c->info, &c->device);
}

static moert_result fill_context(moert_context *c, const moert_context_config *cfg) {
    RT_TRY(choose_target(c, cfg->device));
    for (uint32_t i = 0; i < c->bundle->count[MOE_SECTION_CLASS]; i++)
        RT_TRY(load_class(c, (int)i));
    RT_TRY(make_workspace(c, cfg));
    return cfg->world ? rt_world_join(c, cfg->world, cfg->rank) : MOERT_OK;
}

static moert_result check_config(const moert_bundle *b, const moert_context_config *cfg) {
    if (cfg->device != MOERT_HOST && cfg->device != MOERT_CUDA_DEVICE)
        return rt_fail(MOERT_INVALID, "no such device: %d", (int)cfg->device);
    if (cfg->host_threads < 0 || cfg->host_threads > 4096)
        return rt_fail(MOERT_INVALID, "host_threads is %d", cfg->host_threads);
    return rt_world_check(b, cfg->world, cfg->rank);
}

moert_result moert_context_create(moert_bundle *b, const moert_context_config *given,
                                  moert_context **out) {
    moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
    if (!b || !out)
        return rt_fail(MOERT_INVALID, "moert_context_create: bundle and out must be given");
    *out = NULL;
    RT_TRY(rt_config(&cfg, sizeof cfg, given, "moert_context_config"));
    RT_TRY(check_config(b, &cfg));
    moert_context *c = calloc(1, sizeof *c);
    struct rt_kernel *kernels = calloc(b->count[MOE_SECTION_KERNEL] + 1, sizeof *kernels);
    if (!c || !kernels) {
        free(c);
        free(kernels);
        return rt_no_memory(sizeof *c);
    }
    c->bundle = b;
    c->kernels = kernels;
    c->log = (struct rt_log){cfg.log, cfg.log_user};
    moert_result r = open_device(c, &cfg);
    if (r == MOERT_OK && (r = c->ops->enter(c->device)) == MOERT_OK) {
        r = fill_context(c, &cfg);
        c->ops->leave(c->device);
    }
    if (r != MOERT_OK) {
        moert_context_destroy(c);
        return r;
    }
    rt_log(&c->log, MOERT_LOG_INFO, "%s: kernels for %s are loaded", c->info.name,
           target_names[c->info.target]);
    *out = c;
    return MOERT_OK;
}

void moert_context_destroy(moert_context *c) {
    if (!c)
        return;
    if ((c->own_workspace || c->world) && c->ops->enter(c->device) == MOERT_OK) {
        rt_world_leave(c);
        if (c->own_workspace)
            c->ops->free(c->device, c->workspace);
        c->ops->leave(c->device);
    }
    if (c->device)
        c->ops->close(c->device);
    free(c->kernels);
    free(c);
}
