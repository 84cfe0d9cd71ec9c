/* What the kernels of assign.cuh take beside struct moe_args: which replica of its expert serves an
 * entry, and what is counted on the way. Plain C11 that is also CUDA.
 *
 * Shapes: E experts, R ranks, S slots of a rank, F filled slots of all ranks, n entries of this rank's
 * batch, B = ceil(n / MOE_ASSIGN_PART) blocks, one of no entries. Slots are numbered over all ranks. */
#ifndef MOE_ASSIGN_H
#define MOE_ASSIGN_H

enum { MOE_ASSIGN_PART = 1024 }; /* entries of a block */
enum { MOE_ASSIGN_LANES = 32 };  /* pairs of a row */

/* X(NAME, spelling): turns, as TensorRT-LLM takes them, by the entry's number among its expert's in
 * the block, the block and the offset; the shares of share_end; the parts that moe_split made. */
#define MOE_ASSIGNS(X) X(ROUNDROBIN, "roundrobin") X(SHARE, "share") X(BALANCED, "balanced")
#define X(name, spelling) MOE_ASSIGN_##name,
enum moe_assign_mode { MOE_ASSIGNS(X) MOE_ASSIGN_COUNT };
#undef X

/* Two replicas of an expert on two ranks, which exchange tokens until both ranks take equally long:
 * give * load(rank_a) - take * load(rank_b) of them, in 1/65536, go from a to b. */
struct moe_pair {
    unsigned short a, b;           /* places in slot_list; a == b: no pair */
    unsigned short rank_a, rank_b; /* of a row's pairs no two name the same rank */
    int give, take;
};

struct moe_assign {
    int *target;           /* [n] the slot of each entry */
    const int *first_slot; /* [E+1] an expert's slots are slot_list[first_slot[e]], ... */
    const int *slot_list;  /* [F] ascending for each expert */
    const int
        *share_end; /* [F] shares added up within an expert, in 1/65536; null: equal parts */
    const struct moe_pair *pairs; /* [rows][MOE_ASSIGN_LANES] */
    int *part_counts;             /* [B][E] entries of each expert in a block's part */
    int *sums;                    /* [E] zero between launches */
    int *total;                   /* [E] in the whole batch; then, by whoever exchanges them, */
    const int *counts;            /* [R][E] of all ranks */
    int *begin;                   /* [E] tokens of the ranks before this one */
    int *ends;                    /* [F] where slots' parts end among all ranks' tokens */
    float *factor;                /* [E] decayed loads */
    int *done;                    /* blocks of moe_tally, 0 between launches */
    float decay;
    int rows, rank, ranks, slots; /* slots: F */
    int offset;                   /* roundrobin: added to an entry's number */
    int equal_ranks;              /* all pairs give and take alike */
    int none;                     /* the target of an entry whose id names no expert */
};

#endif
