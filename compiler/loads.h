/* Recorded loads between the files that read, write and judge them. */
#ifndef MOEC_LOADS_H
#define MOEC_LOADS_H

#include "moec.h"

/* A count is at most this, and so is a sum of them: sums over 1024 experts stay exact. */
#define LOADS_MAX_COUNT 1e12
enum { LOADS_MAX_WINDOWS = 4096 };

/* One input as it was recorded, before it is laid over the model's layers. */
struct recording {
    const char *path;
    struct loc loc;            /* the file, or a place in it */
    int rows, experts;         /* one row per recorded layer */
    const int *layers;         /* [rows] the model's own numbers, ascending; NULL: not said */
    const struct loc *rows_at; /* [rows], or NULL */
    const char *name, *model;  /* NULL: not said */
    double weight;
    int ranks, experts_per_token; /* 0: not known */
    int windows;
    double *count; /* [windows][rows][experts] */
};
/* The iterations [*start, *start + *n) of those recorded, first to last, that are asked for, and
 * how many windows they make. False with an error at loc. */
bool loads_range(struct diags *d, struct loc loc, const struct loads_options *o,
                 long long first, long long last, long long *start, long long *n, int *windows);
/* Zeros, [windows][rows][experts]; NULL with an error at loc when that is over a gigabyte. */
double *loads_zeros(struct arena *a, struct diags *d, struct loc loc, int windows, int rows,
                    int experts);

/* ---- loads_trtllm.c: a TensorRT-LLM statistics folder ---- */

/* experts: of the model, or 0. */
bool loads_folder(struct arena *a, struct diags *d, const char *path, int experts,
                  const struct loads_options *o, struct recording *out);
/* Which experts the tokens of a layer chose together, from rank{r}_raw.safetensors. */
struct layer_pairs {
    int layer;
    long long tokens;
    uint32_t
        *count; /* [pair_index(a, b)], a >= b: tokens that chose both; a == b: that chose a */
};
struct pairs {
    int experts, num_layers;
    struct layer_pairs *layers;
    long long ignored; /* ids that name no expert, as padding has them */
};
bool loads_pairs(struct arena *a, struct diags *d, const char *path, int experts,
                 const struct loads_options *o, struct pairs *out);
static inline size_t pair_index(int a, int b) {
    return (size_t)a * ((size_t)a + 1) / 2 + (size_t)b;
}

/* ---- loads_slots.c: a file that places experts in slots ---- */

struct slots {
    const char *path;
    struct loc loc;
    int num_slots, ranks; /* ranks 0: not said */
    int updates;          /* layer_updates_per_iter */
    struct assignment *assignments;
    int num_assignments;
};
/* A load balancer file with initial_global_assignments, or the JSON of moec plan. Ids are -1
 * (empty; plans only) to LOADS_MAX_EXPERTS - 1. */
bool slots_read(struct arena *a, struct diags *d, const char *path, struct slots *out);

/* ---- loads_write.c ---- */

#define LOADS_FORMATS(X) X(csv) X(json) X(sglang) X(trtllm)
enum loads_format {
#define X(name) LOADS_##name,
    LOADS_FORMATS(X)
#undef X
        LOADS_FORMAT_COUNT
};
extern const char *const loads_format_names[LOADS_FORMAT_COUNT];
/* Writes a file, or the folder trtllm is. m may be NULL. MTP layers that no workload has tokens
 * for are left out. Only sglang and trtllm take several workloads, which become steps. */
bool loads_write(struct arena *a, struct diags *d, const struct loads *l, const struct model *m,
                 enum loads_format format, const char *path);
/* Makes a folder to write to, or takes one that is empty. */
bool loads_out_dir(struct diags *d, const char *path);

/* ---- synth.c: made-up loads ---- */

#define SYNTH_KINDS(X) X(zipf) X(lognormal) X(drift) X(mixture)
enum synth_kind {
#define X(name) SYNTH_##name,
    SYNTH_KINDS(X)
#undef X
        SYNTH_KIND_COUNT
};
extern const char *const synth_kind_names[SYNTH_KIND_COUNT];
struct synth {
    enum synth_kind kind;
    double
        skew; /* zipf: the exponent; else sigma of the log popularity. Below 0: a usual one */
    int experts, top_k, num_layers;
    long long tokens; /* of a window; each counts top_k times a layer */
    uint64_t seed;
};
/* Counts of every window, [windows][num_layers][experts]: whole numbers, the same on every
 * machine, none above tokens, tokens x top_k in every layer. */
void synth_run(const struct synth *s, int windows, double *count);

/* ---- stats_show.c ---- */

struct show_options {
    const struct model *model; /* or NULL */
    const struct slots *placement;
    const struct loads_options *read;
    int ep, pairs; /* pairs 0: no co-occurrence */
    bool per_expert, json;
};
/* Judges the loads of the given inputs and prints to stdout. */
bool stats_show(struct arena *a, struct diags *d, const struct loads *l,
                const char *const *inputs, const struct show_options *o);
#endif
