/* The tables that templates/assign.cuh reads, of one layer's placement. */
#ifndef MOERT_ASSIGN_H
#define MOERT_ASSIGN_H

#include <stdint.h>

#include "../templates/assign.h"
#include "moert.h"

struct rt_assign {
    void *memory;           /* one allocation; the rest points into it */
    int filled, rows;       /* slots that hold an expert; rows of pairs */
    int32_t *first_slot;    /* [E+1] */
    int32_t *slot_list;     /* [filled] */
    int32_t *share_end;     /* [filled] */
    struct moe_pair *pairs; /* [rows][MOE_ASSIGN_LANES] */
};
/* share_of_slot in parts of MOE_SHARE_ONE, NULL: equal parts; speed[R] or NULL. At most 65535 filled
 * slots. */
moert_result rt_assign_make(int experts, int ranks, int slots_per_rank,
                            const int32_t *expert_of_slot, const int32_t *share_of_slot,
                            const double *speed, struct rt_assign *out);
void rt_assign_free(struct rt_assign *t);

#endif
