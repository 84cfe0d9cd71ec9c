/* The best split of one load over a fixed placement, in fractions (balance.h, split.c). */
#ifndef MOE_SPLIT_H
#define MOE_SPLIT_H

/* load[E] over the slots, tokens[R*S] receives fractions; at most `sweeps` rounds, fewer when
 * settled. rank_load[R]. Returns the largest load/speed of a rank. Experts without a slot are
 * left out. */
double split_fractions(int experts, int ranks, int slots_per_rank, const int *expert_of_slot,
                       const double *speed, const double *load, int sweeps, double *tokens,
                       double *rank_load);

#endif
