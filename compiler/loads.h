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

/* ---- loads_trtllm.c: a TensorRT-LLM statistics folder ---- */

/* experts: of the model, or 0. */
bool loads_folder(struct arena *a, struct diags *d, const char *path, int experts,
                  const struct loads_options *o, struct recording *out);
#endif
