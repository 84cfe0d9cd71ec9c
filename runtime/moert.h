/* libmoert: runs the bundles that moec writes. moert_world: several ranks.
 *
 * A server opens a bundle once, makes one context per device, one layer per MoE layer of its
 * model, gives each its weights, and calls moert_forward for every batch:
 *
 *   moert_bundle_open("qwen3-30b.moe", &b);
 *   moert_context_config cfg = MOERT_CONTEXT_CONFIG_INIT;
 *   moert_context_create(b, &cfg, &c);
 *   moert_layer_create(c, 0, &l);
 *   moert_layer_load(l, "/models/Qwen3-30B-A3B");
 *   moert_io io = MOERT_IO_INIT;
 *   io.x = x; io.out = out; io.num_tokens = n; io.topk_idx = idx; io.topk_weight = weight;
 *   moert_forward(l, &io, stream);
 *
 * Rules that hold everywhere. Every call returns a moert_result; the text of the first error of a
 * failed call is moert_last_error(), per thread. The library never prints and never exits.
 * Structs that cross the border begin with their size: initialise them with *_INIT. A handle is
 * used by one thread at a time; different handles of one context share its workspace, so their
 * forwards run on one stream or are ordered by the caller. Calls marked [launch] neither allocate
 * nor synchronise and can be captured into a CUDA graph. libcuda, libnvrtc and libnccl are opened when
 * first needed; without them the host device still works. On device MOERT_HOST every pointer is
 * host memory, streams are NULL and calls return when the work is done. */
#ifndef MOERT_H
#define MOERT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOERT_VERSION_MAJOR 0
#define MOERT_VERSION_MINOR 1
#define MOERT_VERSION_PATCH 0
#define MOERT_VERSION_CODE 100 /* major*10000 + minor*100 + patch */

#if defined(__GNUC__)
#define MOERT_API __attribute__((visibility("default")))
#else
#define MOERT_API
#endif

typedef struct moert_bundle moert_bundle;
typedef struct moert_world moert_world;
typedef struct moert_context moert_context;
typedef struct moert_layer moert_layer;
typedef void *moert_stream; /* a CUstream or cudaStream_t; NULL: the default stream */

typedef enum moert_result {
    MOERT_OK = 0,
    MOERT_INVALID,     /* an argument is wrong */
    MOERT_NOT_FOUND,   /* no such file, layer or tensor */
    MOERT_CORRUPT,     /* a file is not what its hash or its format says */
    MOERT_VERSION,     /* made by another version of moec */
    MOERT_UNSUPPORTED, /* this build or this device cannot do it */
    MOERT_NO_DEVICE,   /* no libcuda, no GPU, or no compiler for the host device */
    MOERT_NO_MEMORY,
    MOERT_SYSTEM, /* a system call failed */
    MOERT_CUDA,   /* the driver or NVRTC reported an error */
    MOERT_PEER    /* another rank did not answer in time, or the world was aborted */
} moert_result;

typedef enum moert_device { MOERT_HOST = 0, MOERT_CUDA_DEVICE = 1 } moert_device;
typedef enum moert_dtype { MOERT_FP32 = 0, MOERT_BF16 = 1 } moert_dtype;
typedef enum moert_log_level {
    MOERT_LOG_ERROR,
    MOERT_LOG_WARNING,
    MOERT_LOG_INFO
} moert_log_level;
typedef void (*moert_log_fn)(moert_log_level level, const char *text, void *user);

/* Version of the library at run time, as MOERT_VERSION_CODE. */
MOERT_API int moert_version(void);
/* "out of memory", ... for a result; never NULL. */
MOERT_API const char *moert_result_text(moert_result r);
/* What the last failed call of this thread said; "" before any failure. Valid until the thread's
 * next failing call. */
MOERT_API const char *moert_last_error(void);

/* ---- bundle: a directory that moec build wrote ---- */

/* Reads and verifies every file against the manifest, then plan.bin's structure. */
MOERT_API moert_result moert_bundle_open(const char *dir, moert_bundle **out);
/* After every context made from it is gone. NULL is allowed. */
MOERT_API void moert_bundle_close(moert_bundle *b);
MOERT_API int moert_bundle_num_layers(const moert_bundle *b);
/* The model's own number of the i-th layer, ascending; -1 when i is out of range. */
MOERT_API int moert_bundle_layer(const moert_bundle *b, int i);

/* What a caller must know of one layer to allocate for it. */
typedef struct moert_layer_info {
    size_t size;
    int layer, hidden, inter, experts, topk;
    int max_tokens; /* of this rank in one pass; forward splits more into chunks */
    int ranks, slots_per_rank;
    int shared_inter;    /* 0: no shared expert */
    size_t weight_bytes; /* device memory of the packed weights */
} moert_layer_info;
#define MOERT_LAYER_INFO_INIT \
    { sizeof(moert_layer_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
MOERT_API moert_result moert_bundle_layer_info(const moert_bundle *b, int layer,
                                               moert_layer_info *info);

/* ---- world: the ranks that serve a layer together ---- */

/* A bundle planned for R ranks runs in a world of R, each rank a context with its own memory for
 * what the others send it, the arena. A local world is one process on one device:
 *   wc.ranks = R; moert_world_local(&wc, &w);
 *   for each rank r: cfg.world = w; cfg.rank = r; moert_context_create(b, &cfg, &c[r]); layers ...
 *   moert_world_connect(w); moert_world_forward(w, layers, ios, stream);
 *
 * Ranks that run side by side, in threads or on streams of their own, call moert_forward instead.
 * All run the same layers in the same order with the same rank_tokens, those without tokens too.
 * A wait ends with the peer's flag, at the timeout or by an abort; then every later forward of the
 * rank is MOERT_PEER, and nothing computed since is to be used (moert(3)). */
typedef struct moert_world_config {
    size_t size;
    int ranks;           /* 1 to 128; 0, processes only: ranks and rank are the launcher's */
    int timeout_ms;      /* of one wait, inside a kernel or at set-up; 0: 100000 */
    int rank;            /* processes only: this one's */
    const char *address; /* processes only: HOST:PORT of rank 0; NULL: the launcher's */
    void *nccl;          /* processes only: an ncclComm_t of these ranks to use, or NULL */
} moert_world_config;
#define MOERT_WORLD_CONFIG_INIT \
    { sizeof(moert_world_config), 0, 0, 0, NULL, NULL }

MOERT_API moert_result moert_world_local(const moert_world_config *cfg, moert_world **out);
/* One process per rank, as torchrun, mpirun or srun starts them. Blocks until all are there. */
MOERT_API moert_result moert_world_processes(const moert_world_config *cfg, moert_world **out);
MOERT_API int moert_world_rank(const moert_world *w); /* of this process; -1: all are here */
/* After every context of it is gone. NULL is allowed. */
MOERT_API void moert_world_destroy(moert_world *w);
/* After every rank's context is made, before the first forward: checks that all run one plan with
 * arenas of one size (the text names the rank that differs) and shows them the others'. Blocks. */
MOERT_API moert_result moert_world_connect(moert_world *w);
/* Device memory of a rank's arena, which the context allocates; 0: the bundle has one rank. */
MOERT_API size_t moert_arena_bytes(const moert_bundle *b);
/* Lets all waits of this process's ranks give up. Any thread may call it. */
MOERT_API void moert_world_abort(moert_world *w);
/* MOERT_PEER, and who waited for whom, when a wait here has given up; also while kernels run. */
MOERT_API moert_result moert_world_check(moert_world *w);
/* Goes on without a rank that is gone for good: every other calls it, with no forward under way.
 * MOERT_INVALID, and nothing changes, where an expert of a layer has no replica elsewhere. Blocks. */
MOERT_API moert_result moert_exclude_rank(moert_world *w, int rank);

/* ---- context: a bundle on a device ---- */

typedef struct moert_context_config {
    size_t size;
    moert_device device;
    int ordinal;     /* which GPU; its primary context is used */
    void *workspace; /* device memory of at least moert_workspace_bytes, 256-aligned and
                             zeroed, kept by the caller; NULL: the context allocates it */
    size_t workspace_bytes;
    int host_threads; /* host device: threads, 0: all cores */
    moert_log_fn log; /* may be NULL */
    void *log_user;
    moert_world *world; /* NULL: the bundle is planned for one rank */
    int rank;           /* in the world, from 0 */
} moert_context_config;
#define MOERT_CONTEXT_CONFIG_INIT \
    { sizeof(moert_context_config), MOERT_CUDA_DEVICE, 0, NULL, 0, 0, NULL, NULL, NULL, 0 }

/* Bytes of workspace that any forward of the bundle may need. */
MOERT_API size_t moert_workspace_bytes(const moert_bundle *b);
/* Loads the kernels for the device: the bundle's cubins, or, when there are none for this GPU,
 * its source compiled by NVRTC into the private cache; for the host its source compiled by $CXX
 * into the same cache. */
MOERT_API moert_result moert_context_create(moert_bundle *b, const moert_context_config *cfg,
                                            moert_context **out);
/* After every layer of it is gone. NULL is allowed. */
MOERT_API void moert_context_destroy(moert_context *c);

/* ---- layer: one MoE layer's weights ---- */

MOERT_API moert_result moert_layer_create(moert_context *c, int layer, moert_layer **out);
MOERT_API void moert_layer_destroy(moert_layer *l);

/* Weights from a safetensors file, or a folder as transformers saves it. Blocks. */
MOERT_API moert_result moert_layer_load(moert_layer *l, const char *path);

typedef struct moert_tensor {
    const void *data; /* host memory, row-major */
    moert_dtype dtype;
} moert_tensor;
/* Weights from pointers, read during the call. Arrays have one entry per expert. */
typedef struct moert_weights {
    size_t size;
    moert_tensor router;          /* [E][H] */
    moert_tensor router_bias;     /* [E] or data NULL */
    moert_tensor correction_bias; /* [E] or data NULL */
    const moert_tensor *gate;     /* [I][H] each; NULL where the activation is not gated */
    const moert_tensor *up;       /* [I][H] */
    const moert_tensor *down;     /* [H][I] */
    const moert_tensor *gate_bias, *up_bias, *down_bias; /* [I] [I] [H], NULL without biases */
    moert_tensor shared_gate_proj, shared_up_proj, shared_down_proj; /* as above, SI for I */
    moert_tensor shared_expert_gate;                                 /* [H] or data NULL */
} moert_weights;
#define MOERT_WEIGHTS_INIT \
    { sizeof(moert_weights) }
MOERT_API moert_result moert_layer_set_weights(moert_layer *l, const moert_weights *w);
/* Random weights, a function of seed and layer alone (templates/args.h). */
MOERT_API moert_result moert_layer_random(moert_layer *l, uint64_t seed);

/* ---- forward ---- */

/* Device memory (host memory on MOERT_HOST) of the caller. T = num_tokens, any number from 0. */
typedef struct moert_io {
    size_t size;
    int num_tokens;
    moert_dtype x_dtype, out_dtype;
    const void *x;      /* [T][H] */
    void *out;          /* [T][H] */
    const void *logits; /* [T][E] the caller's own logits, with the router's bias; NULL: ours */
    moert_dtype logits_dtype;
    int32_t *topk_idx;  /* [T][k] written by route, read by the other steps */
    float *topk_weight; /* [T][k] */
    /* Several ranks: [R] in host memory, read during the call: every rank's num_tokens, the same
     * on all ranks. All take as many chunks as the longest batch needs. */
    const int *rank_tokens;
} moert_io;
#define MOERT_IO_INIT \
    { sizeof(moert_io), 0, MOERT_BF16, MOERT_BF16, 0, 0, 0, MOERT_FP32, 0, 0, 0 }

/* [launch] All steps, in chunks of max_tokens. topk_idx and topk_weight must be given. */
MOERT_API moert_result moert_forward(moert_layer *l, const moert_io *io, moert_stream stream);
/* [launch] The same for all ranks of a local world, in turns, so that no kernel waits for one that
 * comes after it on the stream. layers: [R] of the ranks' contexts; ios: [R]. */
MOERT_API moert_result moert_world_forward(moert_world *w, moert_layer *const *layers,
                                           const moert_io *ios, moert_stream stream);
/* [launch] All steps after the router, with topk_idx and topk_weight given, in chunks. */
MOERT_API moert_result moert_experts_combine(moert_layer *l, const moert_io *io,
                                             moert_stream stream);
/* [launch] The steps alone, in this order, for at most max_tokens tokens on every rank. A caller
 * with its own top-k leaves out route and fills topk_idx and topk_weight. combine is combine_send
 * and combine_wait; with one rank both dispatches and combine_send do nothing. */
MOERT_API moert_result moert_route(moert_layer *l, const moert_io *io, moert_stream stream);
MOERT_API moert_result moert_dispatch_send(moert_layer *l, const moert_io *io, moert_stream s);
MOERT_API moert_result moert_dispatch_wait(moert_layer *l, const moert_io *io, moert_stream s);
MOERT_API moert_result moert_experts(moert_layer *l, const moert_io *io, moert_stream stream);
MOERT_API moert_result moert_combine_send(moert_layer *l, const moert_io *io, moert_stream s);
MOERT_API moert_result moert_combine_wait(moert_layer *l, const moert_io *io, moert_stream s);
MOERT_API moert_result moert_combine(moert_layer *l, const moert_io *io, moert_stream stream);

#ifdef __cplusplus
}
#endif

#endif
