/* What others compute, to the bit: TensorRT-LLM's replication and placement and DeepSeek's EPLB.
 *
 * Both are two greedy steps: give the next replica to the expert whose replicas are the heaviest,
 * then put replicas, heaviest first, on the lightest rank that has room. They differ in number
 * types and in ties, which is all that this file is careful about. */
#include "balance.h"

#include <stdlib.h>
#include <string.h>

/* Something that weighs; order of id decides between equals. */
struct item {
    double key;
    int id;
};

static void *take(size_t n, size_t size) {
    void *p = calloc(n + !n, size);
    if (!p)
        abort();
    return p;
}

/* ---- a heap whose top has the largest key, then the largest id; negate for the smallest ---- */

static bool below(struct item a, struct item b) {
    return a.key < b.key || (a.key == b.key && a.id < b.id);
}

static void sift_down(struct item *heap, int n, int at) {
    struct item x = heap[at];
    for (int child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && below(heap[child], heap[child + 1]))
            child++;
        if (!below(x, heap[child]))
            break;
        heap[at] = heap[child];
    }
    heap[at] = x;
}

static void heapify(struct item *heap, int n) {
    for (int i = n / 2 - 1; i >= 0; i--)
        sift_down(heap, n, i);
}

/* Heaviest first, equals by ascending id. */
static int by_weight(const void *x, const void *y) {
    const struct item *a = x, *b = y;
    if (a->key != b->key)
        return a->key > b->key ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

/* ---- TensorRT-LLM ---- */

void balance_trtllm_replicate(int experts, int slots, const float *load, int *count) {
    double sum = 0;
    for (int e = 0; e < experts; e++)
        sum += load[e];
    bool spread = sum == 0 && slots != experts;
    for (int e = 0; e < experts; e++)
        count[e] = spread ? slots / experts + (e < slots % experts) : 1;
    if (spread)
        return;
    struct item *heap = take((size_t)experts, sizeof *heap);
    for (int e = 0; e < experts; e++)
        heap[e] = (struct item){load[e], e};
    heapify(heap, experts);
    for (int used = experts; used < slots; used++) {
        int e = heap[0].id;
        heap[0].key = load[e] / (double)++count[e];
        sift_down(heap, experts, 0);
    }
    free(heap);
}

void balance_trtllm_place(int experts, int ranks, int slots_per_rank, const float *load,
                          const int *count, int *expert_of_slot) {
    struct item *order = take((size_t)experts, sizeof *order);
    struct item *heap = take((size_t)ranks, sizeof *heap);
    int *used = take((size_t)ranks, sizeof *used), open = ranks;
    for (int e = 0; e < experts; e++)
        order[e] = (struct item){load[e] / (double)count[e], e};
    qsort(order, (size_t)experts, sizeof *order, by_weight);
    for (int r = 0; r < ranks; r++)
        heap[r] = (struct item){-0.0, -r};
    heapify(heap, ranks);
    for (int i = 0; i < experts; i++)
        for (int c = 0; c < count[order[i].id]; c++) {
            int r = -heap[0].id;
            expert_of_slot[r * slots_per_rank + used[r]++] = order[i].id;
            heap[0].key -= order[i].key;
            if (used[r] == slots_per_rank)
                heap[0] = heap[--open];
            sift_down(heap, open, 0);
        }
    free(order);
    free(heap);
    free(used);
}

void balance_trtllm_default(int experts, int ranks, int slots_per_rank, int *expert_of_slot) {
    for (int r = 0; r < ranks; r++)
        for (int s = 0; s < slots_per_rank; s++)
            expert_of_slot[r * slots_per_rank + s] =
                (int)(((int64_t)r * experts / ranks + s) % experts);
}

/* ---- DeepSeek: everything in float, equals to the lower index ----
 *
 * Equal replicas stay in order, as upstream's do when its sort is asked to be stable. It does not
 * ask, so its own order of equals is that of the C++ library or of the vector width it met. */

/* Packs n items into packs of n / packs: place_of_item[i] = pack * (n / packs) + how many it held
 * before. Packs of one take the items as they come. */
static void pack(const float *weight, int n, int packs, int *place_of_item) {
    int room = n / packs, open = packs;
    if (room == 1) {
        for (int i = 0; i < n; i++)
            place_of_item[i] = i;
        return;
    }
    struct item *order = take((size_t)n, sizeof *order);
    struct item *heap = take((size_t)packs, sizeof *heap);
    int *used = take((size_t)packs, sizeof *used);
    for (int i = 0; i < n; i++)
        order[i] = (struct item){weight[i], i};
    qsort(order, (size_t)n, sizeof *order, by_weight);
    for (int p = 0; p < packs; p++)
        heap[p] = (struct item){-0.0, -p};
    heapify(heap, packs);
    for (int i = 0; i < n; i++) {
        int p = -heap[0].id;
        place_of_item[order[i].id] = p * room + used[p]++;
        heap[0].key = (float)heap[0].key - (float)order[i].key;
        if (used[p] == room)
            heap[0] = heap[--open];
        sift_down(heap, open, 0);
    }
    free(order);
    free(heap);
    free(used);
}

/* Expert of every replica: each expert once, in order, then the added ones as they are given. */
static void replicate(const float *weight, int experts, int slots, int *expert_of_replica,
                      int *count) {
    struct item *heap = take((size_t)experts, sizeof *heap);
    for (int e = 0; e < experts; e++) {
        heap[e] = (struct item){weight[e], -e};
        expert_of_replica[e] = e;
        count[e] = 1;
    }
    heapify(heap, experts);
    for (int i = experts; i < slots; i++) {
        int e = expert_of_replica[i] = -heap[0].id;
        heap[0].key = weight[e] / (float)++count[e];
        sift_down(heap, experts, 0);
    }
    free(heap);
}

/* One node: its experts' loads to the places of its replicas. */
static void place_node(const float *weight, int experts, int slots, int ranks,
                       int *expert_of_slot) {
    int *expert = take((size_t)slots, sizeof *expert),
        *place = take((size_t)slots, sizeof *place);
    int *count = take((size_t)experts, sizeof *count);
    float *share = take((size_t)slots, sizeof *share);
    replicate(weight, experts, slots, expert, count);
    for (int i = 0; i < slots; i++)
        share[i] = weight[expert[i]] / (float)count[expert[i]];
    pack(share, slots, ranks, place);
    for (int i = 0; i < slots; i++)
        expert_of_slot[place[i]] = expert[i];
    free(expert);
    free(place);
    free(count);
    free(share);
}

/* Order in which nodes hold experts: groups packed onto nodes by their load. A group's sum is
 * rounded once; upstream's order of adding depends on the machine, and agrees while the sum is a
 * whole number below 2^24. */
static void order_groups(const float *load, int experts, int groups, int nodes,
                         int *expert_at) {
    int size = experts / groups;
    float *weight = take((size_t)groups, sizeof *weight);
    int *place = take((size_t)groups, sizeof *place);
    for (int g = 0; g < groups; g++) {
        double sum = 0;
        for (int i = 0; i < size; i++)
            sum += load[g * size + i];
        weight[g] = (float)sum;
    }
    pack(weight, groups, nodes, place);
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < size; i++)
            expert_at[place[g] * size + i] = g * size + i;
    free(weight);
    free(place);
}

void balance_deepseek(int experts, int slots, int groups, int nodes, int ranks,
                      const double *load, int *expert_of_slot) {
    if (groups < 1 || nodes < 1 || groups % nodes)
        groups = nodes = 1;
    int in_node = experts / nodes, node_slots = slots / nodes;
    float *weight = take((size_t)experts, sizeof *weight);
    float *ordered = take((size_t)experts, sizeof *ordered);
    int *expert_at = take((size_t)experts, sizeof *expert_at);
    for (int e = 0; e < experts; e++)
        weight[e] = (float)load[e];
    order_groups(weight, experts, groups, nodes, expert_at);
    for (int i = 0; i < experts; i++)
        ordered[i] = weight[expert_at[i]];
    for (int n = 0; n < nodes; n++) {
        int *out = expert_of_slot + n * node_slots;
        place_node(ordered + n * in_node, in_node, node_slots, ranks / nodes, out);
        for (int s = 0; s < node_slots; s++)
            out[s] = expert_at[n * in_node + out[s]];
    }
    free(weight);
    free(ordered);
    free(expert_at);
}
