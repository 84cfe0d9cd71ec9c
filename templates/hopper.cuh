// The experts part of a layer in one persistent launch, on Hopper: both grouped GEMMs, the activation
// between them, the shared expert and, for small batches, the sorting before and the combine after.
// wgmma fed by TMA, sm_90a only.
//
// Tokens are wgmma's M side, 64 to a warpgroup, weight rows its N side, so that a tile may have any
// number of them that suits the shape: BM1 rows of w1, BM2 of w2. K is the reduction in steps of 64.
//
// Work items come from one queue in device memory, first all of GEMM 1, then all of GEMM 2, the tiles
// of a slot innermost, so that blocks running together share weights in the second-level cache. An
// item of GEMM 2 waits for the GEMM 1 items of its tile of tokens, which blocks have taken before it:
// no wait can be for work nobody has. Which block takes an item changes no result.
//
// A block is a warpgroup that loads and one or two that multiply. One thread takes items and loads weights
// by TMA, three warps gather token rows by cp.async; both run ahead of the multiplying ones through a
// ring of STAGES slices, over the ends of items. A slice is the weight rows and TOKENS (64 or 128)
// token rows of 128 bytes, 16-byte chunks permuted by the row's low three bits, as wgmma reads them.
//
// fp8 records: a slice is the 128 numbers that share a scale; their sum enters the total times the
// scales of its weights and of its token's activations. A scale of the activation between the GEMMs
// is known when 128 of its columns are: each GEMM has a launch of its own (PHASES 1 and 2, else 3)
// and moe_quant one between them.
//
// With CLUSTER 2, two blocks take an item together: each has half of the tile's tokens and loads half
// of its weight rows, for both.
#pragma once

// Kinds of items in the queue's order.
enum hopper_kind { HOPPER_SHARED1, HOPPER_GEMM1, HOPPER_SHARED2, HOPPER_GEMM2, HOPPER_END };

// Tensor maps of the weights, [slots][rows][K], by kind.
struct hopper_maps {
    moe_map map[HOPPER_END];
};

// One work item: weight rows from m0 times this block's `rows` token rows from `row`.
struct hopper_item {
    int kind;
    int record; // of the pool
    int m0, row, rows;
    int counter; // of the tile of tokens: finished parts of its GEMM 1
    int pad[2];
};

// MOE_WS_QUEUE: the next item (one rank: that is no block's first), finished parts of GEMM 2, blocks that need
// no counter any more, then a counter per tile of tokens. All zero between launches: the last block
// to need none sees to it.
enum { HOPPER_NEXT, HOPPER_DONE, HOPPER_LEFT, HOPPER_TILES };

template <int BM1, int BM2, int TOKENS, int STAGES, int ENTRIES, int CLUSTER, int PHASES>
struct hopper {
    static constexpr bool FP8 = kFormat == MOE_FORMAT_FP8_BLOCK;
    static constexpr int KSTEP = FP8 ? 128 : 64,
                         CHUNK = FP8 ? 16 : 8; // numbers of 128 and 16 bytes
    static constexpr int BM = PHASES == 1 || (PHASES == 3 && BM1 > BM2) ? BM1 : BM2,
                         BN = TOKENS, GROUPS = TOKENS > 64 ? 2 : 1;
    static constexpr int STAGE_BYTES = (BM + BN) * 128;
    static constexpr int TILE = BN * CLUSTER; // tokens of an item
    static constexpr int PITCH = 64 * 2 + 16; // bytes of a token's 64 results on their way out
    static constexpr int RING = 32;           // items known to the block; > STAGES
    static constexpr int PASS = 8;            // items on their way to the cluster's other block
    static constexpr bool HEAVY =
        BM >= (FP8 ? 128 : 192) && GROUPS == 2; // registers change hands
    static constexpr bool GATED = kActivation != MOE_ACT_RELU2;
    static constexpr int M1 = ((GATED ? 2 : 1) * kInter + BM1 - 1) / BM1;
    static constexpr int M2 = (kHidden + BM2 - 1) / BM2;
    static constexpr int SHARED_M1 = ((GATED ? 2 : 1) * kSharedInter + BM1 - 1) / BM1;
    static constexpr int LOADERS = 96, LOADS = (BN + 11) / 12; // gathering threads, rows each

    const moe_args &a;
    const hopper_maps &maps;
    const int slots, rank; // of the block in its cluster
    hopper_item *ring;
    int *passed;                          // [PASS] items from the cluster's first block
    int *first_row, *first_tile, *record; // [slots + 1]
    int *row_of, *entry_of;               // [ENTRIES], or the workspace's
    unsigned full, empty, known, pass, finished, staging; // shared addresses

    __device__ __forceinline__ hopper(const moe_args &args, const hopper_maps &m)
        : a(args), maps(m), slots(args.params.slots), rank(blockIdx.x % CLUSTER) {
        unsigned char *smem = dyn_smem<unsigned char>();
        int at = STAGES * STAGE_BYTES;
        full = smem_base() + at;
        empty = full + 8 * STAGES;
        known = empty + 8 * STAGES;
        pass = known + 8 * RING;
        finished = pass + 8 * PASS;
        at += 8 * (2 * STAGES + RING + PASS + 1);
        at = (at + 15) / 16 * 16;
        ring = reinterpret_cast<hopper_item *>(smem + at);
        at += RING * static_cast<int>(sizeof(hopper_item));
        staging = smem_base() + at;
        at += BN * PITCH;
        passed = reinterpret_cast<int *>(smem + at);
        first_row = passed + PASS;
        first_tile = first_row + slots + 1;
        record = first_tile + slots + 1;
        row_of = ENTRIES ? record + slots + 1 : static_cast<int *>(a.ws[MOE_WS_ROW_OF]);
        entry_of = ENTRIES ? row_of + ENTRIES : static_cast<int *>(a.ws[MOE_WS_ROW_ENTRY]);
    }

    __device__ __forceinline__ int *counters() const {
        return static_cast<int *>(a.ws[MOE_WS_QUEUE]);
    }
    __device__ __forceinline__ int shared_tiles() const {
        return kSharedInter && !(a.flags & MOE_ROUTED) ? (a.num_tokens + TILE - 1) / TILE : 0;
    }
    __device__ __forceinline__ int tiles() const {
        return first_tile[slots];
    }

    __device__ __forceinline__ int entries() const {
        return a.flags & MOE_SHARED ? 0 : a.num_tokens * kTopK;
    }

    // ---- set-up ----

    __device__ __forceinline__ void set_up() {
        const int tid = threadIdx.x;
        if (tid == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full + 8 * i, LOADERS + 1);
                barrier_init(empty + 8 * i, 4 * GROUPS * CLUSTER);
            }
            for (int i = 0; i < RING; i++)
                barrier_init(known + 8 * i, 1);
            for (int i = 0; i < PASS; i++)
                barrier_init(pass + 8 * i, 1);
            barrier_init(finished, 1);
            barrier_init_fence();
            tma_prefetch_map(&maps.map[HOPPER_GEMM1]);
            tma_prefetch_map(&maps.map[HOPPER_GEMM2]);
        }
        launch_wait();
        for (int i = tid; i < slots; i += blockDim.x)
            record[i] = a.phys_of_slot[i];
        if (ENTRIES)
            count_slots();
        else
            for (int i = tid; i <= slots; i += blockDim.x)
                first_row[i] = a.flags & MOE_SHARED
                                   ? 0
                                   : static_cast<const int *>(a.ws[MOE_WS_OFFSETS])[i];
        __syncthreads();
        if (tid < 32) {
            if (ENTRIES)
                scan_slots<TILE>(slots, first_row, first_tile);
            else
                scan_tiles();
        }
        __syncthreads();
        if (ENTRIES)
            place_rows();
        if (CLUSTER > 1)
            cluster_barrier();
    }

    // first_row[s] becomes the entries of slot s, row_of an entry's number among them, entry_of its
    // slot: what moe_slots does, by every block for itself.
    __device__ __forceinline__ void count_slots() {
        const int tid = threadIdx.x, entries = this->entries();
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
        const int tid = threadIdx.x, entries = this->entries();
        for (int i = tid; i < entries; i += blockDim.x) {
            const int slot = entry_of[i];
            row_of[i] = slot >= 0 ? first_row[slot] + row_of[i] : -1;
        }
        __syncthreads();
        for (int i = tid; i < entries; i += blockDim.x)
            if (row_of[i] >= 0)
                entry_of[row_of[i]] = i;
        if (PHASES == 1 && blockIdx.x == 0 && tid == 0) // moe_quant reads it
            static_cast<int *>(a.ws[MOE_WS_OFFSETS])[slots] = first_row[slots];
        if (PHASES & 2 && blockIdx.x == 0 && !(a.flags & MOE_COMBINE)) // moe_combine reads it
            for (int i = tid; i < entries; i += blockDim.x)
                static_cast<int *>(a.ws[MOE_WS_ROW_OF])[i] = row_of[i];
        __syncthreads();
    }

    __device__ __forceinline__ void scan_tiles() {
        const int lane = threadIdx.x % 32;
        int tile = 0;
        for (int s0 = 0; s0 < slots; s0 += 32) {
            const int s = s0 + lane;
            int n = s < slots ? (first_row[s + 1] - first_row[s] + TILE - 1) / TILE : 0,
                sum = n;
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

    __device__ __forceinline__ static bool is_second(int kind) {
        return kind >= HOPPER_SHARED2;
    }
    __device__ __forceinline__ static bool is_routed(int kind) {
        return kind == HOPPER_GEMM1 || kind == HOPPER_GEMM2;
    }
    __device__ __forceinline__ static int columns_in(int kind) {
        return kind == HOPPER_GEMM2 ? kInter : kind == HOPPER_SHARED2 ? kSharedInter : kHidden;
    }
    __device__ __forceinline__ static int columns_out(int kind) {
        return is_second(kind) ? kHidden : is_routed(kind) ? kInter : kSharedInter;
    }
    __device__ __forceinline__ static int weight_rows(int kind) {
        return is_second(kind) ? BM2 : BM1;
    }
    __device__ __forceinline__ static int steps_of(int kind) {
        return (columns_in(kind) + KSTEP - 1) / KSTEP;
    }

    // This block's rows of a tile of tokens; whole 64s as even as can be.
    __device__ __forceinline__ void share_rows(hopper_item &it, int first, int end) const {
        const int rows = min(TILE, end - first);
        const int mine = CLUSTER == 1 ? rows : min(rows, (rows + 127) / 128 * 64);
        it.row = first + (rank ? mine : 0);
        it.rows = rank ? rows - mine : mine;
    }

    __device__ __forceinline__ hopper_item shared_item(int at, int kind) const {
        const int count = shared_tiles(), tile = at % count;
        hopper_item it;
        it.kind = kind;
        it.record = 0;
        it.m0 = at / count * weight_rows(kind);
        it.counter = HOPPER_TILES + tiles() + tile;
        share_rows(it, tile * TILE, a.num_tokens);
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
        it.m0 = local / count * weight_rows(kind);
        it.counter = HOPPER_TILES + first_tile[low] + tile;
        share_rows(it, first_row[low] + tile * TILE, first_row[low + 1]);
        return it;
    }

    __device__ __forceinline__ hopper_item item(int at) const {
        const int routed = tiles(), shared = shared_tiles();
        if (PHASES & 1) {
            if (at < shared * SHARED_M1)
                return shared_item(at, HOPPER_SHARED1);
            at -= shared * SHARED_M1;
            if (at < routed * M1)
                return routed_item(at, HOPPER_GEMM1, M1);
            at -= routed * M1;
        }
        if (PHASES & 2) {
            if (at < shared * M2)
                return shared_item(at, HOPPER_SHARED2);
            at -= shared * M2;
            if (at < routed * M2)
                return routed_item(at, HOPPER_GEMM2, M2);
        }
        hopper_item end = {HOPPER_END, 0, 0, 0, 0, 0, {0, 0}};
        return end;
    }

    // Parts of an item: the multiplying warpgroups that share it. Those of the last GEMM.
    __device__ __forceinline__ int last_parts() const {
        const int items = PHASES == 1 ? tiles() * M1 + shared_tiles() * SHARED_M1
                                      : (tiles() + shared_tiles()) * M2;
        return items * GROUPS * CLUSTER;
    }
    __device__ __forceinline__ static int parts_before(int kind) {
        return (kind == HOPPER_GEMM2 ? M1 : SHARED_M1) * GROUPS * CLUSTER;
    }

    // ---- loading ----

    // Whether a block's first item is drawn, too: where other ranks' launches may keep a block from
    // running, while those that run wait for its work.
    __device__ __forceinline__ bool draws_all() const {
        return a.exchange.ranks > 1;
    }

    // The n-th item drawn, by the cluster's first block, which tells the other.
    __device__ __forceinline__ int draw(int n) const {
        if (rank)
            return 0;
        const int next =
            (draws_all() ? 0 : gridDim.x / CLUSTER) + atomicAdd(counters() + HOPPER_NEXT, 1);
        if (CLUSTER > 1) {
            store_cluster(smem_address(passed + n % PASS), 1, next);
            barrier_arrive_cluster(pass + 8 * (n % PASS), 1);
        }
        return next;
    }
    __device__ __forceinline__ int hear(int n) const {
        barrier_wait_cluster(pass + 8 * (n % PASS), n / PASS & 1);
        return *static_cast<volatile int *>(passed + n % PASS);
    }

    // By one thread: items, and their weights.
    __device__ __forceinline__ void load_weights() {
        int stage = 0, at = blockIdx.x / CLUSTER, drawn = 0;
        unsigned phase = 1; // the first round waits for nobody
        if (draws_all()) {
            at = draw(drawn);
            if (rank)
                at = hear(drawn);
            drawn++;
        }
        for (int n = 0;; n++) {
            const hopper_item it = item(at);
            ring[n % RING] = it;
            barrier_arrive(known + 8 * (n % RING));
            if (it.kind == HOPPER_END)
                break;
            // Late, so that who waits for others has not taken what they could do; and soon enough.
            const int steps = steps_of(it.kind), draw_at = max(steps - 3, 0);
            const int bytes = weight_rows(it.kind) * 128, part = bytes / CLUSTER;
            for (int step = 0; step < steps; step++) {
                const unsigned bar = full + 8 * stage;
                const unsigned to = smem_base() + stage * STAGE_BYTES + rank * part;
                barrier_wait(empty + 8 * stage, phase);
                if (step == draw_at)
                    at = draw(n + drawn);
                barrier_expect(bar, bytes);
                if (CLUSTER > 1)
                    tma_load_cluster(to, &maps.map[it.kind], step * KSTEP,
                                     it.m0 + rank * (part / 128), it.record, bar);
                else
                    tma_load(to, &maps.map[it.kind], step * KSTEP, it.m0, it.record, bar);
                if (++stage == STAGES)
                    stage = 0, phase ^= 1;
            }
            if (rank)
                at = hear(n + drawn);
        }
        finish_counters();
    }

    // All results are there: says so to this block, and the last block to know it zeroes the counters.
    // By then every block has drawn its last item: it tells of an item when it knows the next.
    __device__ __forceinline__ void finish_counters() {
        const int count = HOPPER_TILES + tiles() + shared_tiles();
        while (load_acquire(counters() + HOPPER_DONE) < last_parts()) {
        }
        barrier_arrive(finished);
        if (atomicAdd(counters() + HOPPER_LEFT, 1) == static_cast<int>(gridDim.x) - 1)
            for (int i = 0; i < count; i++)
                counters()[i] = 0;
    }

    __device__ __forceinline__ const hopper_item &wait_item(int n) const {
        barrier_wait(known + 8 * (n % RING), n / RING & 1);
        return ring[n % RING];
    }

    __device__ __forceinline__ void wait_for_tile(const hopper_item &it) const {
        if (threadIdx.x % 32 == 0)
            while (load_acquire(counters() + it.counter) < parts_before(it.kind)) {
            }
        __syncwarp();
    }

    __device__ __forceinline__ const uint4 *source(int kind) const {
        const void *from = kind == HOPPER_GEMM2     ? a.ws[FP8 ? MOE_WS_HID8 : MOE_WS_HID]
                           : kind == HOPPER_SHARED2 ? a.ws[FP8 ? MOE_WS_SHID8 : MOE_WS_SHID]
                           : FP8                    ? a.ws[MOE_WS_X8]
                                                    : a.x16;
        return static_cast<const uint4 *>(from);
    }

    // By LOADERS threads: token rows.
    __device__ __forceinline__ void load_tokens(int tid) {
        const int chunk = tid % 8;
        int stage = 0;
        unsigned phase = 1;
        for (int n = 0;; n++) {
            const hopper_item it = wait_item(n);
            if (it.kind == HOPPER_END)
                return;
            if (PHASES == 3 && is_second(it.kind))
                wait_for_tile(it);
            const int columns = columns_in(it.kind);
            const uint4 *from = source(it.kind);
            unsigned row_at[LOADS]; // in chunks
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int r = tid / 8 + 12 * i;
                int row = it.row + (r < it.rows ? r : 0);
                if (it.kind == HOPPER_GEMM1 && r < it.rows)
                    row = entry_of[row] / kTopK;
                row_at[i] =
                    static_cast<unsigned>(row) * static_cast<unsigned>(columns / CHUNK) +
                    static_cast<unsigned>(chunk);
            }
            for (int step = 0; step < steps_of(it.kind); step++) {
                barrier_wait(empty + 8 * stage, phase);
                const unsigned to = smem_base() + stage * STAGE_BYTES + BM * 128;
                const bool inside = step * KSTEP + chunk * CHUNK < columns;
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    const int r = tid / 8 + 12 * i;
                    if (r < it.rows)
                        cp_async16(to + r * 128 + (chunk ^ (r & 7)) * 16,
                                   from + row_at[i] + step * 8, inside);
                }
                barrier_arrive_copies(full + 8 * stage);
                if (++stage == STAGES)
                    stage = 0, phase ^= 1;
            }
        }
    }

    // ---- multiplying: one warpgroup ----

    __device__ __forceinline__ void release(int stage) const {
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(empty + 8 * stage);
            if (CLUSTER > 1)
                barrier_free_cluster(empty + 8 * stage, rank ^ 1);
        }
    }

    // d[64 tokens][N weight rows] over all steps; a group without tokens only lets slices go.
    template <int N>
    __device__ __forceinline__ void multiply_bf16(const hopper_item &it, int group, int &stage,
                                                  unsigned &phase, float (&d)[BM / 2]) const {
        const bool any = group * 64 < it.rows;
        int before = stage;
        for (int step = 0; step < steps_of(it.kind); step++) {
            barrier_wait(full + 8 * stage, phase);
            fence_async_shared(); // cp.async wrote the token rows
            const unsigned at = smem_base() + stage * STAGE_BYTES;
            const moe_u64 x = wgmma_descriptor(at + BM * 128 + group * 8192);
            const moe_u64 w = wgmma_descriptor(at);
            if (any) {
                wgmma_begin();
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_bf16<N>(d, x + 2 * kk, w + 2 * kk, step | kk);
                wgmma_commit();
            }
            wgmma_wait<1>();
            if (step)
                release(before);
            before = stage;
            if (++stage == STAGES)
                stage = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        release(before);
    }

    // What fp8 sums are multiplied by: scales of this thread's two tokens, and of 64 weight rows
    // (gate and up, or all), fetched a step ahead.
    struct scales {
        const float *token[2], *weight[(BM + 63) / 64];
        int ups; // from a gate's scale to its up's
        float token_by[2], token_next[2], weight_by[(BM + 63) / 64][2];
    };

    __device__ __forceinline__ scales find_scales(const hopper_item &it, int group) const {
        const bool second = is_second(it.kind), routed = is_routed(it.kind);
        const bool pairs = !second && GATED;
        const int steps = steps_of(it.kind), out = columns_out(it.kind);
        const int token0 = group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        const float *tokens = static_cast<const float *>(a.ws[!second  ? MOE_WS_XS
                                                              : routed ? MOE_WS_HIDS
                                                                       : MOE_WS_SHIDS]);
        const char *from = routed ? a.pool + it.record * a.params.slot_bytes : a.shared;
        const long long at =
            routed ? (second ? a.params.s2_offset : a.params.s1_offset)
                   : (second ? a.params.shared_s2_offset : a.params.shared_s1_offset);
        scales s;
        s.ups = pairs ? steps : 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int t = token0 + 8 * i;
            int row = it.row + (t < it.rows ? t : 0);
            if (it.kind == HOPPER_GEMM1 && it.rows > 0)
                row = entry_of[row] / kTopK;
            s.token[i] = tokens + static_cast<long long>(row) * steps;
        }
#pragma unroll
        for (int c = 0; c < (BM + 63) / 64; c++) {
            const int column = (it.m0 + 64 * c) / (pairs ? 2 : 1);
            const int block = min(column, out - 1) / MOE_SCALE_BLOCK;
            s.weight[c] = reinterpret_cast<const float *>(from + at) +
                          static_cast<long long>(pairs ? 2 * block : block) * steps;
        }
        return s;
    }

    // Asked for while the tensor cores work, so that no fence waits for them. A token's scales lie apart
    // and are seldom in the first-level cache: those of the next step.
    __device__ __forceinline__ static void load_scales(scales &s, int step, int steps) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s.token_by[i] = s.token_next[i];
            s.token_next[i] = s.token[i][min(step + 1, steps - 1)];
        }
#pragma unroll
        for (int c = 0; c < (BM + 63) / 64; c++) {
            s.weight_by[c][0] = s.weight[c][step];
            s.weight_by[c][1] = s.weight[c][step + s.ups];
        }
    }

    template <int N>
    __device__ __forceinline__ void multiply_fp8(const hopper_item &it, int group, int &stage,
                                                 unsigned &phase, float (&d)[BM / 2]) const {
        const bool any = group * 64 < it.rows;
        float part[BM / 2];
        const int steps = steps_of(it.kind);
        scales s = find_scales(it, group);
        if (any)
            s.token_next[0] = s.token[0][0], s.token_next[1] = s.token[1][0];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            d[i] = 0.0f;
        for (int step = 0; step < steps; step++) {
            barrier_wait(full + 8 * stage, phase);
            fence_async_shared(); // cp.async wrote the token rows
            const unsigned at = smem_base() + stage * STAGE_BYTES;
            const moe_u64 x = wgmma_descriptor(at + BM * 128 + group * 8192);
            const moe_u64 w = wgmma_descriptor(at);
            if (any) {
                wgmma_begin();
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_e4m3<N>(part, x + 2 * kk, w + 2 * kk, kk);
                wgmma_commit();
                load_scales(s, step, steps);
            }
            wgmma_wait<0>();
            release(stage);
            if (any) {
#pragma unroll
                for (int i = 0; i < N / 2; i++) { // of w1's eights, odd ones are ups
                    const float by = s.weight_by[i / 32][i / 4 % 2] * s.token_by[i / 2 % 2];
                    d[i] = fmaf(part[i], by, d[i]);
                }
            }
            if (++stage == STAGES)
                stage = 0, phase ^= 1;
        }
    }

    template <int N>
    __device__ __forceinline__ void multiply(const hopper_item &it, int group, int &stage,
                                             unsigned &phase, float (&d)[BM / 2]) const {
        if constexpr (FP8)
            multiply_fp8<N>(it, group, stage, phase, d);
        else
            multiply_bf16<N>(it, group, stage, phase, d);
    }

    __device__ __forceinline__ void *target(int kind) const {
        const int first = is_routed(kind) ? MOE_WS_HID : MOE_WS_SHID;
        const int second = is_routed(kind) ? MOE_WS_Y : MOE_WS_SY;
        return a.ws[is_second(kind) ? second : first];
    }

    // What a row's pre-activation is multiplied by, where the weight belongs to the input.
    __device__ __forceinline__ float row_scale(const hopper_item &it, int token) const {
        return token < it.rows ? a.topk_weight[entry_of[it.row + token]] : 0.0f;
    }

    // Eight weight rows of w2, or 16 of a gated w1 (8 gates, then their ups), as eight columns of two
    // tokens: v[0], v[1] and v[2], v[3].
    template <bool Second>
    __device__ __forceinline__ void results(const hopper_item &it, int m, const float *d,
                                            const float (&scale)[2], float (&v)[4]) const {
        constexpr bool HALF = !Second && GATED;
        const bool biased = kBias && is_routed(it.kind);
        const int limit = Second ? kHidden : (GATED ? 2 : 1) * kInter;
        const float *bias =
            reinterpret_cast<const float *>(a.pool + it.record * a.params.slot_bytes +
                                            (Second ? a.params.b2_offset : a.params.b1_offset));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float up = HALF ? d[4 + i] : 0.0f;
            v[i] = d[i];
            if (!Second && kInputWeight)
                v[i] *= scale[i / 2], up *= scale[i / 2];
            if (kBias && biased && m + (HALF ? 8 : 0) + i % 2 < limit) {
                v[i] += bias[m + i % 2];
                up += HALF ? bias[m + 8 + i % 2] : 0.0f;
            }
            if (HALF)
                v[i] = activate(a.params, v[i], up);
            else if (!Second)
                v[i] = fmaxf(v[i], 0.0f) * fmaxf(v[i], 0.0f);
        }
    }

    // A warp's 16 tokens leave through its own part of shared memory, up to 64 columns at a time.
    template <bool Second>
    __device__ __forceinline__ void finish(const hopper_item &it, int group,
                                           const float (&d)[BM / 2]) const {
        constexpr bool HALF = !Second && GATED;
        constexpr int BLOCKS = (Second ? BM2 : BM1) / (HALF ? 16 : 8); // of eight columns
        const int lane = threadIdx.x % 32, token0 = threadIdx.x % 128 / 32 * 16 + group * 64;
        const int columns = columns_out(it.kind), column0 = HALF ? it.m0 / 2 : it.m0;
        const unsigned mine = staging + token0 * PITCH;
        const bool scaled = !Second && kInputWeight && it.kind == HOPPER_GEMM1;
        const float scale[2] = {scaled ? row_scale(it, token0 + lane / 4) : 1.0f,
                                scaled ? row_scale(it, token0 + lane / 4 + 8) : 1.0f};
        if (token0 >= it.rows)
            return;
        if (FP8 && !Second) {
            float *hidden = static_cast<float *>(target(it.kind));
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                const int weight = j * (HALF ? 16 : 8),
                          column = column0 + 8 * j + 2 * (lane % 4);
                float v[4];
                results<Second>(it, it.m0 + weight + 2 * (lane % 4), d + weight / 2, scale, v);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int t = token0 + lane / 4 + 8 * i;
                    if (t < it.rows && column < columns)
                        *reinterpret_cast<float2 *>(
                            hidden + static_cast<long long>(it.row + t) * columns + column) =
                            make_float2(v[2 * i], v[2 * i + 1]);
                }
            }
            return;
        }
        bf16 *out = static_cast<bf16 *>(target(it.kind));
#pragma unroll
        for (int c = 0; c < BLOCKS; c += 8) {
            constexpr int EIGHT = 8;
            const int blocks = BLOCKS - c < EIGHT ? BLOCKS - c : EIGHT;
#pragma unroll
            for (int j = 0; j < blocks; j++) {
                const int weight = (c + j) * (HALF ? 16 : 8);
                float v[4];
                results<Second>(it, it.m0 + weight + 2 * (lane % 4), d + weight / 2, scale, v);
                const unsigned at = mine + lane / 4 * PITCH + (j * 8 + 2 * (lane % 4)) * 2;
                store_shared4(at, pack_bf16(v[0], v[1]));
                store_shared4(at + 8 * PITCH, pack_bf16(v[2], v[3]));
            }
            __syncwarp();
#pragma unroll
            for (int u = lane; u < 16 * blocks; u += 32) {
                const int t = u / blocks, column = column0 + (c + u % blocks) * 8;
                if (token0 + t < it.rows && column < columns)
                    *reinterpret_cast<uint4 *>(
                        out + static_cast<long long>(it.row + token0 + t) * columns + column) =
                        load_shared16(mine + t * PITCH + u % blocks * 16);
            }
            __syncwarp();
        }
    }

    // Everyone's results are out before the one who says so.
    __device__ __forceinline__ void tell(const hopper_item &it, int group) const {
        __threadfence();
        named_barrier(1 + group, 128);
        if (threadIdx.x % 128 == 0)
            add_release(
                counters() + (PHASES != 3 || is_second(it.kind) ? HOPPER_DONE : it.counter), 1);
    }

    template <int Phase>
    __device__ __forceinline__ void take(const hopper_item &it, int group, int &stage,
                                         unsigned &phase, float (&d)[BM / 2]) const {
        if constexpr (PHASES & Phase) {
            multiply<Phase == 1 ? BM1 : BM2>(it, group, stage, phase, d);
            finish<Phase == 2>(it, group, d);
        }
    }

    __device__ __forceinline__ void multiply_all(int group) {
        int stage = 0;
        unsigned phase = 0;
        for (int n = 0;; n++) {
            const hopper_item it = wait_item(n);
            float d[BM / 2];
            if (it.kind == HOPPER_END)
                return;
            if (is_second(it.kind))
                take<2>(it, group, stage, phase, d);
            else
                take<1>(it, group, stage, phase, d);
            wait_item(n + 1);
            tell(it, group);
        }
    }

    // ---- the end ----

    // By all multiplying warps of all blocks, a token's 256 columns each at a time.
    __device__ __forceinline__ void combine() const {
        constexpr int SPANS = (kHidden + 255) / 256;
        const int lane = threadIdx.x % 32, units = a.num_tokens * SPANS;
        for (int u = blockIdx.x + gridDim.x * (threadIdx.x / 32 - 4); u < units;
             u += gridDim.x * GROUPS * 4) {
            const long long token = u / SPANS;
            const int c = u % SPANS * 256 + lane * 8;
            const float gate = kSharedInter && a.shared_gate ? shared_gate(a, token) : 1.0f;
            if (c < kHidden)
                combine8(a, row_of + token * kTopK, token, c, gate);
        }
    }

    // After the last item of a multiplying warpgroup.
    __device__ __forceinline__ void end() const {
        if (ENTRIES && PHASES & 2 && a.flags & MOE_COMBINE) {
            barrier_wait(finished, 0);
            combine();
        }
    }

    __device__ __forceinline__ void run() {
        launch_next();
        set_up();
        const int group = static_cast<int>(threadIdx.x / 128) - 1;
        if (group < 0) {
            if (HEAVY)
                registers_down<56>();
            if (threadIdx.x == 0)
                load_weights();
            else if (threadIdx.x >= 32)
                load_tokens(static_cast<int>(threadIdx.x) - 32);
        } else {
            if (HEAVY)
                registers_up<224>();
            multiply_all(group);
            end();
        }
        if (CLUSTER > 1) { // the other block may still write here
            __syncwarp();
            cluster_barrier();
        }
    }
};

// Persistent grid. Dynamic shared memory: hopper's constructor, and hopper_smem in the compiler.
template <int BM1, int BM2, int TOKENS, int STAGES, int ENTRIES, int CLUSTER, int PHASES>
__global__ void __launch_bounds__(TOKENS > 64 ? 384 : 256, 1)
    moe_experts(const __grid_constant__ moe_args a, const __grid_constant__ hopper_maps maps) {
    hopper<BM1, BM2, TOKENS, STAGES, ENTRIES, CLUSTER, PHASES>(a, maps).run();
}
