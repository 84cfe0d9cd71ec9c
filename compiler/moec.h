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
/* Quoted and escaped; what is no UTF-8 becomes U+FFFD. */
void buf_json_string(struct buf *b, const char *s);
void buf_json_double(struct buf *b, double v); /* four digits; NaN, infinity: null */
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
int core_count(void); /* that this process may run on */
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
/* The format of slot records: FP8_BLOCK for fp8 weights whose blocks the kernels know, else BF16. */
enum moe_format model_record_format(const struct model *m);
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
extern const char *const exchange_names[MOE_EXCHANGE_COUNT];

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
    /* [ranks] where ranks differ; NULL: they do not. */
    const double *rank_speed;     /* relative */
    const double *rank_memory_gb; /* instead of memory_gb */
    const int *rank_slots;        /* slots of a rank that may hold an expert */
    struct loc rank_speed_loc, rank_memory_loc, rank_slots_loc;
};
/* n: a string (a file's path relative to the file that names it) or an inline map. Looks GPUs up
 * in gpus.yaml beside the cluster's file, then in the built-in copy of plans/clusters/gpus.yaml.
 * NULL on error. */
struct cluster *cluster_read(struct arena *a, struct diags *d, struct node *n);
struct cluster *cluster_default(struct arena *a); /* one rank of no particular GPU */
/* Matrix rate; a GPU without fp8 of its own multiplies it as fp16. 0: not known. */
double cluster_tflops(const struct cluster *c, bool fp8);

/* ---- deploy.c: deployment file, moe_config, load balancer ---- */

#define X(name, ...) DISPATCH_##name,
enum dispatch { MOE_DISPATCHES(X) };
#undef X
extern const char *const dispatch_names[MOE_DISPATCH_COUNT];

struct assignment { /* one layer of initial_global_assignments */
    int layer;
    int *expert_of_slot; /* num_slots */
    struct loc loc;
};
struct placement_limits {      /* zeros: none */
    bool keep_groups_in_nodes; /* the router's groups of experts */
    int cross_node_slots; /* of a layer, which may hold an expert off its group's node all the same */
    int max_replicas, max_replicas_per_node; /* of one expert */
    struct loc loc;                          /* of the key placement; no source: not given */
};
struct deployment {
    const char *path;
    struct model *model;
    struct cluster *cluster;
    bool targets[MOE_TARGET_COUNT];
    int max_num_tokens; /* over all ranks */
    int num_slots;      /* 0: not given */
    int layer_updates_per_iter;
    struct assignment *assignments; /* ascending layers; these layers are placed as given */
    int num_assignments;
    struct assignment *start; /* ascending layers; where the policy starts in the others */
    int num_start;
    int moves;           /* slots a layer that may differ from start; -1: any number */
    struct loads *loads; /* NULL: all experts weigh the same */
    const char *policy;  /* a shipped name (default "robust"), or as the file spells a path */
    const char *policy_path; /* the Lua file; NULL: shipped */
    struct loc policy_loc;   /* no source: by default */
    struct placement_limits limits;
    enum dispatch dispatch;
    bool deterministic_combine; /* disable_finalize_fusion */
};
struct overrides { /* from the command line; NULL or 0: not given */
    const char *model, *targets, *policy;
    int ep;
    const char **set; /* key=value, key dotted as in the file ("moe_config.max_num_tokens") */
    int num_set;
    const char *start; /* a placement's file; takes the place of given assignments */
    bool improve;      /* moves is given: start from start, or from the given assignments */
    int moves;
};
/* FILE is a deployment, a TensorRT-LLM options file holding only moe_config, a model file or a
 * config.json (DESIGN 3). NULL on error. */
struct deployment *deployment_read(struct arena *a, struct diags *d, const char *path,
                                   const struct overrides *o);
/* Slots of one rank, whether num_slots is given or not. */
int deployment_slots(const struct deployment *dep);

/* ---- assign.c: a placement that was made before ---- */

/* What a placement must fit. */
struct assign_context {
    struct arena *arena;
    struct diags *diags;
    const struct model *model;
    const struct cluster *cluster;
    int num_slots;    /* 0: the placement says */
    struct loc slots; /* where num_slots was set */
};
/* Layers to lists of slots, as TensorRT-LLM has it in initial_global_assignments; num_slots must be
 * set. */
bool assign_map(struct assign_context *c, struct node *map, struct assignment **out, int *n);
/* A whole file of moec plan, TensorRT-LLM, SGLang or vLLM, told apart by content. Sets num_slots
 * when it is 0. */
bool assign_file(struct assign_context *c, const char *path, struct assignment **out, int *n);

/* ---- loads.c: recorded loads ---- */

struct workload {
    const char *name; /* for reports: the file's or folder's */
    double weight;    /* 1 unless given; never negative */
    int input;        /* the path it came from */
    int ranks;        /* that a TensorRT-LLM folder was recorded on; 0: not known */
    double *count;    /* [num_layers][experts] tokens; a layer of zeros weighs evenly */
};
struct loads {
    int num_layers, experts;
    int experts_per_token; /* 0: not recorded */
    int *layers;           /* the model's own numbers, ascending */
    struct workload *workloads;
    int num_workloads; /* at least one per path; in the order of the paths, then of time */
};
struct loads_options {               /* zeros: all iterations, one workload per path */
    long long iter_start, iter_stop; /* half-open; stop 0: to the end */
    long long window;                /* iterations per workload; 0: all in one */
    /* Recorded slots are mapped back to experts through these, when an EPLB was on. */
    const struct assignment *assignments;
    int num_assignments, num_slots;
};
enum { LOADS_MAX_EXPERTS = 1024, LOADS_MAX_LAYER = 1 << 16 };
/* Reads n inputs, each a workload: a TensorRT-LLM statistics folder, SGLang's recorder JSON, CSV,
 * or the runtime's own recording, told apart by content. m NULL: no model to check against; lines
 * of a CSV are then layers 0, 1, ... With a model, its layers are the result's; MTP layers that
 * were not recorded are zeros, with a note, and layers without tokens draw a warning. at[i] is
 * where path i was named; at NULL: on the command line. NULL on error. */
struct loads *loads_read(struct arena *a, struct diags *d, const char *const *paths,
                         const struct loc *at, int n, const struct model *m,
                         const struct loads_options *o);
/* Row of a layer in every workload's count, or -1. */
int loads_layer(const struct loads *l, int layer);

/* ---- place.c: replicas and places; policy.h has the Lua side ---- */

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
    struct policy *policy;           /* opened (policy.h), for what else it decides */
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
    int id, bm, bn, bk, warps_m, warps_n, stages; /* bk: in bf16; of e4m3 twice as many */
};
struct router_variant {
    int id, tokens, experts, split;
};
/* The experts part in one launch, on Hopper (templates/hopper.cuh). */
struct hopper_variant {
    int w1_rows,
        w2_rows; /* weight rows of a tile, multiples of 16 up to 256; 0: no such launch */
    int tokens;  /* of a block's tile: 64 or 128 */
    int cluster; /* blocks that take an item together */
    int stages;  /* as many as fit */
    int entries; /* a block sorts up to so many by itself; 0: moe_slots does */
};
/* Dynamic shared memory of a block, in bytes. */
int hopper_smem(const struct hopper_variant *v, const struct moe_plan_class *c);
enum { HOPPER_THREADS = 384 }; /* of a block */
/* The variant for such tiles and batches; false when shared memory does not hold it. */
bool hopper_fill(struct hopper_variant *v, const struct moe_plan_class *c, int tokens);
/* Whether a target and class have that launch. */
bool hopper_serves(enum moe_target target, const struct moe_plan_class *c);
extern const struct gemm_variant gemm_variants[];
extern const int num_gemm_variants;
extern const struct router_variant router_variants[];
extern const int num_router_variants;
int gemm_smem(const struct gemm_variant *v);
int gemm_threads(const struct gemm_variant *v);
int router_smem(const struct router_variant *v);
int slots_smem(int slots, int threads);
/* Entries that a rank sorts when every rank has `tokens`: of all ranks' tokens, though most choose
 * experts of others. */
int64_t entries_received(const struct moe_plan_class *c, int64_t tokens);
/* Whether a bucket's entries are so many that moe_count counts them before moe_slots. */
bool slots_counted(const struct moe_plan_class *c, int tokens);
enum { ROUTER_THREADS = 128, ROUTE_TOKENS = 4, SLOTS_THREADS = 512, ROW_THREADS = 256 };
enum { SLOTS_ALONE = 4096 }; /* entries that each block of moe_slots counts by itself */

/* Variants for one token bucket: ids in the tables above. gemm1 and gemm2 have equal bn. Where
 * experts.w1_rows is not 0, that launch does the work of the four GEMMs. */
struct variant_choice {
    int router, gemm1, gemm2, shared1, shared2;
    struct hopper_variant experts;
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
    const struct placement *placement; /* NULL when the plan was read from a bundle */
    struct moe_plan_class *classes;
    struct moe_plan_layer *layers;
    int32_t *tables;
    struct moe_plan_target *targets;
    struct moe_plan_kernel *kernels;
    struct moe_plan_buffer *buffers;
    struct moe_plan_bucket *buckets;
    struct variant_choice *variants; /* of each bucket; NULL when read from a bundle */
    struct moe_plan_launch *launches;
    char *strings;
    struct moe_plan_balance *balance;
    struct moe_plan_rank *ranks;
    struct moe_plan_pin *pins;
    struct moe_plan_forbidden *forbidden;
    double *weights;
    struct moe_plan_map *maps;
    uint32_t count[MOE_SECTION_COUNT]; /* of each array, by section */
};
/* Places experts on up to n_threads threads, groups layers into classes, lays out records, chooses
 * variants per bucket, writes the launch lists for every target and checks that a rank's memory
 * holds it all. The deployment was checked by its reader. NULL on error. */
struct plan *plan_make(struct arena *a, struct diags *d, const struct deployment *dep,
                       int n_threads);
const char *plan_string(const struct plan *p, uint32_t offset);
uint32_t plan_intern(struct plan *p, const char *s);
/* Which rows of gemm_variants and router_variants a class uses on any target. */
void plan_variants(const struct plan *p, int class_index, bool *gemm, bool *router);
void plan_yaml(const struct plan *p, struct buf *out);   /* plan.yaml */
void plan_binary(const struct plan *p, struct buf *out); /* plan.bin */

/* ---- cost.c: what a step costs, on paper ---- */

enum { MAX_COST_RANKS = 1024, MAX_COST_EXPERTS = 1024 };

/* One layer on paper. expert_of_slot NULL: all experts alike, and the busiest rank gets `imbalance`
 * times what its slots make it get. */
struct cost_setup {
    const struct model *model;
    const struct cluster *cluster; /* its figures and domain; its number of ranks is not read */
    int ranks, slots_per_rank;
    int filled_slots;   /* over all ranks */
    int max_num_tokens; /* over all ranks in one pass */
    bool fp8;           /* weights and dispatched rows in fp8, else bf16 */
    double imbalance;
    const int *expert_of_slot;   /* [ranks * slots_per_rank] */
    const double *share_of_slot; /* NULL: evenly */
    const double *load;          /* [experts] any scale; NULL: alike */
    const double *rank_load;     /* [ranks] any scale; NULL: follows from the shares */
    double weight;               /* of this layer and workload in a mean; cost_setup: 1 */
};
struct cost_placement {
    int num_layers, ranks, slots_per_rank;
    const int *layers;            /* the model's own numbers */
    const int **expert_of_slot;   /* [num_layers] of ranks * slots_per_rank */
    const double **share_of_slot; /* or NULL: evenly */
    enum dispatch dispatch;
    const struct loads *loads; /* or NULL */
};
/* X(name): of the slowest rank in one pass of a layer; times in microseconds. */
#define COST_FIGURES(X) \
    X(imbalance)        /* max/mean rows of the ranks */ \
    X(rows)             /* routed rows */ \
    X(hit)              /* slots expected to have one */ \
    X(weight_bytes)     /* read */ \
    X(activation_bytes) /* read and written */ \
    X(flop) \
    X(memory_us) \
    X(compute_us) \
    X(gemm_us) /* the larger of the two */ \
    X(combine_us) \
    X(launch_us)
struct cost {
    int passes, tokens; /* a batch of more than max_num_tokens is split; tokens of one pass */
#define X(name) double name;
    COST_FIGURES(X)
#undef X
    double exchange_us[MOE_EXCHANGE_COUNT]; /* -1: not possible there */
    int exchange;                           /* the cheapest; -1: one rank */
    double pass_us, layer_us;               /* all of one pass; of all passes */
};
struct cost_memory { /* bytes of one rank; where ranks differ, of the one with the least left */
    double weights, workspace, exchange;
    double capacity; /* 0: not known */
};
/* A deployment's setup, bf16, all experts alike. */
void cost_setup(struct cost_setup *s, const struct deployment *dep);
/* A setup for every layer and workload of a placement, of which the mean is the step; loads NULL:
 * all experts alike. Its pointers stay in use. Returns how many. */
int cost_placed(struct arena *a, const struct cost_setup *base, const struct cost_placement *p,
                struct cost_setup **out);
/* The figure of the cluster without which no time can be given, or NULL. */
const char *cost_lacks(const struct cost_setup *s);
/* The weighted mean over n layers of a step of `tokens` tokens on every rank. The exchange is one for all:
 * the cheapest in sum. */
void cost_layers(const struct cost_setup *layers, int n, int tokens, struct cost *out);
/* The same cost with another exchange than the cheapest, -1 or one that is possible there. */
void cost_exchange(struct cost *c, int exchange);
/* Expected rows and hit slots of every rank; needs expert_of_slot. */
void cost_ranks(const struct cost_setup *s, int tokens, double *rows, double *hit);
/* Ranks that hold one of a token's experts, expected. */
double cost_distinct(const struct cost_setup *s);
void cost_memory(const struct cost_setup *s, struct cost_memory *out);
/* [experts] of a layer: each one's share of all tokens, the weighted mean over workloads; NULL when
 * the layer has no tokens. */
double *cost_load(struct arena *a, const struct loads *l, int layer);
double cost_slot_bytes(const struct cost_setup *s);
/* Microseconds in which a rank receives so many bytes, or slots: by NVLink if all ranks share it,
 * else by the NIC. */
double cost_link_us(const struct cluster *c, int ranks, double bytes);
double cost_migration_us(const struct cost_setup *s, double slots);

/* ---- moves.c: from one placement of a layer to another ---- */

struct moves_problem {
    int experts, ranks, slots_per_rank, ranks_per_node; /* 0: no nodes */
    const int *from, *to; /* [ranks * slots_per_rank], -1: empty */
    const double *load;   /* [experts]; NULL: alike */
};
/* One slot receives weights. */
struct move {
    int slot, expert;
    int replaces; /* what the slot held until then, -1: nothing */
    int from_rank; /* a rank that holds the expert at that moment; the slot's own: a local copy */
    bool spare; /* what it replaces has no other copy and waits in a spare slot of the rank */
    double imbalance; /* max/mean after it, loads split evenly over copies */
};
struct layer_moves {
    struct move
        *moves; /* in order: of those that leave every expert a copy, the largest gain */
    int n;
    int renumbered;       /* slots of a rank that change places; no weights move */
    int dropped;          /* copies for which `to` has no slot */
    int *received, *sent; /* [ranks] over links */
    double before, after; /* max/mean, loads split evenly over copies */
};
/* Both placements hold every expert. */
void moves_order(struct arena *a, const struct moves_problem *p, struct layer_moves *out);

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
    X(plan, "place the experts and print where they are") \
    X(run, "run a layer of a bundle on random or given activations") \
    X(verify, "check a bundle's integrity, then its numerics against the reference") \
    X(bench, "time a bundle's layers and compare with the hardware floor") \
    X(import, "turn a config.json into a model file") \
    X(explain, "say what a plan decided and why") \
    X(diff, "say what moves from one placement to another") \
    X(simulate, "a cluster on paper: step time, imbalance, memory, migration") \
    X(policy, "check a Lua policy") \
    X(stats, "show, merge, convert or make recorded loads") \
    X(cache, "list, clear or verify the kernel cache")
#define X(name, what) int cmd_##name(int argc, char **argv);
MOEC_COMMANDS(X)
#undef X

#endif
