/* libmoert's insides: every type and function that crosses a file, in the order of use.
 *
 *   bundle -> device -> context (world) -> layer (safetensors -> names -> pack) -> forward
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
    const struct moe_plan_map *maps;
    const char *strings;
    const struct moe_plan_balance *balance;
    const struct moe_plan_pin *pins;
    const struct moe_plan_forbidden *forbidden;
    const double *weights;
    const struct moe_plan_rank *ranks;
    uint32_t count[MOE_SECTION_COUNT];
};

const struct rt_file *rt_bundle_file(const moert_bundle *b, const char *path); /* or NULL */
/* Index into layers of the model's own layer number; -1: none. */
int rt_bundle_find(const moert_bundle *b, int layer);
/* Sets b's sections from plan.bin once everything in it has been checked. */
moert_result rt_plan_check(moert_bundle *b, const struct rt_file *plan);
void rt_hash_hex(const void *data, size_t bytes, char hex[65]); /* BLAKE2b-256 */
/* Bytes of a class's record parts; s1 and s2 are 0 of bf16 records, b1 and b2 without biases.
 * inter: I or SI. */
struct rt_record {
    int64_t w1_rows, w1, w2, s1, s2, b1, b2;
};
struct rt_record rt_record_parts(const struct moe_plan_class *c, int inter, bool bias);
bool rt_gated(const struct moe_plan_class *c);
#define RT_ALIGN(n) (((int64_t)(n) + 255) & ~(int64_t)255)
/* Where a layer keeps what it owns, as offsets into its one allocation. */
struct rt_layer_parts {
    int64_t pool, shared, router, router_bias, correction, shared_gate, phys_of_slot,
        slot_of_expert, static_experts, bytes;
    int64_t replicas; /* several ranks: int32 first_slot, slot_list, share_end (args.h) */
};
/* slots: records in the pool, those of a rank that may hold an expert. */
struct rt_layer_parts rt_layer_parts(const struct moe_plan_class *c, int slots);
int rt_rank_slots(const moert_bundle *b, const struct moe_plan_class *c, int rank);

/* ---- safetensors.c: checkpoints ---- */

/* What a checkpoint may hold. X(NAME, spelling, bits) */
#define RT_DTYPES(X) \
    X(BOOL, "BOOL", 8) \
    X(U8, "U8", 8) \
    X(I8, "I8", 8) \
    X(F8_E4M3, "F8_E4M3", 8) \
    X(F8_E5M2, "F8_E5M2", 8) \
    X(F8_E8M0, "F8_E8M0", 8) \
    X(I16, "I16", 16) \
    X(U16, "U16", 16) \
    X(F16, "F16", 16) \
    X(BF16, "BF16", 16) \
    X(I32, "I32", 32) \
    X(U32, "U32", 32) \
    X(F32, "F32", 32) \
    X(F64, "F64", 64) \
    X(I64, "I64", 64) \
    X(U64, "U64", 64)
#define X(name, ...) RT_##name,
enum rt_dtype { RT_DTYPES(X) RT_DTYPE_COUNT }; /* the count: a type this build does not know */
#undef X
enum { RT_MAX_RANK = 8 };

struct rt_tensor {
    const char *name;
    enum rt_dtype dtype;
    const char *dtype_name;
    int rank;
    int64_t shape[RT_MAX_RANK];
    const unsigned char *data;
    size_t bytes;
};

/* A file, or a folder of shards: model.safetensors, else what model.safetensors.index.json names.
 * Shards are opened when a tensor of theirs is first looked at. */
struct rt_checkpoint;
moert_result rt_checkpoint_open(const char *path, struct rt_checkpoint **out);
void rt_checkpoint_close(struct rt_checkpoint *c);
int rt_checkpoint_count(const struct rt_checkpoint *c);
/* Names in ascending order. */
const char *rt_checkpoint_name(const struct rt_checkpoint *c, int i);
/* Index of the first name not below the given one. */
int rt_checkpoint_lower(const struct rt_checkpoint *c, const char *name);
int rt_checkpoint_index(const struct rt_checkpoint *c, const char *name); /* -1: none */
moert_result rt_checkpoint_get(struct rt_checkpoint *c, int i, struct rt_tensor *out);

/* ---- pack.c: from a checkpoint's or a caller's tensors to slot records ---- */

/* rows x cols numbers somewhere in host memory, of any alignment. Strides count elements; with
 * fp4 an element is half a byte, low half first, and col_stride is 1. */
struct rt_matrix {
    const unsigned char *data; /* NULL: absent */
    enum rt_dtype dtype;       /* BF16, F16, F32, F8_E4M3; U8 is fp4 (e2m1) */
    int64_t rows, cols, row_stride, col_stride;
    const unsigned char *scale; /* NULL: none; one factor for block_rows x block_cols */
    enum rt_dtype scale_dtype;  /* F32, BF16, F16, F8_E8M0 */
    int64_t block_rows, block_cols, scale_stride; /* stride of a row of blocks */
};
struct rt_expert {
    struct rt_matrix gate, up, down;                /* [I][H] [I][H] [H][I] */
    struct rt_matrix gate_bias, up_bias, down_bias; /* [1][I] [1][I] [1][H] */
};
struct rt_source {
    struct rt_matrix router;                               /* [E][H] */
    struct rt_matrix router_bias, correction, shared_gate; /* [1][E] [1][E] [1][H] */
    struct rt_expert shared;
    struct rt_expert *experts; /* [E] */
};

int rt_dtype_bytes(enum rt_dtype dtype);
void rt_row_fp32(const struct rt_matrix *m, int64_t row, float *out);
/* Rounded to nearest even. scratch: m->cols floats. */
void rt_row_bf16(const struct rt_matrix *m, int64_t row, uint16_t *out, float *scratch);
/* Whether an e4m3 matrix has one scale for every block of an fp8 record, so that it is taken as it
 * is. */
bool rt_scales_fit(const struct rt_matrix *m);
/* Fills one record; gaps between its parts are zeroed. scratch: max(H, I, SI) floats. */
void rt_pack_expert(const struct moe_plan_class *c, const struct rt_expert *e, void *record,
                    float *scratch);
void rt_pack_shared(const struct moe_plan_class *c, const struct rt_expert *e, void *record,
                    float *scratch);
/* The source that a caller's pointers are. out->experts is allocated. */
moert_result rt_source_from_weights(const struct moe_plan_class *c, const moert_weights *w,
                                    struct rt_source *out);

/* ---- names.c: which tensors of a checkpoint are a layer ---- */

/* out points into the checkpoint; out->experts is allocated. */
moert_result rt_source_from_checkpoint(const struct moe_plan_class *c, int layer,
                                       struct rt_checkpoint *ck, struct rt_source *out);

/* ---- cache.c: what was compiled here, by key; the compiler's cache, same format ---- */

/* An entry is "LABEL SYMBOL\n" and the code. Entries are verified when read. */
struct rt_entry {
    unsigned char *memory; /* to be freed */
    const char *symbol;
    const unsigned char *code;
    size_t bytes;
};
moert_result rt_cache_dir(char *out, size_t size); /* made, checked to be private */
bool rt_cache_get(const char *dir, const char key[65], struct rt_entry *out);
moert_result rt_cache_put(const char *dir, const char key[65], const char *label,
                          const char *symbol, const void *code, size_t bytes);
int rt_cache_lock(const char *dir, const char key[65]); /* fd; close it to unlock */

/* ---- nvrtc.c ---- */

/* The code of a kernel for a target, from the cache or compiled. entry->memory is the caller's. */
moert_result rt_nvrtc(const struct rt_file *source, const char *expression,
                      enum moe_target target, struct rt_entry *out);

/* ---- cuda.c, host.c: devices ---- */

struct rt_log {
    moert_log_fn fn;
    void *user;
};
void rt_log(const struct rt_log *log, moert_log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

struct rt_kernel {  /* one per kernel of the plan */
    void *function; /* CUfunction, or the class's moe_host_launch; NULL: not of this device */
    int resident;   /* blocks per multiprocessor, for persistent grids */
};
struct rt_launch {
    const struct rt_kernel *kernel;
    const char *expression;
    unsigned grid[3], block, smem, cluster; /* cluster: blocks, 0 or 1: none */
    bool early;       /* a programmatic dependent of the launch before it */
    const void *maps; /* the kernel's second argument, or NULL */
};
enum { RT_MAP_BYTES = 128, RT_MAP_ALIGN = 64 };

/* A device's functions. All but open are called between enter and leave. */
struct rt_ops {
    void (*close)(void *device);
    moert_result (*enter)(void *device);
    void (*leave)(void *device);
    moert_result (*alloc)(void *device, size_t bytes, void **out); /* 256-aligned */
    void (*free)(void *device, void *p);
    /* Memory that other processes of this node can map by the descriptor; both sides know its size. */
    moert_result (*alloc_shared)(void *device, size_t bytes, void **out, int *fd);
    moert_result (*map_shared)(void *device, int fd, size_t bytes, void **out);
    void (*unmap_shared)(void *device, void *p, size_t bytes); /* of either */
    /* Host memory that kernels reach by the same address. */
    moert_result (*alloc_host)(void *device, size_t bytes, void **out);
    void (*free_host)(void *device, void *p);
    /* Copies and sets are done when they return. */
    moert_result (*upload)(void *device, void *dst, const void *src, size_t bytes);
    moert_result (*download)(void *device, void *dst, const void *src, size_t bytes);
    moert_result (*set)(void *device, void *dst, int byte, size_t bytes);
    /* Device to device, on the stream. */
    moert_result (*copy)(void *device, void *dst, const void *src, size_t bytes,
                         moert_stream s);
    moert_result (*stream)(void *device, moert_stream *out);
    void (*stream_free)(void *device, moert_stream s);
    moert_result (*sync)(void *device, moert_stream s); /* NULL: everything */
    moert_result (*launch)(void *device, const struct rt_launch *l, const struct moe_args *args,
                           moert_stream s);
    /* A tensor map over memory at base, `slots` slots of it, RT_MAP_BYTES at out; NULL: no such thing. */
    moert_result (*encode_map)(void *device, const struct moe_plan_map *m, void *base,
                               int slots, void *out);
    moert_result (*begin_capture)(void *device, moert_stream s);
    moert_result (*end_capture)(void *device, moert_stream s, bool keep, void **graph);
    moert_result (*replay)(void *device, void *graph, moert_stream s);
    void (*graph_free)(void *device, void *graph);
    /* Two marks on a stream and the microseconds between them. */
    moert_result (*mark)(void *device, int which, moert_stream s);
    moert_result (*elapsed)(void *device, double *us);
    /* Makes kernels[i] for the plan's kernel i, of a class with this source. */
    moert_result (*load)(void *device, const moert_bundle *b, const struct rt_file *source,
                         int i, const struct rt_log *log, struct rt_kernel *out);
};
extern const struct rt_ops rt_cuda_ops, rt_host_ops;
moert_result rt_cuda_open(int ordinal, struct moert_tool_device *info, void **out);
moert_result rt_host_open(int threads, struct moert_tool_device *info, void **out);
/* Targets whose code a GPU of this capability runs, best first; returns how many. */
int rt_cuda_targets(int major, int minor, enum moe_target out[2]);

/* ---- context.c ---- */

struct moert_context {
    moert_bundle *bundle;
    const struct rt_ops *ops;
    void *device;
    struct moert_tool_device info;
    struct rt_log log;
    struct rt_kernel *kernels;
    unsigned char *workspace;
    bool own_workspace;
    void *ws[MOE_WS_COUNT];
    /* Several ranks */
    moert_world *world; /* NULL: one rank */
    int rank;
    unsigned char *arena;      /* of moert_arena_bytes, zeroed */
    int arena_fd;              /* a world of processes */
    char **peers;              /* [R] on the device */
    struct moe_status *status; /* host memory */
    moert_layer *layers;       /* made from it, linked */
};
/* Where each buffer lies in the workspace: its own place for all classes, zeroed ones among
 * them, so that no class disturbs another's counters. Returns the bytes of all. */
int64_t rt_workspace_layout(const moert_bundle *b, int64_t offset[MOE_WS_COUNT],
                            int64_t bytes[MOE_WS_COUNT]);
const char *rt_target_name(int target);
const char *rt_string(const moert_bundle *b, uint32_t offset);

/* ---- world.c: the ranks of a layer ---- */

/* What a rank tells the others at set-up. */
struct rt_word {
    uint64_t arena_bytes;
    uint64_t nccl; /* 1: the caller gave a communicator */
    char plan[72]; /* hash of its plan.bin */
    char node[40];
};
struct rt_member {
    moert_context *context; /* NULL: not there; of another process: never seen */
    struct rt_word word;
};
/* A kind of world. `local` ranks are contexts of this process on one device. */
struct rt_world_ops {
    /* The set-up's barrier: every rank's word, once all have given theirs. */
    moert_result (*gather)(moert_world *w, struct rt_word *all);
    /* Makes arenas, which are alike, ready to be reached; NULL: they are. */
    moert_result (*trade)(moert_world *w);
    /* Where `rank` of this process reaches a peer's arena. Between enter and leave of its device. */
    moert_result (*reach)(moert_world *w, int rank, int peer, void **out);
    /* Before a context goes, which is still a member; before the world goes. NULL: nothing to do. */
    void (*leave)(moert_world *w);
    void (*close)(moert_world *w);
};
extern const struct rt_world_ops rt_process_ops;
struct moert_world {
    const struct rt_world_ops *ops;
    int ranks;
    int own;              /* this process's one rank; -1: all are here */
    struct rt_link *link; /* process.c's */
    void *nccl;           /* ncclComm_t of ranks that do not share memory, else NULL */
    bool nccl_made, far;  /* nccl is the world's own; ranks are apart */
    uint64_t timeout_ns;
    bool connected;
    bool excluded[MOE_MAX_RANKS];           /* left out, and */
    int generation;                         /* how many */
    struct rt_member member[MOE_MAX_RANKS]; /* of this process, by rank */
};
/* process.c: rank and ranks from cfg or the launcher, and a connection between all. */
moert_result rt_world_meet(moert_world *w, moert_world_config *cfg);
/* nccl.c. Joins all ranks, unless w->nccl is given; then blocks between begin and end: the p-th at from
 * + p * step goes to rank p, and rank p's comes to `to` + p * bytes. */
moert_result rt_nccl_join(moert_world *w,
                          moert_result (*gather)(moert_world *w, void *all, size_t bytes));
void rt_nccl_leave(moert_world *w);
moert_result rt_nccl_begin(void);
moert_result rt_nccl_end(void);
void rt_nccl_cancel(void);
moert_result rt_nccl_move(moert_world *w, const void *from, size_t step, void *to, size_t bytes,
                          moert_stream s);
/* Whether a bundle's context may be a rank of w, NULL: alone. */
moert_result rt_world_check(const moert_bundle *b, const moert_world *w, int rank);
/* Makes the context's arena and joins; leave undoes both. Between enter and leave of the device. */
moert_result rt_world_join(moert_context *c, moert_world *w, int rank);
void rt_world_leave(moert_context *c);
/* False for a rank that is left out, and for none. */
bool rt_world_lives(const moert_world *w, int rank);
/* MOERT_PEER once a wait of this rank has given up, with who was missing. */
moert_result rt_world_fault(const moert_context *c);

/* ---- layer.c, forward.c ---- */

struct moert_layer {
    moert_context *context;
    moert_layer *next; /* of the context's */
    int layer;
    const struct moe_plan_class *c;
    const struct moe_plan_target *target;
    const int32_t *expert_of_slot;
    struct rt_layer_parts parts;
    unsigned char *memory; /* device */
    void *maps; /* the bundle's tensor maps over this layer, RT_MAP_BYTES each; NULL: none */
    bool loaded, router_fp32;
    struct moe_args args; /* what does not change between launches */
};
/* Uploads which slots serve an expert, those of the world's ranks that are not left out. */
moert_result rt_layer_replicas(moert_layer *l);
/* Launches of the stages in mask (bits of enum moe_stage), in chunks. */
moert_result rt_forward(moert_layer *l, const moert_io *io, unsigned stages, moert_stream s);
/* The same for one chunk of several ranks' batches; io has been through rt_io. */
moert_result rt_forward_chunk(moert_layer *l, const moert_io *io, int64_t chunk,
                              unsigned stages, moert_stream s);
/* Checks what a caller gave against the layer and the stages, which become those that will run.
 * *chunks: how many passes there are, on every rank. */
moert_result rt_io(const moert_layer *l, const moert_io *given, unsigned *stages, moert_io *out,
                   int64_t *chunks);
/* The collective of a launch (moe_launch_flags), between this rank's arena and all others'. */
moert_result rt_world_collect(const moert_layer *l, const struct moe_peers *x, int flags,
                              moert_stream s);
/* Fills count elements at p with random values of a tensor's seed. */
moert_result rt_fill(moert_layer *l, void *p, int64_t count, enum moe_fill kind, float scale,
                     uint64_t seed);

#endif
