/* moec simulate --online: the load moves from one recorded workload to another, and the online
 * planner of the runtime follows it. */
#ifndef MOEC_ONLINE_H
#define MOEC_ONLINE_H

#include "moec.h"

struct online_options {
    int updates; /* layers an iteration; 0: 1 */
    int moves; /* slots of a layer an update may give another expert; -1: the engine's default */
    double worth;  /* what a moved slot must gain of max/mean; 0: the engine's default */
    int settle;    /* iterations of the new workload before the first turn */
    int rotations; /* turns of every layer */
    bool json;
};
/* Prints what every ordered pair of the deployment's workloads becomes. */
bool simulate_online(struct arena *a, struct diags *d, const struct deployment *dep,
                     const struct online_options *o);

#endif
