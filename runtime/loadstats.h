/* Loads while serving: tokens per expert of every layer, what is kept of them from iteration to
 * iteration, and recordings of them as TensorRT-LLM makes them. This is the arithmetic that the
 * device's counters (templates/assign.cuh) agree with bit for bit. */
#ifndef MOERT_LOADSTATS_H
#define MOERT_LOADSTATS_H

#include <stdint.h>

#include "moert.h"

/* What is left of a load factor after an iteration when nothing is said. */
#define RT_DECAY 0.9f

/* Adds n chosen ids to count[E]; those that name no expert, as padding has them, are left out. */
void rt_load_count(const int32_t *ids, int64_t n, int experts, int32_t *count);
/* factor = factor * decay + count, rounded once, in fp32. */
void rt_load_decay(float *factor, const int32_t *count, int experts, float decay);

/* A recording of iterations [start, stop) into a folder: rank{r}.safetensors, tensors int64 [E]
 * named ITERATION_LAYER, and meta_info.json by rank 0 after its own file. */
struct rt_recording {
    const char *path; /* the folder; made when it is not there */
    int64_t start, stop;
    int rank, ranks;
    int num_layers, experts, topk;
    const int *layers; /* [num_layers] the model's own numbers */
};
struct rt_recorder;
/* Takes path, start and stop from EXPERT_STATISTIC_PATH and EXPERT_STATISTIC_ITER_RANGE ("START-STOP").
 * *asked is false when the range is not set; MOERT_INVALID when either makes no sense. path points into
 * the environment. */
moert_result rt_recording_asked(struct rt_recording *r, int *asked);
/* Files of an earlier recording go: each rank's own; by rank 0 meta_info.json and those of more ranks. */
moert_result rt_recorder_open(const struct rt_recording *r, struct rt_recorder **out);
/* This rank's counts of an iteration, [num_layers][E]; iterations ascend one by one from wherever they
 * begin, and those out of the range are passed over. The last one writes the files. */
moert_result rt_recorder_step(struct rt_recorder *r, int64_t iteration, const int32_t *count);
/* Writes what there is if the last iteration never came. */
moert_result rt_recorder_close(struct rt_recorder *r);

#endif
