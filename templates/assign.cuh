// Which replica of its expert serves an entry, and how many tokens each expert has.
//
//   moe_tally    entries of each expert, by part of the batch and in all
//   moe_factor   decayed loads from all ranks' counts
//   moe_split    all ranks' counts split over replicas so that the fullest rank is as empty as can be
//   moe_replica  entry -> slot
//
// Integers throughout, and sums that do not depend on an order: ranks that hold the same counts make
// the same parts, and runs agree bit for bit. moe_assign goes alone but for balanced, which wants
// moe_tally and moe_split before it. Their argument comes by pointer, in args.fill.
#pragma once

__device__ __forceinline__ moe_assign assign_of(const moe_args &a) {
    return *static_cast<const moe_assign *>(a.fill);
}

__device__ __forceinline__ int expert_of_entry(const moe_args &a, int entry) {
    const int e = entry < a.num_tokens * kTopK ? a.topk_idx[entry] : -1;
    return e >= 0 && e < kExperts ? e : -1;
}

// ---- counting ----

// grid B, 256 threads. Shared memory: E + 1 ints.
template <int>
__global__ void __launch_bounds__(256) moe_tally(const __grid_constant__ moe_args a) {
    constexpr int PER = MOE_ASSIGN_PART / 256;
    launch_next();
    launch_wait();
    const moe_assign s = assign_of(a);
    int *counts = dyn_smem<int>(), *last = counts + kExperts;
    const int tid = threadIdx.x;
    int e[PER];
#pragma unroll
    for (int i = 0; i < PER; i++)
        e[i] = expert_of_entry(a, blockIdx.x * MOE_ASSIGN_PART + i * 256 + tid);
    for (int i = tid; i < kExperts; i += 256)
        counts[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER; i++)
        if (e[i] >= 0)
            atomicAdd(&counts[e[i]], 1);
    __syncthreads();
    int *part = s.part_counts + static_cast<long long>(blockIdx.x) * kExperts;
    for (int i = tid; i < kExperts; i += 256) {
        part[i] = counts[i];
        if (counts[i])
            atomicAdd(&s.sums[i], counts[i]);
    }
    __threadfence();
    __syncthreads();
    if (tid == 0)
        *last = atomicAdd(s.done, 1) == static_cast<int>(gridDim.x) - 1;
    __syncthreads();
    if (!*last)
        return;
    __threadfence();
    for (int i = tid; i < kExperts; i += 256) {
        s.total[i] = s.sums[i];
        s.sums[i] = 0;
    }
    if (tid == 0)
        *s.done = 0;
}

// grid ceil(E / 256)
template <int>
__global__ void __launch_bounds__(256) moe_factor(const __grid_constant__ moe_args a) {
    launch_next();
    launch_wait();
    const moe_assign s = assign_of(a);
    const int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= kExperts)
        return;
    int sum = 0;
#pragma unroll 8
    for (int r = 0; r < s.ranks; r++)
        sum += s.counts[r * kExperts + e];
    s.factor[e] = fmaf(s.factor[e], s.decay, static_cast<float>(sum));
}

// ---- the split ----

constexpr int kSplitSweeps = 24; // at most; most batches want half of them
constexpr int kSplitBeyond = 14; // of which so many go beyond the balance point

// count[E] and begin[E], zeros before: tokens of all ranks, and of those before this one.
__device__ __forceinline__ void sum_ranks(const moe_assign &s, int *count, int *begin) {
    constexpr int AHEAD = 8;
    const int groups = (kExperts + 31) / 32;
    const int items = groups * ((s.ranks + AHEAD - 1) / AHEAD);
    for (int item = threadIdx.x / 32; item < items; item += blockDim.x / 32) {
        const int e = item % groups * 32 + threadIdx.x % 32, r0 = item / groups * AHEAD;
        int n[AHEAD], sum = 0, before = 0;
        if (e >= kExperts)
            continue;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            n[j] = r0 + j < s.ranks ? s.counts[(r0 + j) * kExperts + e] : 0;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            sum += n[j];
            before += r0 + j < s.rank ? n[j] : 0;
        }
        atomicAdd(&count[e], sum);
        atomicAdd(&begin[e], before);
    }
}

// What the block keeps in shared memory: 2 E + 3 F + R ints.
struct split_tables {
    int *count, *begin;       // [E] tokens of all ranks, and of those before this one
    int *tokens, *rank, *end; // [F] of a place in slot_list: its part, rank, share_end
    int *load;                // [R]
};

__device__ __forceinline__ void open_split(const moe_assign &s, int slots_per_rank,
                                           const split_tables &t) {
    for (int i = threadIdx.x; i < kExperts; i += blockDim.x)
        t.count[i] = t.begin[i] = 0;
    for (int i = threadIdx.x; i < s.slots; i += blockDim.x) {
        t.rank[i] = s.slot_list[i] / slots_per_rank;
        t.end[i] = s.share_end ? s.share_end[i] : 0;
    }
    for (int r = threadIdx.x; r < s.ranks; r += blockDim.x)
        t.load[r] = 0;
}

// Part i of count by the plan's shares, or equal ones.
__device__ __forceinline__ int share_of(const moe_assign &s, const split_tables &t, int first,
                                        int slots, int i, int count) {
    if (!s.share_end)
        return count / slots;
    const int share = t.end[first + i] - (i ? t.end[first + i - 1] : 0);
    return static_cast<int>(static_cast<long long>(count) * share / 65536);
}

// The parts to begin with; what rounding leaves of an expert is its first slot's.
__device__ __forceinline__ void start_split(const moe_assign &s, const split_tables &t, int e,
                                            int first, int slots) {
    int left = t.count[e];
    for (int i = slots - 1; i >= 0; i--) {
        const int n = i ? min(left, share_of(s, t, first, slots, i, t.count[e])) : left;
        t.tokens[first + i] = n;
        left -= n;
        atomicAdd(&t.load[t.rank[first + i]], n);
    }
}

// Tokens that a pair whose ranks have these loads exchanges, at the balance point or half as far
// again beyond it.
__device__ __forceinline__ int exchange_of(const moe_assign &s, const moe_pair &p, int a, int b,
                                           bool beyond) {
    if (s.equal_ranks)
        return beyond ? (a - b) * 3 / 4 : (a - b) / 2;
    const long long v = static_cast<long long>(a) * p.give - static_cast<long long>(b) * p.take;
    return static_cast<int>((beyond ? v + v / 2 : v) / 65536);
}

// One warp: pairs exchange tokens, a row of them at a time, at first a little beyond the balance
// point, which crosses chains of ranks in few sweeps, then up to it until next to nothing moves.
__device__ __forceinline__ void settle_split(const moe_assign &s, int *tokens, int *load) {
    const int lane = threadIdx.x % 32, little = load[0] / 4096;
    bool beyond = true;
    for (int sweep = 0; sweep < kSplitSweeps; sweep++) {
        int largest = 0;
        moe_pair next = s.pairs[lane];
        __syncwarp();
        for (int row = 0; row < s.rows; row++) {
            const moe_pair p = next;
            if (row + 1 < s.rows)
                next = s.pairs[(row + 1) * MOE_ASSIGN_LANES + lane];
            if (p.a != p.b) {
                const int most = tokens[p.a], least = -tokens[p.b];
                const int a = load[p.rank_a], b = load[p.rank_b];
                const int t = max(min(exchange_of(s, p, a, b, beyond), most), least);
                tokens[p.a] = most - t;
                tokens[p.b] = t - least;
                load[p.rank_a] = a - t;
                load[p.rank_b] = b + t;
                largest = max(largest, t < 0 ? -t : t);
            }
            __syncwarp();
        }
        const bool still =
            !__any_sync(0xffffffffu, largest > (beyond ? 2 * little + 1 : little));
        if (still && !beyond)
            return;
        beyond = beyond && !still && sweep + 1 < kSplitBeyond;
    }
}

// One block of 1024 threads, no fewer than experts.
template <int>
__global__ void __launch_bounds__(1024) moe_split(const __grid_constant__ moe_args a) {
    static_assert(kExperts <= 1024, "a thread for each expert");
    launch_next();
    launch_wait();
    const moe_assign s = assign_of(a);
    const int e = threadIdx.x;
    const int first = e < kExperts ? s.first_slot[e] : 0;
    const int slots = e < kExperts ? s.first_slot[e + 1] - first : 0;
    split_tables t;
    t.count = dyn_smem<int>(), t.begin = t.count + kExperts, t.tokens = t.begin + kExperts;
    t.rank = t.tokens + s.slots, t.end = t.rank + s.slots, t.load = t.end + s.slots;
    open_split(s, a.params.slots, t);
    __syncthreads();
    sum_ranks(s, t.count, t.begin);
    __syncthreads();
    if (e < kExperts)
        start_split(s, t, e, first, slots);
    __syncthreads();
    if (e < 32 && s.rows > 0)
        settle_split(s, t.tokens, t.load);
    __syncthreads();
    if (e < kExperts)
        s.begin[e] = t.begin[e];
    for (int i = 0, end = 0; i < slots; i++)
        s.ends[first + i] = end += t.tokens[first + i];
}

// ---- entries ----

// The replica, of `slots`, that serves the nth entry of an expert on this rank. The entries walk all
// shares by an odd step, so that any few in a row are spread as the shares say.
__device__ __forceinline__ int pick_share(const moe_assign &s, int first, int slots, int nth) {
    const int at = static_cast<int>((nth * 40503u + s.rank * 23473u) % 65536u);
    for (int i = 0; i + 1 < slots; i++)
        if (at < (s.share_end ? s.share_end[first + i] : 65536 * (i + 1) / slots))
            return i;
    return slots - 1;
}

// The same of the nth among all ranks' tokens, from ends.
__device__ __forceinline__ int pick_end(const moe_assign &s, int first, int slots, int nth) {
    for (int i = 0; i + 1 < slots; i++)
        if (nth < s.ends[first + i])
            return i;
    return slots - 1;
}

// before[E]: where each expert's tokens of this block begin, among all ranks' when begin says where
// this rank's do.
__device__ __forceinline__ void sum_parts(const moe_assign &s, const int *begin, int *before) {
    constexpr int AHEAD = 8;
    const int groups = (kExperts + 31) / 32, parts = blockIdx.x;
    const int items = groups * ((parts + AHEAD - 1) / AHEAD);
    for (int i = threadIdx.x; i < kExperts; i += blockDim.x)
        before[i] = begin ? begin[i] : 0;
    __syncthreads();
    for (int item = threadIdx.x / 32; item < items; item += blockDim.x / 32) {
        const int e = item % groups * 32 + threadIdx.x % 32, b0 = item / groups * AHEAD;
        int n[AHEAD], sum = 0;
        if (e >= kExperts)
            continue;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            n[j] = b0 + j < parts ? s.part_counts[static_cast<long long>(b0 + j) * kExperts + e]
                                  : 0;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            sum += n[j];
        atomicAdd(&before[e], sum);
    }
}

// grid B, MOE_ASSIGN_PART threads. MODE: enum moe_assign_mode. Shared memory: E ints, and 32 bytes
// for each expert.
template <int MODE>
__global__ void __launch_bounds__(MOE_ASSIGN_PART)
    moe_replica(const __grid_constant__ moe_args a) {
    constexpr int WARPS = MOE_ASSIGN_PART / 32;
    launch_next();
    launch_wait();
    const moe_assign s = assign_of(a);
    uint4 *by_warp = dyn_smem<uint4>(); // [E][WARPS] bytes: entries of each warp
    int *before = reinterpret_cast<int *>(by_warp + kExperts * (WARPS / 16));
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int entry = blockIdx.x * MOE_ASSIGN_PART + tid;
    const int e = expert_of_entry(a, entry);
    const int first = e >= 0 ? s.first_slot[e] : 0;
    const int slots = e >= 0 ? s.first_slot[e + 1] - first : 0;
    for (int i = tid; i < kExperts * (WARPS / 16); i += blockDim.x)
        by_warp[i] = make_uint4(0, 0, 0, 0);
    if (MODE != MOE_ASSIGN_ROUNDROBIN)
        sum_parts(s, MODE == MOE_ASSIGN_BALANCED ? s.begin : nullptr, before);
    __syncthreads();
    const unsigned same = __match_any_sync(0xffffffffu, e);
    int nth = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && nth == 0)
        reinterpret_cast<unsigned char *>(by_warp)[e * WARPS + warp] = __popc(same);
    __syncthreads();
    if (entry >= a.num_tokens * kTopK)
        return;
    int target = s.none;
    if (slots > 0) {
        nth += sum_warps<WARPS>(by_warp, e, warp);
        int pick = 0;
        if (slots > 1 && MODE == MOE_ASSIGN_ROUNDROBIN)
            pick = (nth + static_cast<int>(blockIdx.x) + s.offset) % slots;
        else if (slots > 1 && MODE == MOE_ASSIGN_SHARE)
            pick = pick_share(s, first, slots, before[e] + nth);
        else if (slots > 1)
            pick = pick_end(s, first, slots, before[e] + nth);
        target = s.slot_list[first + pick];
    }
    s.target[entry] = target;
}
