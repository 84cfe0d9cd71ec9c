/* What moec's own commands and the tests need beside moert.h: memory, streams, graphs and clocks
 * of a context's device, and names of the things inside a bundle. Not installed, no promise of
 * stability. On the host device a stream is NULL and a graph replays the recorded calls. */
#ifndef MOERT_TOOL_H
#define MOERT_TOOL_H

#include "bundle.h"
#include "moert.h"

moert_result moert_tool_alloc(moert_context *c, size_t bytes, void **out);
void moert_tool_free(moert_context *c, void *p);
moert_result moert_tool_upload(moert_context *c, void *dst, const void *src, size_t bytes);
moert_result moert_tool_download(moert_context *c, void *dst, const void *src, size_t bytes);
moert_result moert_tool_set(moert_context *c, void *dst, int byte, size_t bytes);
/* Device to device, on the stream. [launch] */
moert_result moert_tool_copy(moert_context *c, void *dst, const void *src, size_t bytes,
                             moert_stream s);

moert_result moert_tool_stream(moert_context *c, moert_stream *out);
void moert_tool_stream_free(moert_context *c, moert_stream s);
moert_result moert_tool_sync(moert_context *c, moert_stream s);

typedef struct moert_graph moert_graph;
/* Calls fn(user, stream) under stream capture. MOERT_UNSUPPORTED on the host device. */
moert_result moert_tool_capture(moert_context *c, moert_stream s,
                                moert_result (*fn)(void *user, moert_stream s), void *user,
                                moert_graph **out);
moert_result moert_tool_replay(moert_context *c, moert_graph *g, moert_stream s);
void moert_tool_graph_free(moert_context *c, moert_graph *g);
/* Microseconds of device time that fn(user, s) takes, between two events (host: wall clock). */
moert_result moert_tool_time(moert_context *c, moert_stream s,
                             moert_result (*fn)(void *user, moert_stream s), void *user,
                             double *us);

/* Device's name, SM count, memory in bytes, target kernels were loaded for. */
struct moert_tool_device {
    char name[128];
    int sms, cc_major, cc_minor;
    size_t memory;
    enum moe_target target;
};
void moert_tool_device(const moert_context *c, struct moert_tool_device *out);
/* The class of a layer, for the reference; NULL when there is no such layer. */
const struct moe_plan_class *moert_tool_class(const moert_bundle *b, int layer);
/* Entry i of plan.bin's TABLE section. */
const int32_t *moert_tool_table(const moert_bundle *b, int i);
/* Copies out what a layer holds, fp32, as plain rows: router [E][H], biases [E], the shared
 * expert's gate [H] (untouched when absent). */
moert_result moert_tool_router(moert_layer *l, float *router, float *bias, float *correction,
                               float *shared_gate);
/* Copies expert e's (or, e = -1, the shared expert's) packed record back: slot_bytes. */
moert_result moert_tool_record(moert_layer *l, int e, void *out);
/* One launch stage alone, for tests and benchmarks. [launch] */
moert_result moert_tool_stage(moert_layer *l, const moert_io *io, enum moe_stage stage,
                              moert_stream s);
/* Copies a workspace buffer back, for tests. */
moert_result moert_tool_workspace(moert_context *c, enum moe_ws_id id, void *out, size_t bytes);
/* What a safetensors file holds, for --input. The data pointer lives until the file is closed. */
struct moert_tool_tensor {
    const char *name, *dtype; /* "F32", "BF16", ... */
    int rank;
    int64_t shape[8];
    const void *data;
    size_t bytes;
};
typedef struct moert_tool_file moert_tool_file;
moert_result moert_tool_open(const char *path, moert_tool_file **out);
void moert_tool_close(moert_tool_file *f);
/* How many tensors there are, and their names in ascending order. */
int moert_tool_count(const moert_tool_file *f);
const char *moert_tool_name(const moert_tool_file *f, int i);
moert_result moert_tool_find(const moert_tool_file *f, const char *name,
                             struct moert_tool_tensor *out);
/* Writes a safetensors file (temporary name, rename). */
moert_result moert_tool_save(const char *path, const struct moert_tool_tensor *tensors, int n);

/* libnvrtc, for dlsym: of $CUDA_HOME, of $CUDA_PATH, where the loader finds it, or of
 * /usr/local/cuda and /usr/local/cuda-*. NULL: there is none. Its builtins are loaded with it. */
void *moert_tool_nvrtc(void);

#endif
