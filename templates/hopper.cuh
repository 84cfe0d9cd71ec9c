// The experts part of a layer in one persistent launch, on Hopper: both grouped GEMMs, the activation
// between them, the shared expert and the combine. wgmma fed by TMA, sm_90a only.
//
// As in gemm.cuh, weights are the M side (BM rows of a record), tokens the N side (up to BN rows of
// one slot), K the reduction in steps of 64. Work items come from one queue in device memory, first
// all of GEMM 1, then all of GEMM 2, the tiles of a slot innermost, so that blocks running together
// share weights in the second-level cache. An item of GEMM 2 waits for the GEMM 1 items of its tile
// of tokens, which blocks have taken before it: no wait can be for work nobody has.
// Which block takes an item changes no result.
//
// A block is one warpgroup that loads and those that multiply: each MI times 64 weight rows by all
// tokens of the tile or, with MI 0, 64 tokens by all BM weight rows, the tokens being wgmma's M side.
// The former wastes nothing on a few tokens, the latter reads shared memory least. Loaders run ahead through a ring of STAGES slices, over the ends of items: weights by TMA,
// token rows gathered by cp.async. A slice is [BM + BN] rows of 128 bytes whose 16-byte chunks are
// permuted by the row's low three bits, as wgmma reads them.
#pragma once
#if MOE_HOPPER

template <int V> struct hopper_shape;
#define X(id, bm, bn, mi, st, entries) \
    template <> struct hopper_shape<id> { \
        static constexpr int BM = bm, BN = bn, MI = mi, STAGES = st, ENTRIES = entries; \
        static constexpr int GROUPS = mi ? bm / (64 * mi) : bn / 64; \
        static constexpr int THREADS = 128 * (GROUPS + 1); \
    };
MOE_HOPPER_VARIANTS(X)
#undef X

// Kinds of items in the queue's order.
enum hopper_kind { HOPPER_SHARED1, HOPPER_GEMM1, HOPPER_SHARED2, HOPPER_GEMM2, HOPPER_END };

// Tensor maps of the weights, [slots][rows][K], by kind.
struct hopper_maps {
    moe_map map[HOPPER_END];
};

// One work item: BM weight rows from m0 times `rows` token rows from `row`.
struct hopper_item {
    int kind;
    int record; // of the pool
    int m0, row, rows;
    int counter; // of the tile of tokens: finished parts of its GEMM 1
    int pad[2];
};

// MOE_WS_QUEUE: the next item that is not a block's first, finished parts of GEMM 2, blocks that need
// no counter any more, then a counter per tile of tokens. All zero between launches: the last block
// to need none sees to it.
enum { HOPPER_NEXT, HOPPER_DONE, HOPPER_LEFT, HOPPER_TILES };

template <int V> struct hopper {
    typedef hopper_shape<V> S;
    static constexpr int BM = S::BM, BN = S::BN, MI = S::MI, STAGES = S::STAGES;
    static constexpr int GROUPS = S::GROUPS;
    static constexpr int ENTRIES =
        S::ENTRIES; // the block sorts up to so many by itself; 0: moe_slots
    static constexpr bool TOKENS_M = MI == 0;
    static constexpr int STAGE_BYTES = (BM + BN) * 128;
    // On their way out, a warpgroup's results: CHUNK tokens at a time, or (tokens M) 64 columns.
    static constexpr int CHUNK = TOKENS_M ? 64 : BN < 32 ? BN : 32;
    static constexpr int PITCH = (TOKENS_M ? 64 : 64 * MI) * 2 + 16; // bytes of a token
    static constexpr int ACC = TOKENS_M ? BM / 2 : BN / 2, PRODUCTS = TOKENS_M ? 1 : MI;
    static constexpr int RING = 32; // items known to the block; > STAGES
    static constexpr bool HEAVY = ACC * PRODUCTS >= 96 && GROUPS == 2; // registers change hands
    static constexpr bool GATED = kActivation != MOE_ACT_RELU2;
    static constexpr int M1 = ((GATED ? 2 : 1) * kInter + BM - 1) / BM;
    static constexpr int M2 = (kHidden + BM - 1) / BM;
    static constexpr int SHARED_M1 = ((GATED ? 2 : 1) * kSharedInter + BM - 1) / BM;

    const moe_args &a;
    const hopper_maps &maps;
    const int slots;
    int *first_row, *first_tile, *record; // [slots + 1], in shared memory
    int *row_of, *entry_of;               // [ENTRIES] in shared memory, or the workspace's
    hopper_item *ring;
    unsigned full, empty, staging; // shared addresses

    __device__ __forceinline__ hopper(const moe_args &args, const hopper_maps &m)
        : a(args), maps(m), slots(args.params.slots) {
        unsigned char *smem = dyn_smem<unsigned char>();
        int at = STAGES * STAGE_BYTES;
        full = smem_base() + at;
        empty = full + 8 * STAGES;
        at += 16 * STAGES;
        ring = reinterpret_cast<hopper_item *>(smem + at);
        at += RING * static_cast<int>(sizeof(hopper_item));
        staging = smem_base() + at;
        at += GROUPS * CHUNK * PITCH;
        first_row = reinterpret_cast<int *>(smem + at);
        first_tile = first_row + slots + 1;
        record = first_tile + slots + 1;
        row_of = ENTRIES ? record + slots + 1 : static_cast<int *>(a.ws[MOE_WS_ROW_OF]);
        entry_of = ENTRIES ? row_of + ENTRIES : static_cast<int *>(a.ws[MOE_WS_ROW_ENTRY]);
    }

    __device__ __forceinline__ int *counters() const {
        return static_cast<int *>(a.ws[MOE_WS_QUEUE]);
    }
    __device__ __forceinline__ int shared_tiles() const {
        return kSharedInter ? (a.num_tokens + BN - 1) / BN : 0;
    }

    // ---- set-up ----

    __device__ __forceinline__ void set_up() {
        const int tid = threadIdx.x;
        if (tid == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full + 8 * i, 128 + 1);
                barrier_init(empty + 8 * i, 4 * GROUPS);
            }
            barrier_init_fence();
            tma_prefetch_map(&maps.map[HOPPER_GEMM1]);
            tma_prefetch_map(&maps.map[HOPPER_GEMM2]);
        }
        launch_wait();
        if (ENTRIES)
            count_slots();
        else
            for (int i = tid; i <= slots; i += blockDim.x)
                first_row[i] = static_cast<const int *>(a.ws[MOE_WS_OFFSETS])[i];
        for (int i = tid; i < slots; i += blockDim.x)
            record[i] = a.phys_of_slot[i];
        __syncthreads();
        if (tid < 32) {
            if (ENTRIES)
                scan_slots<BN>(slots, first_row, first_tile);
            else
                scan_tiles();
        }
        __syncthreads();
        if (ENTRIES)
            place_rows();
    }

    // first_row[s] becomes the entries of slot s, row_of an entry's number among them, entry_of its
    // slot: what moe_slots does, by every block for itself.
    __device__ __forceinline__ void count_slots() {
        const int tid = threadIdx.x, entries = a.num_tokens * kTopK;
        for (int i = tid; i <= slots; i += blockDim.x)
            first_row[i] = 0;
        for (int i = tid; i < entries; i += blockDim.x)
            entry_of[i] = slot_of_entry(a, i, entries);
        __syncthreads();
        if (tid >= 32)
            return;
        for (int i = tid; i - tid < entries; i += 32) {
            const int slot = i < entries ? entry_of[i] : -1;
            const unsigned same = __match_any_sync(0xffffffffu, slot);
            const int before = __popc(same & ((1u << tid) - 1));
            const int first = slot >= 0 ? first_row[slot] : 0;
            __syncwarp();
            if (slot >= 0 && before == 0)
                first_row[slot] = first + __popc(same);
            if (i < entries)
                row_of[i] = first + before;
            __syncwarp();
        }
    }

    // From an entry's slot and number to its row.
    __device__ __forceinline__ void place_rows() {
        const int tid = threadIdx.x, entries = a.num_tokens * kTopK;
        for (int i = tid; i < entries; i += blockDim.x) {
            const int slot = entry_of[i];
            row_of[i] = slot >= 0 ? first_row[slot] + row_of[i] : -1;
        }
        __syncthreads();
        for (int i = tid; i < entries; i += blockDim.x)
            if (row_of[i] >= 0)
                entry_of[row_of[i]] = i;
        if (blockIdx.x == 0 && !(a.flags & MOE_COMBINE)) // moe_combine reads it
            for (int i = tid; i < entries; i += blockDim.x)
                static_cast<int *>(a.ws[MOE_WS_ROW_OF])[i] = row_of[i];
        __syncthreads();
    }

    __device__ __forceinline__ void scan_tiles() {
        const int lane = threadIdx.x % 32;
        int tile = 0;
        for (int s0 = 0; s0 < slots; s0 += 32) {
            const int s = s0 + lane;
            int n = s < slots ? (first_row[s + 1] - first_row[s] + BN - 1) / BN : 0, sum = n;
            for (int d = 1; d < 32; d *= 2) {
                int up = __shfl_up_sync(0xffffffffu, sum, d);
                sum += lane >= d ? up : 0;
            }
            if (s < slots)
                first_tile[s] = tile + sum - n;
            tile += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (lane == 0)
            first_tile[slots] = tile;
    }

    // ---- items ----

    __device__ __forceinline__ hopper_item shared_item(int at, int kind) const {
        const int tiles = shared_tiles(), tile = at % tiles;
        hopper_item it;
        it.kind = kind;
        it.record = 0;
        it.m0 = at / tiles * BM;
        it.row = tile * BN;
        it.rows = min(BN, a.num_tokens - it.row);
        it.counter = HOPPER_TILES + first_tile[slots] + tile;
        return it;
    }

    __device__ __forceinline__ hopper_item routed_item(int at, int kind, int m_tiles) const {
        const int any = at / m_tiles; // one of the slot's tiles
        int low = 0, high = slots;    // the last slot whose first tile is <= any
        while (high - low > 1) {
            int mid = (low + high) / 2;
            if (first_tile[mid] <= any)
                low = mid;
            else
                high = mid;
        }
        const int count = first_tile[low + 1] - first_tile[low];
        const int local = at - first_tile[low] * m_tiles, tile = local % count;
        hopper_item it;
        it.kind = kind;
        it.record = record[low];
        it.m0 = local / count * BM;
        it.row = first_row[low] + tile * BN;
        it.rows = min(BN, first_row[low + 1] - it.row);
        it.counter = HOPPER_TILES + first_tile[low] + tile;
        return it;
    }

    __device__ __forceinline__ hopper_item item(int at) const {
        const int tiles = first_tile[slots], shared = shared_tiles();
        if (at < shared * SHARED_M1)
            return shared_item(at, HOPPER_SHARED1);
        at -= shared * SHARED_M1;
        if (at < tiles * M1)
            return routed_item(at, HOPPER_GEMM1, M1);
        at -= tiles * M1;
        if (at < shared * M2)
            return shared_item(at, HOPPER_SHARED2);
        at -= shared * M2;
        if (at < tiles * M2)
            return routed_item(at, HOPPER_GEMM2, M2);
        hopper_item end = {HOPPER_END, 0, 0, 0, 0, 0, {0, 0}};
        return end;
    }

    // Parts of GEMM 2 (one per multiplying warpgroup of an item).
    __device__ __forceinline__ int last_parts() const {
        return (first_tile[slots] + shared_tiles()) * M2 * GROUPS;
    }

    __device__ __forceinline__ static bool is_second(int kind) {
        return kind >= HOPPER_SHARED2;
    }
    __device__ __forceinline__ static int columns_in(int kind) {
        return kind == HOPPER_GEMM2 ? kInter : kind == HOPPER_SHARED2 ? kSharedInter : kHidden;
    }
    __device__ __forceinline__ static int parts_before(int kind) {
        return (kind == HOPPER_GEMM2 ? M1 : SHARED_M1) * GROUPS;
    }

    // ---- loading: threads 0 .. 127 ----

    __device__ __forceinline__ void load_weights(const hopper_item &it, int stage, int step) {
        const moe_map *map = &maps.map[it.kind];
        barrier_expect(full + 8 * stage, BM * 128);
        tma_load(smem_base() + stage * STAGE_BYTES, map, step * 64, it.m0, it.record,
                 full + 8 * stage);
    }

    __device__ __forceinline__ void wait_for_tile(const hopper_item &it) {
        if (threadIdx.x % 32 == 0)
            while (load_acquire(counters() + it.counter) < parts_before(it.kind)) {
            }
        __syncwarp();
    }

    __device__ __forceinline__ const bf16 *source(const hopper_item &it) const {
        const void *from = it.kind == HOPPER_GEMM2     ? a.ws[MOE_WS_HID]
                           : it.kind == HOPPER_SHARED2 ? a.ws[MOE_WS_SHID]
                                                       : a.x16;
        return static_cast<const bf16 *>(from);
    }

    __device__ __forceinline__ void load() {
        constexpr int LOADS = (BN + 15) / 16; // rows per thread
        const int tid = threadIdx.x, chunk = tid % 8;
        int stage = 0, next = blockIdx.x;
        unsigned phase = 1; // of the empty barriers: the first round waits for nobody
        for (int n = 0;; n++) {
            if (tid == 0)
                ring[n % RING] = item(next);
            named_barrier(1, 128);
            const hopper_item it = ring[n % RING];
            if (it.kind == HOPPER_END)
                break;
            if (tid == 0) // used at the end of the item: its latency is hidden
                next = gridDim.x + atomicAdd(counters() + HOPPER_NEXT, 1);
            const int columns = columns_in(it.kind), steps = (columns + 63) / 64;
            int ahead = 0; // steps whose weights are on their way
            if (is_second(it.kind)) {
                if (tid == 0 && load_acquire(counters() + it.counter) < parts_before(it.kind)) {
                    ahead = min(STAGES, steps);
                    int s = stage;
                    unsigned p = phase;
                    for (int step = 0; step < ahead; step++) {
                        barrier_wait(empty + 8 * s, p);
                        load_weights(it, s, step);
                        if (++s == STAGES)
                            s = 0, p ^= 1;
                    }
                }
                __syncwarp();
                wait_for_tile(it);
            }
            const bf16 *from = source(it);
            unsigned row_at[LOADS]; // in chunks of 8 elements
            bool valid[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int r = tid / 8 + 16 * i;
                valid[i] = r < it.rows && r < BN;
                int row = it.row + (valid[i] ? r : 0);
                if (it.kind == HOPPER_GEMM1)
                    row = entry_of[row] / kTopK;
                row_at[i] = static_cast<unsigned>(row) * static_cast<unsigned>(columns / 8) +
                            static_cast<unsigned>(chunk);
            }
            for (int step = 0; step < steps; step++) {
                barrier_wait(empty + 8 * stage, phase);
                if (tid == 0 && step >= ahead)
                    load_weights(it, stage, step);
                const unsigned to = smem_base() + stage * STAGE_BYTES + BM * 128;
                const bool inside = step * 64 + chunk * 8 < columns;
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    const int r = tid / 8 + 16 * i;
                    if (valid[i])
                        cp_async16(to + r * 128 + (chunk ^ (r & 7)) * 16,
                                   from + (static_cast<long long>(row_at[i]) + step * 8) * 8,
                                   inside);
                }
                barrier_arrive_copies(full + 8 * stage);
                if (++stage == STAGES)
                    stage = 0, phase ^= 1;
            }
        }
        // One slice without data tells the others that there is no more.
        barrier_wait(empty + 8 * stage, phase);
        if (tid == 0)
            barrier_arrive(full + 8 * stage);
        barrier_arrive(full + 8 * stage);
    }

    // ---- multiplying: one warpgroup ----

    // The narrowest product that holds the tile's tokens.
    __device__ __forceinline__ void multiply(int rows, int group, int steps, int &stage,
                                             unsigned &phase, float (&acc)[PRODUCTS][ACC]) {
        if (BN == 16 || rows <= 16)
            multiply_steps<16>(group, steps, stage, phase, acc);
        else if (BN == 32 || rows <= 32)
            multiply_steps < BN<32 ? BN : 32>(group, steps, stage, phase, acc);
        else if (BN == 64 || rows <= 64)
            multiply_steps < BN<64 ? BN : 64>(group, steps, stage, phase, acc);
        else if (BN == 96 || rows <= 96)
            multiply_steps < BN<96 ? BN : 96>(group, steps, stage, phase, acc);
        else
            multiply_steps < BN<128 ? BN : 128>(group, steps, stage, phase, acc);
    }

    template <int N>
    __device__ __forceinline__ void multiply_steps(int group, int steps, int &stage,
                                                   unsigned &phase,
                                                   float (&acc)[PRODUCTS][ACC]) {
        int before = -1;
        for (int step = 0; step < steps; step++) {
            barrier_wait(full + 8 * stage, phase);
            fence_async_shared(); // cp.async wrote the token rows
            const unsigned at = smem_base() + stage * STAGE_BYTES;
            const moe_u64 b = wgmma_descriptor(at + BM * 128);
            wgmma_begin();
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
#pragma unroll
                for (int i = 0; i < MI; i++)
                    wgmma_bf16<N>(acc[i],
                                  wgmma_descriptor(at + (group * MI + i) * 8192) + 2 * kk,
                                  b + 2 * kk, step | kk);
            wgmma_commit();
            if (before >= 0) {
                wgmma_wait<1>();
                release(before);
            }
            before = stage;
            if (++stage == STAGES)
                stage = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        release(before);
    }

    __device__ __forceinline__ void multiply_tokens(const hopper_item &it, int group, int steps,
                                                    int &stage, unsigned &phase,
                                                    float (&d)[ACC]) {
        const bool any = group * 64 < it.rows;
        int before = -1;
        for (int step = 0; step < steps; step++) {
            barrier_wait(full + 8 * stage, phase);
            if (any) {
                fence_async_shared(); // cp.async wrote the token rows
                const unsigned at = smem_base() + stage * STAGE_BYTES;
                const moe_u64 x = wgmma_descriptor(at + BM * 128 + group * 8192);
                const moe_u64 w = wgmma_descriptor(at);
                wgmma_begin();
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_bf16<BM>(d, x + 2 * kk, w + 2 * kk, step | kk);
                wgmma_commit();
                if (before >= 0) {
                    wgmma_wait<1>();
                    release(before);
                }
                before = stage;
            } else {
                release(stage);
            }
            if (++stage == STAGES)
                stage = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        if (before >= 0)
            release(before);
    }

    __device__ __forceinline__ void release(int stage) {
        if (threadIdx.x % 32 == 0)
            barrier_arrive(empty + 8 * stage);
    }

    // What a row's pre-activation is multiplied by, where the weight belongs to the input.
    __device__ __forceinline__ float row_scale(const hopper_item &it, int token) const {
        return token < it.rows ? a.topk_weight[entry_of[it.row + token]] : 0.0f;
    }
    __device__ __forceinline__ const float *bias(const hopper_item &it, bool second) const {
        return reinterpret_cast<const float *>(
            a.pool + it.record * a.params.slot_bytes +
            (second ? a.params.b2_offset : a.params.b1_offset));
    }
    __device__ __forceinline__ static bool is_routed(int kind) {
        return kind == HOPPER_GEMM1 || kind == HOPPER_GEMM2;
    }
    __device__ __forceinline__ static int columns_out(const hopper_item &it) {
        return is_second(it.kind) ? kHidden : is_routed(it.kind) ? kInter : kSharedInter;
    }
    __device__ __forceinline__ bf16 *target(const hopper_item &it) const {
        const int first = is_routed(it.kind) ? MOE_WS_HID : MOE_WS_SHID;
        const int second = is_routed(it.kind) ? MOE_WS_Y : MOE_WS_SY;
        return static_cast<bf16 *>(a.ws[is_second(it.kind) ? second : first]);
    }

    // One 8-token block of accumulators as the results of its weight rows: (v0, v1) is column
    // lane / 4 of two tokens, (v2, v3) eight columns on where nothing is gated.
    template <bool Second>
    __device__ __forceinline__ void results(const hopper_item &it, int m, int token,
                                            const float *c, float (&v)[4]) {
        const int lane = threadIdx.x % 32;
        v[0] = c[0], v[1] = c[1], v[2] = c[2], v[3] = c[3];
        if (!Second && kInputWeight && it.kind == HOPPER_GEMM1) {
            const int t = token + 2 * (lane % 4);
            float s0 = row_scale(it, t), s1 = row_scale(it, t + 1);
            v[0] *= s0, v[1] *= s1, v[2] *= s0, v[3] *= s1;
        }
        if (kBias && is_routed(it.kind) && m < (Second ? kHidden : (GATED ? 2 : 1) * kInter)) {
            const float *b = bias(it, Second);
            float low = b[m + lane / 4], high = b[m + 8 + lane / 4];
            v[0] += low, v[1] += low, v[2] += high, v[3] += high;
        }
        if (Second)
            return;
        if (GATED) {
            v[0] = activate(a.params, v[0], v[2]);
            v[1] = activate(a.params, v[1], v[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float r = fmaxf(v[i], 0.0f);
                v[i] = r * r;
            }
        }
    }

    // Results leave by way of shared memory, CHUNK tokens at a time, as rows.
    template <bool Second>
    __device__ __forceinline__ void finish(const hopper_item &it, int group,
                                           float (&acc)[PRODUCTS][ACC]) {
        constexpr bool HALF = !Second && GATED; // two weight rows make one column
        constexpr int COLUMNS = HALF ? 32 * MI : 64 * MI;
        const int tid = threadIdx.x % 128, lane = tid % 32, warp = tid / 32;
        const int columns = columns_out(it);
        bf16 *out = target(it);
        const unsigned mine = staging + group * CHUNK * PITCH;
        const int m0 = it.m0 + group * 64 * MI, column0 = HALF ? m0 / 2 : m0;
#pragma unroll
        for (int c = 0; c < BN / CHUNK; c++) {
            if (c * CHUNK >= it.rows)
                break;
            if (c)
                named_barrier(2 + group, 128);
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j += HALF ? 2 : 1) {
#pragma unroll
                for (int i = 0; i < MI; i++) {
                    const int token = c * CHUNK + 8 * j, m = m0 + 64 * i + 16 * warp;
                    const float *d = acc[i] + token / 2;
                    float v[4], w[4];
                    results<Second>(it, m, token, d, v);
                    unsigned at = mine + (8 * j + lane % 8) * PITCH;
                    if (HALF) {
                        results<Second>(it, m, token + 8, d + 4, w);
                        at += lane / 8 % 2 * 8 * PITCH + (32 * i + 8 * warp) * 2;
                        stmatrix_x2_trans(at, pack_bf16(v[0], v[1]), pack_bf16(w[0], w[1]));
                    } else {
                        at += (64 * i + 16 * warp + lane / 8 % 2 * 8) * 2;
                        stmatrix_x2_trans(at, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
                    }
                }
            }
            named_barrier(2 + group, 128);
#pragma unroll
            for (int u = tid; u < CHUNK * (COLUMNS / 8); u += 128) {
                const int t = u / (COLUMNS / 8), column = u % (COLUMNS / 8) * 8;
                if (c * CHUNK + t < it.rows && column0 + column < columns)
                    *reinterpret_cast<uint4 *>(
                        out + static_cast<long long>(it.row + c * CHUNK + t) * columns +
                        column0 + column) = load_shared16(mine + t * PITCH + column * 2);
            }
        }
    }

    // Everyone's results are out before the one who says so.
    __device__ __forceinline__ void tell(const hopper_item &it, int group) {
        __threadfence();
        named_barrier(2 + group, 128);
        if (threadIdx.x % 128 == 0)
            add_release(counters() + (is_second(it.kind) ? HOPPER_DONE : it.counter), 1);
    }

    // Tokens M: a warp's 16 tokens leave through its own part of shared memory.
    template <bool Second>
    __device__ __forceinline__ void finish_tokens(const hopper_item &it, int group,
                                                  const float (&d)[ACC]) {
        constexpr bool HALF = !Second && GATED;
        constexpr int COLUMNS = HALF ? BM / 2 : BM;
        const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
        const int token0 = group * 64 + warp * 16, columns = columns_out(it);
        const int column0 = HALF ? it.m0 / 2 : it.m0;
        const unsigned mine = staging + (group * 64 + warp * 16) * PITCH;
        const bool scaled = !Second && kInputWeight && it.kind == HOPPER_GEMM1;
        const float scale[2] = {scaled ? row_scale(it, token0 + lane / 4) : 1.0f,
                                scaled ? row_scale(it, token0 + lane / 4 + 8) : 1.0f};
        const bool biased = kBias && is_routed(it.kind);
        const int limit = Second ? kHidden : (GATED ? 2 : 1) * kInter;
        bf16 *out = target(it);
#pragma unroll
        for (int c = 0; c < COLUMNS / 64; c++) {
#pragma unroll
            for (int j = 0; j < 8; j++) { // 8 columns
                const int block = (HALF ? 2 : 1) * (c * 8 + j);
                const int m = it.m0 + block * 8 + 2 * (lane % 4);
                float v[4], u[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    v[i] = d[block * 4 + i];
                    u[i] = HALF ? d[block * 4 + 4 + i] : 0.0f;
                    if (!Second && kInputWeight)
                        v[i] *= scale[i / 2], u[i] *= scale[i / 2];
                    if (kBias && biased && m + (HALF ? 8 : 0) + i % 2 < limit) {
                        v[i] += bias(it, Second)[m + i % 2];
                        u[i] += HALF ? bias(it, Second)[m + 8 + i % 2] : 0.0f;
                    }
                    if (HALF)
                        v[i] = activate(a.params, v[i], u[i]);
                    else if (!Second)
                        v[i] = fmaxf(v[i], 0.0f) * fmaxf(v[i], 0.0f);
                }
                const unsigned at = mine + lane / 4 * PITCH + (j * 8 + 2 * (lane % 4)) * 2;
                store_shared4(at, pack_bf16(v[0], v[1]));
                store_shared4(at + 8 * PITCH, pack_bf16(v[2], v[3]));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = lane / 8 + 4 * i, column = column0 + c * 64 + lane % 8 * 8;
                if (token0 + t < it.rows && column < columns)
                    *reinterpret_cast<uint4 *>(
                        out + static_cast<long long>(it.row + token0 + t) * columns + column) =
                        load_shared16(mine + t * PITCH + lane % 8 * 16);
            }
            __syncwarp();
        }
    }

    __device__ __forceinline__ void multiply_all(int group) {
        int stage = 0;
        unsigned phase = 0;
        for (int n = 0;; n++) {
            barrier_wait(full + 8 * stage, phase);
            const hopper_item it = ring[n % RING];
            if (it.kind == HOPPER_END)
                break;
            const int steps = (columns_in(it.kind) + 63) / 64;
            float acc[PRODUCTS][ACC];
            if constexpr (TOKENS_M) {
                multiply_tokens(it, group, steps, stage, phase, acc[0]);
                if (is_second(it.kind))
                    finish_tokens<true>(it, group, acc[0]);
                else
                    finish_tokens<false>(it, group, acc[0]);
            } else {
                multiply(it.rows, group, steps, stage, phase, acc);
                if (is_second(it.kind))
                    finish<true>(it, group, acc);
                else
                    finish<false>(it, group, acc);
            }
            tell(it, group);
        }
    }

    // ---- combining ----

    // By all multiplying warps of all blocks, a token's 256 columns each at a time.
    __device__ __forceinline__ void combine() {
        constexpr int SPANS = (kHidden + 255) / 256;
        const int lane = threadIdx.x % 32, warps = GROUPS * 4;
        const int units = a.num_tokens * SPANS;
        const int first = blockIdx.x + gridDim.x * (threadIdx.x / 32 - 4);
        for (int u = first; u < units; u += gridDim.x * warps) {
            const long long token = u / SPANS;
            const int c = u % SPANS * 256 + lane * 8;
            const float gate = kSharedInter && a.shared_gate ? shared_gate(a, token) : 1.0f;
            if (c < kHidden)
                combine8(a, row_of + token * kTopK, token, c, gate);
        }
    }

    // After the last item of a multiplying warpgroup.
    __device__ __forceinline__ void end() {
        const bool first = threadIdx.x == 128;
        int left = 0;
        if (!(a.flags & MOE_COMBINE))
            __threadfence(); // what this block told is told
        else if (threadIdx.x % 32 == 0)
            while (load_acquire(counters() + HOPPER_DONE) < last_parts()) {
            }
        named_barrier(1, GROUPS * 128); // the loaders are done with theirs
        if (first)
            left = atomicAdd(counters() + HOPPER_LEFT, 1);
        if (a.flags & MOE_COMBINE)
            combine();
        if (first && left == static_cast<int>(gridDim.x) - 1)
            for (int i = HOPPER_TILES + first_tile[slots] + shared_tiles(); i-- > 0;)
                counters()[i] = 0;
    }

    __device__ __forceinline__ void run() {
        launch_next();
        set_up();
        const int group = static_cast<int>(threadIdx.x / 128) - 1;
        if (group < 0) {
            if (HEAVY)
                registers_down<56>();
            load();
        } else {
            if (HEAVY)
                registers_up<224>();
            multiply_all(group);
            end();
        }
    }
};

// Persistent grid. Dynamic shared memory: see hopper's constructor, and hopper_smem in the compiler.
template <int V>
__global__ void __launch_bounds__(hopper_shape<V>::THREADS, 1)
    moe_experts(const __grid_constant__ moe_args a, const __grid_constant__ hopper_maps maps) {
    hopper<V>(a, maps).run();
}

#endif
