/* Random numbers that are the same in every run of a test. */
#ifndef DICE_H
#define DICE_H

#include <stdint.h>

static uint64_t dice = 1;
/* In [0, 1). */
static double roll(void) {
    dice = dice * 6364136223846793005u + 1442695040888963407u;
    return (double)(dice >> 11) * 0x1p-53;
}
/* In [0, n). */
static int pick(int n) {
    return (int)(roll() * n);
}

#endif
