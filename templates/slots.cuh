// Slots: the rows of each slot, in ascending entry order, and the tiles of the grouped GEMMs.
//
// Without a grid barrier: every block knows both where each slot begins and how many entries come
// before its own, since it counts all entries itself where they are few (they are in the
// second-level cache), and else sums the counts that moe_count made of each block's part. Stable,
// hence deterministic. Entries whose expert is not on this rank (or whose id is out of range) get
// row -1.
#pragma once

__device__ __forceinline__ int slot_of_entry(const moe_args &a, int entry, int entries) {
    int e = entry < entries ? a.topk_idx[entry] : -1;
    return e >= 0 && e < kExperts ? a.slot_of_expert[e] : -1;
}

// Exclusive prefix sums of counts[0..S) by one warp: rows into rows[0..S], tiles of BN rows into
// tiles[0..S]. rows may be counts.
template <int BN> __device__ __forceinline__ void scan_slots(int slots, int *rows, int *tiles) {
    const int lane = threadIdx.x % 32;
    int row = 0, tile = 0;
    for (int s0 = 0; s0 < slots; s0 += 32) {
        int n = s0 + lane < slots ? rows[s0 + lane] : 0;
        int m = (n + BN - 1) / BN, n_sum = n, m_sum = m;
        for (int d = 1; d < 32; d *= 2) {
            int n_up = __shfl_up_sync(0xffffffffu, n_sum, d);
            int m_up = __shfl_up_sync(0xffffffffu, m_sum, d);
            n_sum += lane >= d ? n_up : 0;
            m_sum += lane >= d ? m_up : 0;
        }
        if (s0 + lane < slots) {
            rows[s0 + lane] = row + n_sum - n;
            tiles[s0 + lane] = tile + m_sum - m;
        }
        row += __shfl_sync(0xffffffffu, n_sum, 31);
        tile += __shfl_sync(0xffffffffu, m_sum, 31);
    }
    if (lane == 0) {
        rows[slots] = row;
        tiles[slots] = tile;
    }
}

// The tile list, by the whole grid: entry 0 holds the number of tiles, tile i is entry 1 + i.
template <int BN>
__device__ __forceinline__ void write_tiles(int slots, const int *rows, const int *tiles,
                                            moe_tile *out) {
    const int count = tiles[slots];
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    if (first == 0)
        out[0].slot = count;
    for (int i = first; i < count; i += gridDim.x * blockDim.x) {
        int low = 0, high = slots; // the last slot whose first tile is <= i
        while (high - low > 1) {
            int mid = (low + high) / 2;
            if (tiles[mid] <= i)
                low = mid;
            else
                high = mid;
        }
        moe_tile t;
        t.slot = low;
        t.row = rows[low] + (i - tiles[low]) * BN;
        t.rows = min(BN, rows[low + 1] - t.row);
        t.first = tiles[low];
        t.count = tiles[low + 1] - tiles[low];
        out[1 + i] = t;
    }
}

// Adds entries begin, begin + step, ... to counts[slot], a few at a time, so that their loads are
// under way together; those before `before` to counts_before[slot], too.
template <int AHEAD>
__device__ __forceinline__ void count_entries(const moe_args &a, int begin, int end, int before,
                                              int *counts, int *counts_before) {
    const int step = blockDim.x;
    for (int i = begin + threadIdx.x; i < end; i += AHEAD * step) {
        int slot[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            slot[j] = slot_of_entry(a, i + j * step, end);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (slot[j] >= 0)
                atomicAdd(&counts[slot[j]], 1);
            if (slot[j] >= 0 && i + j * step < before)
                atomicAdd(&counts_before[slot[j]], 1);
        }
    }
}

// The same from moe_count's rows, one for each block of this grid. A warp takes the columns of 32
// slots and a few rows of them at a time.
template <int AHEAD>
__device__ __forceinline__ void sum_counts(const moe_args &a, int slots, int *counts,
                                           int *counts_before) {
    const int *rows = static_cast<const int *>(a.ws[MOE_WS_COUNTS]);
    const int parts = gridDim.x, own = blockIdx.x, groups = (slots + 31) / 32;
    const int items = groups * ((parts + AHEAD - 1) / AHEAD);
    for (int item = threadIdx.x / 32; item < items; item += blockDim.x / 32) {
        const int s = item % groups * 32 + threadIdx.x % 32, part = item / groups * AHEAD;
        int n[AHEAD], sum = 0, before = 0;
        if (s >= slots)
            continue;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            n[j] = part + j < parts ? rows[static_cast<long long>(part + j) * slots + s] : 0;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            sum += n[j];
            before += part + j < own ? n[j] : 0;
        }
        atomicAdd(&counts[s], sum);
        atomicAdd(&counts_before[s], before);
    }
}

// The sum of the first `warps` bytes of a slot's counts by warp.
template <int WARPS>
__device__ __forceinline__ int sum_warps(const uint4 *by_warp, int slot, int warps) {
    unsigned sum = 0; // of the even bytes, and of the odd ones in the high half
#pragma unroll
    for (int i = 0; i < WARPS / 16; i++) {
        const uint4 u = by_warp[slot * (WARPS / 16) + i];
        const unsigned words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int left = warps - 16 * i - 4 * j;
            const unsigned v = left >= 4  ? words[j]
                               : left > 0 ? words[j] & ((1u << 8 * left) - 1)
                                          : 0;
            sum += (v & 0x00ff00ffu) + (v >> 8 & 0x00ff00ffu);
        }
    }
    return (sum & 0xffffu) + (sum >> 16);
}

// Row blockIdx.x of COUNTS: entries of each slot among the block's MOE_SLOTS_PART. grid
// ceil(T*k / MOE_SLOTS_PART). Shared memory: S ints.
template <int>
__global__ void __launch_bounds__(256) moe_count(const __grid_constant__ moe_args a) {
    launch_next();
    launch_wait();
    const int slots = a.params.slots, begin = blockIdx.x * MOE_SLOTS_PART;
    int *counts = dyn_smem<int>();
    for (int s = threadIdx.x; s < slots; s += blockDim.x)
        counts[s] = 0;
    __syncthreads();
    count_entries<MOE_SLOTS_PART / 256>(
        a, begin, min(begin + MOE_SLOTS_PART, a.num_tokens * kTopK), 0, counts, counts);
    __syncthreads();
    int *out =
        static_cast<int *>(a.ws[MOE_WS_COUNTS]) + static_cast<long long>(blockIdx.x) * slots;
    for (int s = threadIdx.x; s < slots; s += blockDim.x)
        out[s] = counts[s];
}

// grid ceil(T*k / blockDim.x); COUNTED: moe_count came before, and blocks have MOE_SLOTS_PART
// threads, else 512. Shared memory: 3*(S+1) ints, and a byte for each slot and warp.
template <int BN, int COUNTED>
__global__ void __launch_bounds__(COUNTED ? MOE_SLOTS_PART : 512)
    moe_slots(const __grid_constant__ moe_args a) {
    constexpr int WARPS = (COUNTED ? MOE_SLOTS_PART : 512) / 32;
    launch_next();
    launch_wait();
    const int slots = a.params.slots;
    uint4 *by_warp = dyn_smem<uint4>(); // [S][WARPS] bytes: entries of this block
    int *rows =
        reinterpret_cast<int *>(by_warp + slots * (WARPS / 16)); // count, then first row
    int *place = rows + slots + 1;  // entries of each slot before this block's
    int *tiles = place + slots + 1; // first tile of each slot
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int entries = a.num_tokens * kTopK;
    const int begin = blockIdx.x * blockDim.x;
    const int entry = begin + tid;
    const int slot = slot_of_entry(a, entry, entries);

    for (int s = tid; s < slots; s += blockDim.x)
        rows[s] = place[s] = 0;
    for (int i = tid; i < slots * (WARPS / 16); i += blockDim.x)
        by_warp[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (COUNTED)
        sum_counts<8>(a, slots, rows, place);
    else
        count_entries<8>(a, 0, entries, begin, rows, place);
    const unsigned same = __match_any_sync(0xffffffffu, slot);
    int before = __popc(same & ((1u << lane) - 1));
    if (slot >= 0 && before == 0)
        reinterpret_cast<unsigned char *>(by_warp)[slot * WARPS + warp] = __popc(same);
    __syncthreads();
    if (tid < 32)
        scan_slots<BN>(slots, rows, tiles);
    __syncthreads();

    if (entry < entries) {
        int row = -1;
        if (slot >= 0) {
            before += sum_warps<WARPS>(by_warp, slot, warp);
            row = rows[slot] + place[slot] + before;
            static_cast<int *>(a.ws[MOE_WS_ROW_ENTRY])[row] = entry;
        }
        static_cast<int *>(a.ws[MOE_WS_ROW_OF])[entry] = row;
    }
    write_tiles<BN>(slots, rows, tiles, static_cast<moe_tile *>(a.ws[MOE_WS_TILES]));
    if (blockIdx.x == 0) {
        int *offsets = static_cast<int *>(a.ws[MOE_WS_OFFSETS]);
        for (int s = tid; s <= slots; s += blockDim.x)
            offsets[s] = rows[s];
    }
}
