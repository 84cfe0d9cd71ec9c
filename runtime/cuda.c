/* A GPU through the driver library, opened at run time and declared here, so that one binary
 * runs with and without one. */
#include "internal.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* CUlaunchConfig and CUlaunchAttribute. */
struct launch_attribute {
    int id, pad;
    union {
        char bytes[64];
        unsigned numbers[3];
    } value;
};
struct launch_config {
    unsigned grid[3], block[3], smem;
    void *stream;
    struct launch_attribute *attributes;
    unsigned num_attributes;
};

/* CUmemAllocationProp and CUmemAccessDesc; a location is a type, 1 a device, and its number. */
struct memory_kind {
    int type, handles, location, device;
    void *windows;
    unsigned char flags[8];
};
struct memory_access {
    int location, device, rights;
};

/* As cuda.h declares them: results are 0 for success, handles are pointers, device addresses are
 * 64-bit numbers. X(name, exported name, arguments) */
#define CUDA_CALLS(X) \
    X(Init, "cuInit", (unsigned flags)) \
    X(GetErrorName, "cuGetErrorName", (int code, const char **text)) \
    X(GetErrorString, "cuGetErrorString", (int code, const char **text)) \
    X(DeviceGetCount, "cuDeviceGetCount", (int *count)) \
    X(DeviceGet, "cuDeviceGet", (int *device, int ordinal)) \
    X(DeviceGetName, "cuDeviceGetName", (char *name, int bytes, int device)) \
    X(DeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, int device)) \
    X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t * bytes, int device)) \
    X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **context, int device)) \
    X(PrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int device)) \
    X(CtxPushCurrent, "cuCtxPushCurrent_v2", (void *context)) \
    X(CtxPopCurrent, "cuCtxPopCurrent_v2", (void **context)) \
    X(CtxSynchronize, "cuCtxSynchronize", (void)) \
    X(MemAlloc, "cuMemAlloc_v2", (uint64_t * address, size_t bytes)) \
    X(MemFree, "cuMemFree_v2", (uint64_t address)) \
    X(MemGranularity, "cuMemGetAllocationGranularity", \
      (size_t * out, const struct memory_kind *kind, int option)) \
    X(MemCreate, "cuMemCreate", \
      (uint64_t * handle, size_t bytes, const struct memory_kind *kind, \
       unsigned long long flags)) \
    X(MemRelease, "cuMemRelease", (uint64_t handle)) \
    X(MemExport, "cuMemExportToShareableHandle", \
      (void *out, uint64_t handle, int type, unsigned long long flags)) \
    X(MemImport, "cuMemImportFromShareableHandle", (uint64_t * out, void *handle, int type)) \
    X(MemReserve, "cuMemAddressReserve", \
      (uint64_t * address, size_t bytes, size_t align, uint64_t wish, \
       unsigned long long flags)) \
    X(MemAddressFree, "cuMemAddressFree", (uint64_t address, size_t bytes)) \
    X(MemMap, "cuMemMap", \
      (uint64_t address, size_t bytes, size_t offset, uint64_t handle, \
       unsigned long long flags)) \
    X(MemUnmap, "cuMemUnmap", (uint64_t address, size_t bytes)) \
    X(MemSetAccess, "cuMemSetAccess", \
      (uint64_t address, size_t bytes, const struct memory_access *who, size_t count)) \
    X(MemHostAlloc, "cuMemHostAlloc", (void **out, size_t bytes, unsigned flags)) \
    X(MemFreeHost, "cuMemFreeHost", (void *p)) \
    X(MemcpyHtoD, "cuMemcpyHtoD_v2", (uint64_t dst, const void *src, size_t bytes)) \
    X(MemcpyDtoH, "cuMemcpyDtoH_v2", (void *dst, uint64_t src, size_t bytes)) \
    X(MemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", \
      (uint64_t dst, uint64_t src, size_t bytes, void *stream)) \
    X(MemsetD8, "cuMemsetD8_v2", (uint64_t dst, unsigned char value, size_t bytes)) \
    X(ModuleLoadData, "cuModuleLoadData", (void **module, const void *image)) \
    X(ModuleUnload, "cuModuleUnload", (void *module)) \
    X(ModuleGetFunction, "cuModuleGetFunction", \
      (void **function, void *module, const char *name)) \
    X(FuncSetAttribute, "cuFuncSetAttribute", (void *function, int attribute, int value)) \
    X(Occupancy, "cuOccupancyMaxActiveBlocksPerMultiprocessor", \
      (int *blocks, void *function, int block, size_t smem)) \
    X(LaunchKernel, "cuLaunchKernelEx", \
      (const struct launch_config *config, void *function, void **params, void **extra)) \
    X(TensorMapEncodeTiled, "cuTensorMapEncodeTiled", \
      (void *map, int type, uint32_t rank, void *address, const uint64_t *dims, \
       const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides, \
       int interleave, int swizzle, int l2_promotion, int oob_fill)) \
    X(StreamCreate, "cuStreamCreate", (void **stream, unsigned flags)) \
    X(StreamDestroy, "cuStreamDestroy_v2", (void *stream)) \
    X(StreamSynchronize, "cuStreamSynchronize", (void *stream)) \
    X(StreamBeginCapture, "cuStreamBeginCapture_v2", (void *stream, int mode)) \
    X(StreamEndCapture, "cuStreamEndCapture", (void *stream, void **graph)) \
    X(GraphInstantiate, "cuGraphInstantiateWithFlags", \
      (void **exec, void *graph, unsigned long long flags)) \
    X(GraphLaunch, "cuGraphLaunch", (void *exec, void *stream)) \
    X(GraphDestroy, "cuGraphDestroy", (void *graph)) \
    X(GraphExecDestroy, "cuGraphExecDestroy", (void *exec)) \
    X(EventCreate, "cuEventCreate", (void **event, unsigned flags)) \
    X(EventDestroy, "cuEventDestroy_v2", (void *event)) \
    X(EventRecord, "cuEventRecord", (void *event, void *stream)) \
    X(EventSynchronize, "cuEventSynchronize", (void *event)) \
    X(EventElapsedTime, "cuEventElapsedTime", (float *ms, void *from, void *to))

enum {
    ATTRIBUTE_SMS = 16,
    ATTRIBUTE_MAJOR = 75,
    ATTRIBUTE_MINOR = 76,
    FUNCTION_MAX_DYNAMIC_SMEM = 8,
    STREAM_NON_BLOCKING = 1,
    PINNED = 1,
    BY_FD = 1, /* CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR */
    ON_DEVICE = 1,
    READ_WRITE = 3,
    HOST_PORTABLE = 1,
    HOST_DEVICE_MAP = 2,
    CAPTURE_THREAD_LOCAL = 1,
    ERROR_OUT_OF_MEMORY = 2,
    LAUNCH_CLUSTER = 4,      /* CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION */
    LAUNCH_PROGRAMMATIC = 6, /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */
    MAP_U8 = 0,              /* CU_TENSOR_MAP_DATA_TYPE_UINT8 */
    MAP_BF16 = 9,            /* CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 */
    MAP_SWIZZLE_128B = 3,
    MAP_L2_256B = 3,
    DEFAULT_SMEM = 48 << 10, /* bytes a block may use without asking */
};

static struct {
    const char *missing; /* NULL: all there */
#define X(name, symbol, args) int(*name) args;
    CUDA_CALLS(X)
#undef X
} cu;

struct cuda {
    int device;
    void *context;
    void *mark[2]; /* events */
    void **modules;
    int num_modules;
};

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    cu.missing = library ? NULL : "libcuda.so.1 (the NVIDIA driver)";
    if (!library)
        return;
#define X(name, symbol, args) \
    *(void **)&cu.name = dlsym(library, symbol); \
    if (!cu.name) \
        cu.missing = symbol " in libcuda.so.1 (a newer NVIDIA driver)";
    CUDA_CALLS(X)
#undef X
}

static moert_result check(int code, const char *call) {
    const char *name = NULL, *text = NULL;
    if (!code)
        return MOERT_OK;
    cu.GetErrorName(code, &name);
    cu.GetErrorString(code, &text);
    return rt_fail(code == ERROR_OUT_OF_MEMORY ? MOERT_NO_MEMORY : MOERT_CUDA, "%s: %s (%s)",
                   call, text ? text : "unknown error", name ? name : "?");
}
#define CU(name, ...) RT_TRY(check(cu.name(__VA_ARGS__), "cu" #name))

int rt_cuda_targets(int major, int minor, enum moe_target out[2]) {
    static const struct {
        int major, minor;
        enum moe_target target;
    } exact[] = {{9, 0, MOE_TARGET_SM_90A},
                 {10, 0, MOE_TARGET_SM_100A},
                 {10, 3, MOE_TARGET_SM_103A},
                 {12, 0, MOE_TARGET_SM_120A}};
    int n = 0;
    for (int i = 0; i < 4; i++)
        if (exact[i].major == major && exact[i].minor == minor)
            out[n++] = exact[i].target;
    if (major == 8 && minor == 9)
        out[n++] = MOE_TARGET_SM_89;
    if (major == 8)
        out[n++] = MOE_TARGET_SM_80;
    return n;
}

/* ---- open, close ---- */

static moert_result describe(int device, struct moert_tool_device *info) {
    CU(DeviceGetName, info->name, (int)sizeof info->name, device);
    CU(DeviceGetAttribute, &info->sms, ATTRIBUTE_SMS, device);
    CU(DeviceGetAttribute, &info->cc_major, ATTRIBUTE_MAJOR, device);
    CU(DeviceGetAttribute, &info->cc_minor, ATTRIBUTE_MINOR, device);
    CU(DeviceTotalMem, &info->memory, device);
    return MOERT_OK;
}

static moert_result find_device(int ordinal, int *out) {
    int count = 0, code = cu.Init(0);
    const char *text = NULL;
    if (code) {
        cu.GetErrorString(code, &text);
        return rt_fail(MOERT_NO_DEVICE, "no GPU: cuInit: %s", text ? text : "unknown error");
    }
    CU(DeviceGetCount, &count);
    if (!count)
        return rt_fail(MOERT_NO_DEVICE, "no GPU: the driver finds none");
    if (ordinal < 0 || ordinal >= count)
        return rt_fail(MOERT_INVALID, "no GPU %d: there are %d", ordinal, count);
    CU(DeviceGet, out, ordinal);
    return MOERT_OK;
}

moert_result rt_cuda_open(int ordinal, struct moert_tool_device *info, void **out) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int device;
    pthread_once(&once, open_driver);
    if (cu.missing)
        return rt_fail(MOERT_NO_DEVICE, "no GPU: there is no %s", cu.missing);
    RT_TRY(find_device(ordinal, &device));
    RT_TRY(describe(device, info));
    struct cuda *d = calloc(1, sizeof *d);
    if (!d)
        return rt_no_memory(sizeof *d);
    d->device = device;
    moert_result r =
        check(cu.PrimaryCtxRetain(&d->context, device), "cuDevicePrimaryCtxRetain");
    if (r != MOERT_OK) {
        free(d);
        return r;
    }
    *out = d;
    return MOERT_OK;
}

static moert_result cuda_enter(void *device) {
    struct cuda *d = device;
    CU(CtxPushCurrent, d->context);
    return MOERT_OK;
}

static void cuda_leave(void *device) {
    (void)device;
    void *context;
    cu.CtxPopCurrent(&context);
}

static void cuda_close(void *device) {
    struct cuda *d = device;
    if (cuda_enter(d) == MOERT_OK) {
        for (int i = 0; i < d->num_modules; i++)
            cu.ModuleUnload(d->modules[i]);
        for (int i = 0; i < 2; i++)
            if (d->mark[i])
                cu.EventDestroy(d->mark[i]);
        cuda_leave(d);
    }
    cu.PrimaryCtxRelease(d->device);
    free(d->modules);
    free(d);
}

/* ---- memory, streams ---- */

static uint64_t address(const void *p) {
    return (uint64_t)(uintptr_t)p;
}

static moert_result cuda_alloc(void *device, size_t bytes, void **out) {
    (void)device;
    uint64_t at = 0;
    int code = cu.MemAlloc(&at, bytes ? bytes : 1);
    if (code == ERROR_OUT_OF_MEMORY)
        return rt_fail(MOERT_NO_MEMORY, "out of device memory: %zu bytes", bytes);
    RT_TRY(check(code, "cuMemAlloc"));
    *out = (void *)(uintptr_t)at;
    return MOERT_OK;
}

static void cuda_free(void *device, void *p) {
    (void)device;
    cu.MemFree(address(p));
}

static moert_result whole_pages(const struct cuda *d, struct memory_kind *kind, size_t *bytes) {
    size_t page;
    *kind = (struct memory_kind){
        .type = PINNED, .handles = BY_FD, .location = ON_DEVICE, .device = d->device};
    CU(MemGranularity, &page, kind, 0);
    *bytes = (*bytes + page - 1) / page * page;
    return MOERT_OK;
}

/* The handle at an address of its own. */
static moert_result map_handle(const struct cuda *d, uint64_t handle, size_t bytes,
                               void **out) {
    const struct memory_access all = {ON_DEVICE, d->device, READ_WRITE};
    uint64_t at = 0;
    CU(MemReserve, &at, bytes, 0, 0, 0);
    moert_result r = check(cu.MemMap(at, bytes, 0, handle, 0), "cuMemMap");
    if (r == MOERT_OK &&
        (r = check(cu.MemSetAccess(at, bytes, &all, 1), "cuMemSetAccess")) != MOERT_OK)
        cu.MemUnmap(at, bytes);
    if (r != MOERT_OK)
        cu.MemAddressFree(at, bytes);
    else
        *out = (void *)(uintptr_t)at;
    return r;
}

/* Memory lives as long as it is mapped anywhere: handles are given back at once. */
static moert_result cuda_alloc_shared(void *device, size_t bytes, void **out, int *fd) {
    struct memory_kind kind;
    uint64_t handle;
    RT_TRY(whole_pages(device, &kind, &bytes));
    CU(MemCreate, &handle, bytes, &kind, 0);
    moert_result r = check(cu.MemExport(fd, handle, BY_FD, 0), "cuMemExportToShareableHandle");
    if (r == MOERT_OK && (r = map_handle(device, handle, bytes, out)) != MOERT_OK)
        close(*fd);
    cu.MemRelease(handle);
    return r;
}

static moert_result cuda_map_shared(void *device, int fd, size_t bytes, void **out) {
    struct memory_kind kind;
    uint64_t handle;
    RT_TRY(whole_pages(device, &kind, &bytes));
    CU(MemImport, &handle, (void *)(intptr_t)fd, BY_FD);
    moert_result r = map_handle(device, handle, bytes, out);
    cu.MemRelease(handle);
    return r;
}

static void cuda_unmap_shared(void *device, void *p, size_t bytes) {
    struct memory_kind kind;
    if (whole_pages(device, &kind, &bytes) != MOERT_OK)
        return;
    cu.MemUnmap(address(p), bytes);
    cu.MemAddressFree(address(p), bytes);
}

/* Unified addressing: kernels take the same pointer. */
static moert_result cuda_alloc_host(void *device, size_t bytes, void **out) {
    (void)device;
    CU(MemHostAlloc, out, bytes, HOST_PORTABLE | HOST_DEVICE_MAP);
    return MOERT_OK;
}

static void cuda_free_host(void *device, void *p) {
    (void)device;
    cu.MemFreeHost(p);
}

static moert_result cuda_sync(void *device, moert_stream s) {
    (void)device;
    if (s)
        CU(StreamSynchronize, s);
    else
        CU(CtxSynchronize);
    return MOERT_OK;
}

static moert_result cuda_upload(void *device, void *dst, const void *src, size_t bytes) {
    if (bytes)
        CU(MemcpyHtoD, address(dst), src, bytes);
    return cuda_sync(device, NULL);
}

static moert_result cuda_download(void *device, void *dst, const void *src, size_t bytes) {
    RT_TRY(cuda_sync(device, NULL));
    if (bytes)
        CU(MemcpyDtoH, dst, address(src), bytes);
    return MOERT_OK;
}

static moert_result cuda_set(void *device, void *dst, int byte, size_t bytes) {
    if (bytes)
        CU(MemsetD8, address(dst), (unsigned char)byte, bytes);
    return cuda_sync(device, NULL);
}

static moert_result cuda_copy(void *device, void *dst, const void *src, size_t bytes,
                              moert_stream s) {
    (void)device;
    if (bytes)
        CU(MemcpyDtoDAsync, address(dst), address(src), bytes, s);
    return MOERT_OK;
}

static moert_result cuda_stream(void *device, moert_stream *out) {
    (void)device;
    CU(StreamCreate, out, STREAM_NON_BLOCKING);
    return MOERT_OK;
}

static void cuda_stream_free(void *device, moert_stream s) {
    (void)device;
    if (s)
        cu.StreamDestroy(s);
}

/* ---- kernels ---- */

static moert_result cuda_launch(void *device, const struct rt_launch *l,
                                const struct moe_args *args, moert_stream s) {
    (void)device;
    void *params[] = {(void *)args, (void *)l->maps};
    struct launch_attribute attributes[2];
    unsigned n = 0;
    if (l->early)
        attributes[n++] =
            (struct launch_attribute){.id = LAUNCH_PROGRAMMATIC, .value.numbers = {1}};
    if (l->cluster > 1)
        attributes[n++] = (struct launch_attribute){.id = LAUNCH_CLUSTER,
                                                    .value.numbers = {l->cluster, 1, 1}};
    struct launch_config config = {.grid = {l->grid[0], l->grid[1], l->grid[2]},
                                   .block = {l->block, 1, 1},
                                   .smem = l->smem,
                                   .stream = s,
                                   .attributes = attributes,
                                   .num_attributes = n};
    int code = cu.LaunchKernel(&config, l->kernel->function, params, NULL);
    return code ? check(code, l->expression) : MOERT_OK;
}

static moert_result add_module(struct cuda *d, const void *image, void **module) {
    void **grown = realloc(d->modules, ((size_t)d->num_modules + 1) * sizeof *grown);
    if (!grown)
        return rt_no_memory(sizeof *grown);
    d->modules = grown;
    CU(ModuleLoadData, module, image);
    d->modules[d->num_modules++] = *module;
    return MOERT_OK;
}

static moert_result get_function(struct cuda *d, const void *image, const char *symbol,
                                 const struct moe_plan_kernel *k, struct rt_kernel *out) {
    void *module;
    RT_TRY(add_module(d, image, &module));
    CU(ModuleGetFunction, &out->function, module, symbol);
    if (k->smem > DEFAULT_SMEM)
        CU(FuncSetAttribute, out->function, FUNCTION_MAX_DYNAMIC_SMEM, (int)k->smem);
    CU(Occupancy, &out->resident, out->function, (int)k->block, k->smem);
    if (!out->resident)
        return rt_fail(MOERT_UNSUPPORTED, "%s does not fit on this GPU", symbol);
    return MOERT_OK;
}

static moert_result cuda_load(void *device, const moert_bundle *b, const struct rt_file *source,
                              int i, const struct rt_log *log, struct rt_kernel *out) {
    const struct moe_plan_kernel *k = &b->kernels[i];
    const char *file = rt_string(b, k->file), *expression = rt_string(b, k->expression);
    if (*file)
        return get_function(device, rt_bundle_file(b, file)->data, rt_string(b, k->symbol), k,
                            out);
    struct rt_entry e;
    rt_log(log, MOERT_LOG_INFO, "%s: no cubin of %s in the bundle: compiling it", source->path,
           expression);
    RT_TRY(rt_nvrtc(source, expression, (enum moe_target)k->target, &e));
    moert_result r = get_function(device, e.code, e.symbol, k, out);
    free(e.memory);
    return r;
}

static moert_result cuda_encode_map(void *device, const struct moe_plan_map *m, void *base,
                                    int slots, void *out) {
    (void)device;
    const uint64_t dims[3] = {(uint64_t)m->columns, (uint64_t)m->rows,
                              (uint64_t)(slots < m->slots ? slots : m->slots)};
    const uint64_t strides[2] = {(uint64_t)m->columns * (uint64_t)m->element,
                                 (uint64_t)m->slot_stride};
    const uint32_t box[3] = {128 / (uint32_t)m->element, (uint32_t)m->box_rows, 1},
                   step[3] = {1, 1, 1};
    CU(TensorMapEncodeTiled, out, m->element == 2 ? MAP_BF16 : MAP_U8, 3,
       (char *)base + m->offset, dims, strides, box, step, 0, MAP_SWIZZLE_128B, MAP_L2_256B, 0);
    return MOERT_OK;
}

/* ---- graphs, time ---- */

static moert_result cuda_begin_capture(void *device, moert_stream s) {
    (void)device;
    CU(StreamBeginCapture, s, CAPTURE_THREAD_LOCAL);
    return MOERT_OK;
}

static moert_result cuda_end_capture(void *device, moert_stream s, bool keep, void **graph) {
    (void)device;
    void *captured = NULL;
    int code = cu.StreamEndCapture(s, &captured);
    if (!keep) {
        if (captured)
            cu.GraphDestroy(captured);
        return MOERT_OK;
    }
    RT_TRY(check(code, "cuStreamEndCapture"));
    code = cu.GraphInstantiate(graph, captured, 0);
    cu.GraphDestroy(captured);
    return check(code, "cuGraphInstantiate");
}

static moert_result cuda_replay(void *device, void *graph, moert_stream s) {
    (void)device;
    CU(GraphLaunch, graph, s);
    return MOERT_OK;
}

static void cuda_graph_free(void *device, void *graph) {
    (void)device;
    cu.GraphExecDestroy(graph);
}

static moert_result cuda_mark(void *device, int which, moert_stream s) {
    struct cuda *d = device;
    if (!d->mark[which])
        CU(EventCreate, &d->mark[which], 0);
    CU(EventRecord, d->mark[which], s);
    return MOERT_OK;
}

static moert_result cuda_elapsed(void *device, double *us) {
    struct cuda *d = device;
    float ms;
    CU(EventSynchronize, d->mark[1]);
    CU(EventElapsedTime, &ms, d->mark[0], d->mark[1]);
    *us = ms * 1e3;
    return MOERT_OK;
}

const struct rt_ops rt_cuda_ops = {
    .close = cuda_close,
    .enter = cuda_enter,
    .leave = cuda_leave,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .alloc_shared = cuda_alloc_shared,
    .map_shared = cuda_map_shared,
    .unmap_shared = cuda_unmap_shared,
    .alloc_host = cuda_alloc_host,
    .free_host = cuda_free_host,
    .upload = cuda_upload,
    .download = cuda_download,
    .set = cuda_set,
    .copy = cuda_copy,
    .stream = cuda_stream,
    .stream_free = cuda_stream_free,
    .sync = cuda_sync,
    .launch = cuda_launch,
    .encode_map = cuda_encode_map,
    .begin_capture = cuda_begin_capture,
    .end_capture = cuda_end_capture,
    .replay = cuda_replay,
    .graph_free = cuda_graph_free,
    .mark = cuda_mark,
    .elapsed = cuda_elapsed,
    .load = cuda_load,
};
