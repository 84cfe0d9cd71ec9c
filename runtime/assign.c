/* Replicas by expert, and the pairs of them that exchange tokens, in rows without a common rank. */
#include "assign.h"

#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { ALL_PAIRS = 4 }; /* replicas up to which each exchanges with each */

struct maker {
    int experts, ranks, slots_per_rank;
    const int32_t *slot; /* expert_of_slot */
    const double *speed;
    struct rt_assign *out;
    int num_pairs;
    struct moe_pair *pairs; /* [num_pairs] before they are in rows */
    int *degree;            /* [R] */
};

/* Strides between replicas that form pairs. Beyond a few replicas powers of two, so that an expert on
 * all ranks does not cost their square. */
static int next_stride(int stride, int replicas) {
    return replicas <= ALL_PAIRS ? stride + 1 : stride * 2;
}

/* Where a rank with speed a gives up load to one with speed b, in 1/65536 of its load. */
static int part(const struct maker *m, int a, int b) {
    double x = m->speed ? m->speed[a] : 1, y = m->speed ? m->speed[b] : 1;
    return (int)(y / (x + y) * 65536 + 0.5);
}

/* Pairs of all experts; counts only while pairs is NULL. */
static void list_pairs(struct maker *m) {
    m->num_pairs = 0;
    for (int e = 0; e < m->experts; e++) {
        int first = m->out->first_slot[e], n = m->out->first_slot[e + 1] - first;
        for (int d = 1; d < n; d = next_stride(d, n))
            for (int i = first; i + d < first + n; i++) {
                int p = m->out->slot_list[i] / m->slots_per_rank;
                int q = m->out->slot_list[i + d] / m->slots_per_rank;
                if (p == q)
                    continue;
                if (m->pairs)
                    m->pairs[m->num_pairs] = (struct moe_pair){
                        (unsigned short)i, (unsigned short)(i + d), (unsigned short)p,
                        (unsigned short)q, part(m, p, q),           part(m, q, p)};
                m->num_pairs++;
            }
    }
}

/* Each pair goes into the first row that has room and neither of its ranks. used: [num_pairs][R]
 * bits; place[num_pairs] the row. Returns how many rows. */
static int find_rows(const struct maker *m, uint8_t *used, int *count, int *place) {
    int rows = 0;
    size_t stride = ((size_t)m->ranks + 7) / 8;
    for (int i = 0; i < m->num_pairs; i++) {
        const struct moe_pair *p = &m->pairs[i];
        int row = 0;
        uint8_t *bits = used;
        while (count[row] == MOE_ASSIGN_LANES || (bits[p->rank_a / 8] >> p->rank_a % 8 & 1) ||
               (bits[p->rank_b / 8] >> p->rank_b % 8 & 1)) {
            row++;
            bits += stride;
        }
        bits[p->rank_a / 8] |= (uint8_t)(1 << p->rank_a % 8);
        bits[p->rank_b / 8] |= (uint8_t)(1 << p->rank_b % 8);
        count[row]++;
        place[i] = row;
        rows = row + 1 > rows ? row + 1 : rows;
    }
    return rows;
}

static moert_result take_memory(struct rt_assign *t, int experts, int filled, int rows) {
    size_t pairs = (size_t)rows * MOE_ASSIGN_LANES * sizeof *t->pairs;
    size_t bytes = pairs + sizeof(int32_t) * ((size_t)experts + 1 + 2 * (size_t)filled);
    t->memory = calloc(1, bytes);
    if (!t->memory)
        return rt_no_memory(bytes);
    t->filled = filled;
    t->rows = rows;
    t->pairs = t->memory;
    t->first_slot = (int32_t *)((char *)t->memory + pairs);
    t->slot_list = t->first_slot + experts + 1;
    t->share_end = t->slot_list + filled;
    return MOERT_OK;
}

/* Slots by expert, and their shares added up. */
static void list_slots(const struct maker *m, const int32_t *share, struct rt_assign *t) {
    int total = m->ranks * m->slots_per_rank;
    int32_t *first = t->first_slot;
    for (int s = 0; s < total; s++)
        if (m->slot[s] >= 0)
            first[m->slot[s] + 1]++;
    for (int e = 0; e < m->experts; e++)
        first[e + 1] += first[e];
    for (int s = total - 1; s >= 0; s--) /* from the back: first[e+1] walks down to first[e] */
        if (m->slot[s] >= 0)
            t->slot_list[--first[m->slot[s] + 1]] = s;
    for (int e = 0; e < m->experts; e++)
        first[e] = first[e + 1];
    first[m->experts] = t->filled;
    for (int e = 0; e < m->experts; e++)
        for (int i = first[e], n = first[e + 1] - first[e], end = 0; i < first[e + 1]; i++) {
            end += share ? share[t->slot_list[i]] : 0;
            t->share_end[i] = share ? end : (int32_t)(65536LL * (i - first[e] + 1) / n);
        }
}

static moert_result make_rows(struct maker *m) {
    size_t n = (size_t)m->num_pairs + 1, stride = ((size_t)m->ranks + 7) / 8;
    uint8_t *used = calloc(n, stride);
    int *count = calloc(2 * n, sizeof *count), *place = count + n;
    moert_result r = used && count ? MOERT_OK : rt_no_memory(n * stride);
    if (r == MOERT_OK) {
        struct rt_assign *t = m->out, flat = *t;
        int rows = find_rows(m, used, count, place);
        r = take_memory(t, m->experts, flat.filled, rows);
        if (r == MOERT_OK) {
            memcpy(t->first_slot, flat.first_slot,
                   sizeof(int32_t) * ((size_t)m->experts + 1 + 2 * (size_t)flat.filled));
            memset(count, 0, n * sizeof *count);
            for (int i = 0; i < m->num_pairs; i++)
                t->pairs[place[i] * MOE_ASSIGN_LANES + count[place[i]]++] = m->pairs[i];
        }
        free(flat.memory);
    }
    free(used);
    free(count);
    return r;
}

moert_result rt_assign_make(int experts, int ranks, int slots_per_rank,
                            const int32_t *expert_of_slot, const int32_t *share_of_slot,
                            const double *speed, struct rt_assign *out) {
    struct maker m = {experts, ranks, slots_per_rank, expert_of_slot, speed, out};
    int filled = 0;
    *out = (struct rt_assign){0};
    for (int s = 0; s < ranks * slots_per_rank; s++)
        filled += expert_of_slot[s] >= 0;
    if (filled > 65535)
        return rt_fail(MOERT_UNSUPPORTED, "%d slots hold an expert; 65535 may", filled);
    RT_TRY(take_memory(out, experts, filled, 0));
    list_slots(&m, share_of_slot, out);
    list_pairs(&m);
    m.pairs = calloc((size_t)m.num_pairs + 1, sizeof *m.pairs);
    moert_result r = m.pairs ? MOERT_OK : rt_no_memory((size_t)m.num_pairs * sizeof *m.pairs);
    if (r == MOERT_OK) {
        list_pairs(&m);
        r = make_rows(&m);
    }
    free(m.pairs);
    if (r != MOERT_OK)
        rt_assign_free(out);
    return r;
}

void rt_assign_free(struct rt_assign *t) {
    free(t->memory);
    *t = (struct rt_assign){0};
}
