/* Which replica serves an entry: batches, and what the kernels of templates/assign.cuh must make of
 * them, for the host's tests and the GPU's. A check returns false and says why. */
#ifndef ASSIGN_CHECKS_H
#define ASSIGN_CHECKS_H

#include "../compiler/balance.h"
#include "../compiler/moec.h"
#include "../runtime/assign.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct assign_trial {
    int experts, ranks, slots, tokens, topk; /* slots of a rank; tokens on each */
    int32_t *expert_of_slot, *share;
    const double *speed; /* or NULL */
    struct rt_assign tables;
    int32_t *ids;    /* [R][tokens * topk], a few of which name no expert */
    int32_t *counts; /* [R][E] */
    char why[256];
};

static uint64_t assign_dice = 1;
static double assign_roll(void) {
    assign_dice = assign_dice * 6364136223846793005u + 1442695040888963407u;
    return (double)(assign_dice >> 11) * 0x1p-53;
}

/* Ids drawn by load; invalid: of a thousand so many name no expert. */
static void assign_draw(struct assign_trial *t, const double *load, int invalid) {
    static const int32_t none[] = {-1, INT32_MIN, INT32_MAX};
    int n = t->tokens * t->topk;
    double *sum = malloc(sizeof *sum * (size_t)t->experts), all = 0;
    for (int e = 0; e < t->experts; e++)
        sum[e] = all += load[e];
    memset(t->counts, 0, sizeof *t->counts * (size_t)(t->ranks * t->experts));
    for (int i = 0; i < t->ranks * n; i++) {
        double x = assign_roll() * all;
        int low = 0, high = t->experts - 1;
        while (low < high) {
            int mid = (low + high) / 2;
            if (sum[mid] > x)
                high = mid;
            else
                low = mid + 1;
        }
        t->ids[i] = low;
        if (assign_roll() * 1000 < invalid)
            t->ids[i] = i % 4 < 3 ? none[i % 4] : t->experts;
        else
            t->counts[i / n * t->experts + low]++;
    }
    free(sum);
}

/* A placement planned for load, its tables, and a batch drawn by batch. */
static bool assign_open(struct assign_trial *t, const double *load, const double *batch,
                        const double *speed, int invalid) {
    size_t total = (size_t)(t->ranks * t->slots), n = (size_t)(t->tokens * t->topk);
    struct balance_problem p = {.experts = t->experts,
                                .ranks = t->ranks,
                                .slots_per_rank = t->slots,
                                .split = BALANCE_BALANCED,
                                .workloads = 1,
                                .load = load,
                                .speed = speed};
    struct balance_result r;
    double *share = malloc(sizeof *share * total);
    t->speed = speed;
    t->expert_of_slot = malloc(sizeof(int32_t) * total);
    t->share = malloc(sizeof(int32_t) * total);
    t->ids = malloc(sizeof(int32_t) * n * (size_t)t->ranks);
    t->counts = malloc(sizeof(int32_t) * (size_t)(t->ranks * t->experts));
    bool ok = balance_plan(&p, t->expert_of_slot, share, &r);
    if (ok)
        balance_whole_shares(t->experts, (int)total, t->expert_of_slot, share, 65536, t->share);
    free(share);
    ok = ok && rt_assign_make(t->experts, t->ranks, t->slots, t->expert_of_slot, t->share,
                              speed, &t->tables) == MOERT_OK;
    if (ok)
        assign_draw(t, batch, invalid);
    return ok;
}

static void assign_close(struct assign_trial *t) {
    rt_assign_free(&t->tables);
    free(t->expert_of_slot);
    free(t->share);
    free(t->ids);
    free(t->counts);
}

#define ASSIGN_NO(t, ...) (snprintf((t)->why, sizeof(t)->why, __VA_ARGS__), false)

static bool assign_is_expert(const struct assign_trial *t, int id) {
    return id >= 0 && id < t->experts;
}

/* TensorRT-LLM: in a block of 1024 entries the nth of its expert takes the expert's slot number
 * (n + block + offset) mod count, slots ascending. */
static bool assign_check_turns(struct assign_trial *t, int rank, int offset, int none,
                               const int32_t *target) {
    const int32_t *ids = t->ids + (size_t)rank * (size_t)(t->tokens * t->topk);
    int *slots = malloc(sizeof *slots * (size_t)(t->ranks * t->slots));
    int *seen = calloc((size_t)t->experts, sizeof *seen);
    bool ok = true;
    for (int i = 0; ok && i < t->tokens * t->topk; i++) {
        int count = 0, expected = none;
        if (i % 1024 == 0)
            memset(seen, 0, sizeof *seen * (size_t)t->experts);
        for (int s = 0; assign_is_expert(t, ids[i]) && s < t->ranks * t->slots; s++)
            if (t->expert_of_slot[s] == ids[i])
                slots[count++] = s;
        if (count)
            expected = slots[(seen[ids[i]]++ + i / 1024 + offset) % count];
        if (target[i] != expected)
            ok = ASSIGN_NO(t, "rank %d, entry %d, expert %d: slot %d, not %d", rank, i, ids[i],
                           target[i], expected);
    }
    free(slots);
    free(seen);
    return ok;
}

/* Every entry has a slot of its expert; taken[R*S] counts them on. */
static bool assign_check_slots(struct assign_trial *t, int rank, int none,
                               const int32_t *target, int *taken) {
    const int32_t *ids = t->ids + (size_t)rank * (size_t)(t->tokens * t->topk);
    for (int i = 0; i < t->tokens * t->topk; i++) {
        if (!assign_is_expert(t, ids[i])) {
            if (target[i] != none)
                return ASSIGN_NO(t, "entry %d, id %d: slot %d", i, ids[i], target[i]);
            continue;
        }
        if (target[i] < 0 || target[i] >= t->ranks * t->slots ||
            t->expert_of_slot[target[i]] != ids[i])
            return ASSIGN_NO(t, "entry %d: slot %d does not hold expert %d", i, target[i],
                             ids[i]);
        taken[target[i]]++;
    }
    return true;
}

/* The slots of one rank's entries come in the plan's shares, within a few tokens. */
static bool assign_check_shares(struct assign_trial *t, int rank, int none,
                                const int32_t *target, double *worst) {
    int *taken = calloc((size_t)(t->ranks * t->slots), sizeof *taken);
    bool ok = assign_check_slots(t, rank, none, target, taken);
    for (int s = 0; ok && s < t->ranks * t->slots; s++) {
        if (t->expert_of_slot[s] < 0)
            continue;
        int n = t->counts[rank * t->experts + t->expert_of_slot[s]];
        double off = fabs(taken[s] - n * (t->share[s] / 65536.0));
        *worst = fmax(*worst, off);
        if (off > 3)
            ok = ASSIGN_NO(t, "slot %d has %d of %d tokens; its share is %.4f", s, taken[s], n,
                           t->share[s] / 65536.0);
    }
    free(taken);
    return ok;
}

/* What moe_split says: whole parts of every expert's tokens, and a fullest rank that is within
 * tokens of, or a part over, what the compiler's split of the same counts reaches. *gap: over it. */
static bool assign_check_split(struct assign_trial *t, const int32_t *ends, double part,
                               double *gap) {
    int E = t->experts, total = t->ranks * t->slots;
    int64_t *count = calloc((size_t)E, sizeof *count);
    int64_t *tokens = calloc((size_t)total, sizeof *tokens);
    double *load = calloc((size_t)t->ranks, sizeof *load), most = 0;
    bool ok = true;
    for (int i = 0; i < t->ranks * E; i++)
        count[i % E] += t->counts[i];
    for (int e = 0; ok && e < E; e++) {
        int end = 0;
        for (int i = t->tables.first_slot[e]; ok && i < t->tables.first_slot[e + 1]; i++) {
            if (ends[i] < end)
                ok = ASSIGN_NO(t, "expert %d: parts end at %d, then %d", e, end, ends[i]);
            load[t->tables.slot_list[i] / t->slots] += ends[i] - end;
            end = ends[i];
        }
        if (ok && end != count[e])
            ok = ASSIGN_NO(t, "expert %d: parts of %d tokens, not %d", e, end, (int)count[e]);
    }
    for (int r = 0; r < t->ranks; r++)
        most = fmax(most, load[r] / (t->speed ? t->speed[r] : 1));
    double best =
        balance_split_batch(E, t->ranks, t->slots, t->expert_of_slot, t->speed, count, tokens);
    *gap = best > 0 ? most / best - 1 : 0;
    if (ok && most > best * (1 + part) + 2)
        ok = ASSIGN_NO(t, "the fullest rank takes %.1f, the compiler's split %.1f", most, best);
    free(count);
    free(tokens);
    free(load);
    return ok;
}

/* Entries of one rank in the parts that ends has among all ranks' tokens. */
static bool assign_check_parts(struct assign_trial *t, int rank, int none, const int32_t *ends,
                               const int32_t *target) {
    const int32_t *ids = t->ids + (size_t)rank * (size_t)(t->tokens * t->topk);
    int *nth = calloc((size_t)t->experts, sizeof *nth);
    bool ok = true;
    for (int i = 0; i < rank * t->experts; i++)
        nth[i % t->experts] += t->counts[i];
    for (int i = 0; ok && i < t->tokens * t->topk; i++) {
        int expected = none;
        if (assign_is_expert(t, ids[i])) {
            int at = t->tables.first_slot[ids[i]], n = nth[ids[i]]++;
            while (n >= ends[at])
                at++;
            expected = t->tables.slot_list[at];
        }
        if (target[i] != expected)
            ok = ASSIGN_NO(t, "rank %d, entry %d, expert %d: slot %d, not %d", rank, i, ids[i],
                           target[i], expected);
    }
    free(nth);
    return ok;
}

/* ---- the kernels' text ---- */

#define ASSIGN_KERNELS(X) \
    X(moe_tally<0>) \
    X(moe_factor<0>) \
    X(moe_split<0>) \
    X(moe_replica<0>) \
    X(moe_replica<1>) \
    X(moe_replica<2>)

/* Of a class with so many experts. */
static bool assign_source(struct arena *a, int experts, int topk, struct buf *out) {
    static const char *const before[] = {"args.h", "assign.h", "prim.cuh"}, *const after[] = {
                                                                                "slots.cuh",
                                                                                "assign.cuh"};
    char *text;
    size_t len;
    *out = (struct buf){.arena = a};
    for (int i = 0; i < 3; i++) {
        if (file_read(a, arena_printf(a, "templates/%s", before[i]), 1 << 20, &text, &len))
            return false;
        buf_printf(out, "#line 1 \"templates/%s\"\n%s\n", before[i], text);
    }
    buf_printf(out, "constexpr int kExperts = %d, kTopK = %d;\n", experts, topk);
    for (int i = 0; i < 2; i++) {
        if (file_read(a, arena_printf(a, "templates/%s", after[i]), 1 << 20, &text, &len))
            return false;
        buf_printf(out, "#line 1 \"templates/%s\"\n%s\n", after[i], text);
    }
#define X(name) " X(" #name ")"
    buf_printf(out, "#define KERNELS(X)%s\nMOE_EXPORT(KERNELS)\n", ASSIGN_KERNELS(X));
#undef X
    return true;
}

#endif
