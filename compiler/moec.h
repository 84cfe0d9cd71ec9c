/* moec, the compiler: every type and function that crosses a file, in pipeline order.
 *
 *   yaml -> model, cluster, balancer -> placement -> variants -> plan -> emit -> nvrtc -> bundle
 *
 * One arena per compilation owns everything; nothing is freed alone. Errors go to a list of
 * diagnostics: a pass reports as many as it can, returns false (or NULL) when it reported an
 * error, and main() turns that into exit 1. No function below main() exits. */
#ifndef MOEC_H
#define MOEC_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "../runtime/bundle.h"

#define MOEC_VERSION "0.1.0"

/* ---- util.c: arena, text, files ---- */

struct arena {
    struct arena_block *head;
};
void *arena_alloc(struct arena *a,
                  size_t bytes); /* zeroed, 16-byte aligned; aborts when out of memory */
void arena_free(struct arena *a);
char *arena_strdup(struct arena *a, const char *s);
char *arena_printf(struct arena *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#define arena_array(a, type, n) ((type *)arena_alloc((a), sizeof(type) * (size_t)(n)))

/* Growing text or bytes, arena-owned; data is always NUL-terminated. */
struct buf {
    struct arena *arena;
    char *data;
    size_t len, cap;
};
void buf_add(struct buf *b, const void *bytes, size_t n);
void buf_printf(struct buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void buf_json_string(struct buf *b, const char *s); /* quoted and escaped */
void buf_json_double(struct buf *b, double v);      /* four digits; NaN, infinity: null */
/* "3-60, 62"; "none" when there is none. Layers ascend. */
const char *layer_ranges(struct arena *a, const int *layers, int n);

/* Whole files. Errors: 0 or errno. file_write goes through a temporary name, fsync, rename. */
int file_read(struct arena *a, const char *path, size_t limit, char **data, size_t *len);
int file_write(const char *path, const void *data, size_t len);
int dir_make(const char *path);   /* mkdir -p, mode 0777 & ~umask */
int dir_remove(const char *path); /* rm -r */
char *path_join(struct arena *a, const char *dir, const char *path); /* absolute path stays */
char *path_dir(struct arena *a, const char *path);                   /* "." when no slash */
void hash_hex(const void *data, size_t len, char out[65]);           /* BLAKE2b-256 */
double now_seconds(void);
/* The nearest of n names within edit distance max(1, len/3), or NULL; of several that are equally
 * near the one that begins alike. */
const char *nearest(const char *word, const char *const *names, int n);

/* ---- diag.c: diagnostics ---- */

struct source { /* a file that was read; text stays for carets */
    const char *path;
    const char *text;
    size_t len;
};
struct
    loc { /* source NULL: no place ("moec: error: ...") ; line and col from 1, col in bytes */
    const struct source *source;
    int line, col;
};
enum severity { DIAG_ERROR, DIAG_WARNING, DIAG_NOTE };
struct diag {
    enum severity severity;
    struct loc loc;
    const char *text;
    struct diag *next;
};
struct diags {
    struct arena *arena;
    struct diag *first, *last;
    int errors;
};
/* A note follows the error it explains. At most 100 errors are kept, then one that says so. */
void diag_add(struct diags *d, enum severity s, struct loc loc, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
void diag_print(const struct diags *d, FILE *out); /* file:line:col: error: text, line, caret */
#define diag_error(d, loc, ...) diag_add((d), DIAG_ERROR, (loc), __VA_ARGS__)

/* ---- yaml.c: YAML and JSON to a tree, and typed reads from it ---- */

enum node_kind { NODE_SCALAR, NODE_LIST, NODE_MAP };
struct node {
    enum node_kind kind;
    struct loc loc;
    const char *text;    /* scalar; NUL-terminated, no NUL inside */
    bool quoted;         /* scalar was quoted: a string whatever it looks like */
    bool used;           /* set by the map_* readers; map_unused reports the others */
    int count;           /* list: items; map: pairs */
    struct node **items; /* list: items; map: values */
    struct node **keys;  /* map: scalars */
};
/* Refuses: aliases, anchors, tags, several documents, duplicate keys, keys that are no scalars,
 * files over 64 MiB or 4 Mi values, depth over 64, scalars over 1 MiB, keys over 1 KiB, invalid
 * UTF-8. JSON surrogate pairs are read. NULL on error. */
struct node *yaml_read(struct arena *a, struct diags *d, const char *path);
struct node *yaml_parse(struct arena *a, struct diags *d, const char *name, const char *text,
                        size_t len);

/* The value of a key, or NULL; marks it used. */
struct node *map_get(struct node *map, const char *key);
/* Errors for keys never read, with the nearest of legal[] (n names) as suggestion. */
bool map_unused(struct diags *d, struct node *map, const char *what, const char *const *legal,
                int n);
/* Typed reads of one node; an error names the key, what was expected and what was there. */
bool node_int(struct diags *d, const struct node *n, const char *key, long long min,
              long long max, int *out);
bool node_double(struct diags *d, const struct node *n, const char *key, double min, double max,
                 double *out);
bool node_bool(struct diags *d, const struct node *n, const char *key, bool *out);
bool node_string(struct diags *d, const struct node *n, const char *key, const char **out);
bool node_enum(struct diags *d, const struct node *n, const char *key, const char *const *names,
               int count, int *out); /* suggests the nearest */
/* The path of a file that a scalar names, relative to the folder of the file it stands in. NULL
 * with an error at the node when there is no such readable file. */
const char *node_path(struct arena *a, struct diags *d, const struct node *n, const char *key);
bool node_is_null(const struct node *n); /* null, ~, empty plain */
bool node_kind_is(struct diags *d, const struct node *n, const char *key, enum node_kind kind);

/* ---- model.c, import.c: the model ---- */

struct model {
    const char *name;
    struct loc loc;
    int num_hidden_layers;
    int num_nextn_predict_layers; /* MTP layers: numbers num_hidden_layers, +1, ... */
    int *moe_layers;              /* ascending; the MTP layers come last */
    int num_moe_layers;
    int hidden_size, moe_intermediate_size;
    int num_experts, num_experts_per_tok;
    struct {
        enum moe_router method;
        int n_group, topk_group;
        bool norm_topk_prob; /* true for minimax2 */
        double routed_scaling_factor;
        bool bias;            /* bias on the logits */
        bool correction_bias; /* bias on the scores, for the choice */
        bool sigmoid;         /* scoring; follows from the method except deepseek_v3 */
        bool mask_zero;       /* masked_groups: zero | -inf (default) */
        bool group_best;      /* group_score: best (DeepSeek-V2) | best_two (default) */
        bool logits_bf16;     /* logits_dtype: bfloat16 */
        double jitter;        /* sparse_mixer: jitter_eps */
        int *experts;         /* static: num_experts_per_tok ids */
    } router;
    enum moe_activation activation;
    double act_alpha, act_limit;
    struct {
        int intermediate_size; /* 0: none */
        bool gate;
    } shared;
    struct {
        enum moe_format format;
        int block[2];
        bool bias; /* expert biases */
    } weights;
    struct { /* where each was set, for diagnostics; no source: by default */
        struct loc num_hidden_layers, num_nextn_predict_layers, moe_layers, hidden_size,
            moe_intermediate_size, num_experts, num_experts_per_tok, router, n_group,
            topk_group, shared, weights;
    } at;
};
/* A model file or a config.json, told apart by content ("model_type" or "architectures").
 * From a config.json, what had to be assumed is added as notes. NULL on error. */
struct model *model_read(struct arena *a, struct diags *d, const char *path);
struct model *model_parse(struct arena *a, struct diags *d, struct node *root);
/* config.json of every known family. name NULL: the model_type. NULL on error. */
struct model *model_import(struct arena *a, struct diags *d, struct node *root,
                           const char *name);
bool model_is_config(struct node *root);
/* What a config.json's model is called: the file, or its folder when the file is config.json, in
 * lower case; NULL when that makes no name. */
const char *model_config_name(struct arena *a, const char *path);
/* The model file's text; model_read of it gives an equal model. */
void model_write(struct buf *out, const struct model *m);
/* Cross-field rules common to both readers (ranges, k <= E, groups divide, ...). */
bool model_check(struct diags *d, const struct model *m);
/* A router as the method has it when nothing else is said. */
void model_router_defaults(struct model *m, enum moe_router method);
/* Spelling of the enumerations, by value. */
extern const char *const router_names[MOE_ROUTER_COUNT];
extern const char *const activation_names[MOE_ACT_COUNT];
extern const char *const format_names[MOE_FORMAT_COUNT];
extern const char *const target_names[MOE_TARGET_COUNT];
extern const char *const stage_names[MOE_STAGE_COUNT];

/* ---- cluster.c: the machines ---- */

/* Figures of a GPU: a GPU table gives them, a cluster overrides them. X(name, least, most) */
#define CLUSTER_FIGURES(X) \
    X(memory_gb, 0.001, 1e5) \
    X(memory_tbps, 0.001, 1e5) \
    X(bf16_tflops, 0.001, 1e7) \
    X(fp8_tflops, 0.001, 1e7) \
    X(fp4_tflops, 0.001, 1e7) \
    X(nvlink_gbps, 0.001, 1e6) \
    X(nic_gbps, 0.001, 1e6)

struct cluster {
    const char *name;
    const char *gpu;        /* NULL: no particular GPU */
    enum moe_target target; /* the GPU's, when gpu is set */
    int sms;
    int ranks, ranks_per_node,
        nvlink_domain; /* domain: ranks that reach each other by NVLink */
#define X(name, ...) double name;
    CLUSTER_FIGURES(X) /* 0: not known; memory is not checked then */
#undef X
    struct loc loc, ranks_loc; /* no source: by default */
};
/* n: a string (a file's path relative to the file that names it) or an inline map. Looks GPUs up
 * in gpus.yaml beside the cluster's file, then in the built-in copy of plans/clusters/gpus.yaml.
 * NULL on error. */
struct cluster *cluster_read(struct arena *a, struct diags *d, struct node *n);
struct cluster *cluster_default(struct arena *a); /* one rank of no particular GPU */

/* ---- deploy.c: deployment file, moe_config, load balancer ---- */

enum dispatch { DISPATCH_ROUNDROBIN, DISPATCH_EVEN, DISPATCH_SHARE, DISPATCH_BALANCED };
extern const char *const dispatch_names[4];

struct assignment { /* one layer of initial_global_assignments */
    int layer;
    int *expert_of_slot; /* num_slots */
    struct loc loc;
};
struct deployment {
    const char *path;
    struct model *model;
    struct cluster *cluster;
    bool targets[MOE_TARGET_COUNT];
    int max_num_tokens; /* over all ranks */
    int num_slots;      /* 0: not given */
    int layer_updates_per_iter;
    struct assignment *assignments;
    int num_assignments;
    const char *policy; /* default "robust" */
    enum dispatch dispatch;
    bool deterministic_combine; /* disable_finalize_fusion */
};
struct overrides { /* from the command line; NULL or 0: not given */
    const char *model, *targets, *policy;
    int ep;
    const char **set; /* key=value, key dotted as in the file ("moe_config.max_num_tokens") */
    int num_set;
};
/* FILE is a deployment, a TensorRT-LLM options file holding only moe_config, a model file or a
 * config.json (DESIGN 3). NULL on error. */
struct deployment *deployment_read(struct arena *a, struct diags *d, const char *path,
                                   const struct overrides *o);

/* ---- loads.c: recorded loads ---- */

struct workload {
    const char *name; /* for reports: the file's or folder's */
    double weight;    /* 1 unless given; never negative */
    double *count;    /* [num_layers][experts] tokens */
};
struct loads {
    int num_layers, experts;
    int *layers; /* the model's own numbers, ascending */
    struct workload *workloads;
    int num_workloads;
};
struct loads_options {               /* zeros: all iterations */
    long long iter_start, iter_stop; /* half-open; stop 0: to the end */
    /* Recorded slots are mapped back to experts through these, when an EPLB was on. */
    const struct assignment *assignments;
    int num_assignments, num_slots;
};
/* Reads n inputs, each a workload: a TensorRT-LLM statistics folder, SGLang's recorder JSON, CSV,
 * or the runtime's own recording, told apart by content. m NULL: no model to check against; lines
 * of a CSV are then layers 0, 1, ... at[i] is where path i was named. NULL on error. */
struct loads *loads_read(struct arena *a, struct diags *d, const char *const *paths,
                         const struct loc *at, int n, const struct model *m,
                         const struct loads_options *o);
/* Row of a layer in every workload's count, or -1. */
int loads_layer(const struct loads *l, int layer);

/* ---- policy.c, place.c: replicas and places ---- */

/* Where every expert of every MoE layer lives. Slots are rank-major. */
struct placement {
    int num_layers, experts, ranks, slots_per_rank;
    int *layers;            /* the model's own numbers, ascending */
    int *expert_of_slot;    /* [num_layers][ranks * slots_per_rank], -1: empty */
    double *share_of_slot;  /* the same shape: fraction of its expert's tokens, sums to 1 */
    double *imbalance;      /* [num_layers] under the deployment's dispatch */
    double *imbalance_even; /* [num_layers] */
    double *bound;          /* [num_layers] */
    struct constraints *constraints; /* of a policy; NULL: none */
};
/* What a policy's constraints() said; binds the online engine too. Layers that are not named have
 * none. */
struct constraints {
    struct pin {
        int layer, slot, expert;
    } * pins;
    int num_pins;
    struct forbidden {
        int layer, expert, rank;
    } * forbidden;
    int num_forbidden;
    double *workload_weights; /* one per workload, or NULL */
    int move_budget;          /* slots a layer a window, -1: none given */
};
/* Runs the deployment's policy (built in, or a Lua file in a limited child process) for every
 * layer on up to n_threads threads. NULL on error. */
struct placement *place_layers(struct arena *a, struct diags *d, const struct deployment *dep,
                               int n_threads);

/* ---- variant.c: tile shapes ---- */

struct gemm_variant {
    int id, bm, bn, bk, warps_m, warps_n, stages;
};
struct router_variant {
    int id, tokens, experts, split;
};
extern const struct gemm_variant gemm_variants[];
extern const int num_gemm_variants;
extern const struct router_variant router_variants[];
extern const int num_router_variants;
int gemm_smem(const struct gemm_variant *v);
int gemm_threads(const struct gemm_variant *v);
int router_smem(const struct router_variant *v);
int slots_smem(int slots);
enum { ROUTER_THREADS = 128, ROUTE_TOKENS = 4, SLOTS_THREADS = 512, ROW_THREADS = 256 };

/* Variants for one token bucket: ids in the tables above. gemm1 and gemm2 have equal bn. */
struct variant_choice {
    int router, gemm1, gemm2, shared1, shared2;
};
void variant_choose(enum moe_target target, const struct moe_plan_class *c, int tokens,
                    struct variant_choice *out);
/* Ascending token bounds of the buckets; the last is c->max_tokens. Returns how many, <= max. */
int variant_buckets(enum moe_target target, const struct moe_plan_class *c, int *tokens,
                    int max);

/* ---- plan.c: every decision of a compilation ---- */

/* The plan is plan.bin's own records in growing arrays, with strings as offsets: what is decided
 * here is what the runtime reads. */
struct plan {
    struct arena *arena;
    const struct deployment *dep;
    struct moe_plan_class *classes;
    struct moe_plan_layer *layers;
    int32_t *tables;
    struct moe_plan_target *targets;
    struct moe_plan_kernel *kernels;
    struct moe_plan_buffer *buffers;
    struct moe_plan_bucket *buckets;
    struct moe_plan_launch *launches;
    char *strings;
    uint32_t count[MOE_SECTION_COUNT]; /* of each array, by section */
};
/* Places experts, groups layers into classes, lays out records, chooses variants per bucket and
 * writes the launch lists for every target. The deployment was checked by its reader. */
struct plan *plan_make(struct arena *a, const struct deployment *dep);
const char *plan_string(const struct plan *p, uint32_t offset);
uint32_t plan_intern(struct plan *p, const char *s);
/* Which rows of gemm_variants and router_variants a class uses on any target. */
void plan_variants(const struct plan *p, int class_index, bool *gemm, bool *router);
void plan_yaml(const struct plan *p, struct buf *out);   /* plan.yaml */
void plan_binary(const struct plan *p, struct buf *out); /* plan.bin */

/* ---- emit.c: plan.cuh and the flattened source ---- */

/* unbake: names of plan.cuh constants to emit as __constant__ variables instead of constexpr, for
 * measuring what baking them in gains; NULL-terminated, or NULL. */
extern const char *const plan_constants[]; /* names that unbake may hold; NULL-terminated */
void emit_plan_cuh(const struct plan *p, int class_index, const char *const *unbake,
                   struct buf *out);
void emit_source(const struct plan *p, int class_index, const char *const *unbake,
                 struct buf *out);

/* ---- nvrtc.c, cache.c: text to cubins ---- */

struct compile_job {
    const char *source, *source_name; /* text; name for messages */
    const char *expression;           /* NVRTC name expression */
    enum moe_target target;
    char *cubin; /* out, arena of nvrtc_compile's caller */
    size_t cubin_len;
    char *symbol;   /* out: lowered name */
    bool cached;    /* out */
    double seconds; /* out */
};
/* Compiles every job on up to n_threads threads through the cache. progress may be NULL. */
bool nvrtc_compile(struct arena *a, struct diags *d, struct compile_job *jobs, int n,
                   int n_threads, void (*progress)(int done, int n, void *user), void *user);
bool nvrtc_version(int *major, int *minor); /* false: no NVRTC on this machine */

/* Cache of files by key: $XDG_CACHE_HOME/moec or ~/.cache/moec, mode 0700. Values are verified on
 * read; one process makes a key while others wait for it. The runtime keeps what it compiles in the
 * same place and form. The functions may be called from several threads, each with its own arena. */
struct cache;
struct cache *cache_open(struct arena *a, struct diags *d); /* NULL and a warning: no cache */
const char *cache_dir(const struct cache *c);
/* False when there is no such entry. One that is not what its hash says is removed. */
bool cache_get(struct cache *c, struct arena *a, const char key[65], char **data, size_t *len);
bool cache_put(struct cache *c, const char key[65], const void *data, size_t len);
int cache_lock(struct cache *c, const char key[65]); /* fd; close it to unlock; -1: none */
/* Names of the files in the cache, sorted. cache_get takes those that are keys; the others are what
 * killed processes left. */
int cache_list(const struct cache *c, struct arena *a, char ***names);
bool cache_is_key(const char *name);

/* An entry: one line "TARGET EXPRESSION SYMBOL", then the cubin (host: the library). */
bool nvrtc_unpack(struct arena *a, char *entry, size_t len, char **label, char **symbol,
                  char **cubin, size_t *cubin_len);

/* ---- bundle.c ---- */

struct build_options {
    int jobs;
    const char *out; /* directory; NULL: ./NAME.moe, NAME being the file's or the model's */
    const char *const *unbake; /* names of plan_constants, NULL-terminated; or NULL */
    void (*progress)(int done, int n, void *user); /* or NULL */
};
struct build_report {
    int kernels, cached; /* cubins, and how many of them the cache had */
    double compile_seconds;
    long long bytes;
    const char *out;
};
bool bundle_build(struct arena *a, struct diags *d, struct plan *p,
                  const struct build_options *o, struct build_report *r);

/* ---- reference.c: a naive layer from the published arithmetic ---- */

/* One layer's weights as plain fp32 rows; see reference.h. */

/* ---- commands: argv[0] is for getopt's messages; exit code 0, 1 or 2 ---- */

#define MOEC_COMMANDS(X) \
    X(build, "compile a deployment, a model or a config.json into a bundle") \
    X(run, "run a layer of a bundle on random or given activations") \
    X(verify, "check a bundle's integrity, then its numerics against the reference") \
    X(bench, "time a bundle's layers and compare with the hardware floor") \
    X(import, "turn a config.json into a model file") \
    X(explain, "say what a plan decided and why") \
    X(cache, "list, clear or verify the kernel cache")
#define X(name, what) int cmd_##name(int argc, char **argv);
MOEC_COMMANDS(X)
#undef X

#endif
