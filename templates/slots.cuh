// Slots: the rows of each slot, in ascending entry order, and the tiles of the grouped GEMMs.
//
// One launch without a grid barrier: every block counts all entries itself (they are few and in
// the second-level cache), so that it knows both where each slot begins and how many entries come
// before its own. Stable, hence deterministic. Entries whose expert is not on this rank (or whose
// id is out of range) get row -1.
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

// The tile list, by the whole block: entry 0 holds the number of tiles, tile i is entry 1 + i.
template <int BN>
__device__ __forceinline__ void write_tiles(int slots, const int *rows, const int *tiles,
                                            moe_tile *out) {
    const int count = tiles[slots];
    if (threadIdx.x == 0)
        out[0].slot = count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
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

// grid ceil(T*k / blockDim.x), whole warps. Shared memory: 3*(S+1) ints.
template <int BN>
__global__ void __launch_bounds__(512) moe_slots(const __grid_constant__ moe_args a) {
    launch_next();
    launch_wait();
    const int slots = a.params.slots;
    int *rows = dyn_smem<int>();    // count, then first row of each slot
    int *place = rows + slots + 1;  // next row of each slot for this block's entries
    int *tiles = place + slots + 1; // first tile of each slot
    const int tid = threadIdx.x, lane = tid % 32;
    const int entries = a.num_tokens * kTopK;
    const int begin = blockIdx.x * blockDim.x;

    for (int s = tid; s < slots; s += blockDim.x)
        rows[s] = place[s] = 0;
    __syncthreads();
    for (int i = tid; i < entries; i += blockDim.x) {
        int s = slot_of_entry(a, i, entries);
        if (s >= 0) {
            atomicAdd(&rows[s], 1);
            if (i < begin)
                atomicAdd(&place[s], 1);
        }
    }
    __syncthreads();
    if (tid < 32)
        scan_slots<BN>(slots, rows, tiles);
    __syncthreads();
    for (int s = tid; s < slots; s += blockDim.x)
        place[s] += rows[s];
    __syncthreads();

    // Warps take turns, so that rows follow entries.
    const int entry = begin + tid;
    const int slot = slot_of_entry(a, entry, entries);
    const unsigned same = __match_any_sync(0xffffffffu, slot);
    const int before = __popc(same & ((1u << lane) - 1));
    int row = -1;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); warp++) {
        if (warp == tid / 32) {
            row = slot >= 0 ? place[slot] + before : -1;
            __syncwarp();
            if (slot >= 0 && before == 0)
                place[slot] += __popc(same);
        }
        __syncthreads();
    }
    if (entry < entries) {
        static_cast<int *>(a.ws[MOE_WS_ROW_OF])[entry] = row;
        if (row >= 0)
            static_cast<int *>(a.ws[MOE_WS_ROW_ENTRY])[row] = entry;
    }
    if (blockIdx.x == 0) {
        int *offsets = static_cast<int *>(a.ws[MOE_WS_OFFSETS]);
        for (int s = tid; s <= slots; s += blockDim.x)
            offsets[s] = rows[s];
        write_tiles<BN>(slots, rows, tiles, static_cast<moe_tile *>(a.ws[MOE_WS_TILES]));
    }
}
