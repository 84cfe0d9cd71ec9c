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
// A block is a warpgroup that loads and two that multiply: a half of an item's tokens each, or, of 64
// tokens, items in turn, so that one's results leave while the other multiplies. One thread takes
// items and loads weights by TMA, three warps gather token rows by cp.async; both run ahead of the
// multiplying ones through a ring of STAGES slices, over the ends of items. A slice is the weight rows and TOKENS (64 or 128)
// token rows of 128 bytes, 16-byte chunks permuted by the row's low three bits, as wgmma reads them.
//
// fp8 records: a slice is the 128 numbers that share a scale, with the scales of its tokens and its
// weights; their sum enters the total times these. A scale of the activation between the GEMMs is
// known when 128 of its columns are: who finishes the last part of a tile's GEMM 1 makes all of the
// tile e4m3, then tells of it.
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
    int counter;             // of the tile of tokens: finished parts of its GEMM 1
    int tile_row, tile_rows; // of all of the cluster's blocks
};

// A slice of the ring, and the parity of its round.
struct hopper_place {
    int stage;
    unsigned phase;
};

// MOE_WS_QUEUE: the next item (one rank: that is no block's first), finished parts of GEMM 2, blocks
// that need no counter any more, then a counter per tile of tokens. All zero between launches: the
// last block to need none sees to it.
enum { HOPPER_NEXT, HOPPER_DONE, HOPPER_LEFT, HOPPER_TILES };

template <int BM1, int BM2, int TOKENS, int STAGES, int ENTRIES, int CLUSTER> struct hopper {
    static constexpr bool FP8 = kFormat == MOE_FORMAT_FP8_BLOCK;
    static constexpr int KSTEP = FP8 ? 128 : 64,
                         CHUNK = FP8 ? 16 : 8; // numbers of 128 and 16 bytes
    static constexpr int BM = BM1 > BM2 ? BM1 : BM2, BN = TOKENS, GROUPS = TOKENS > 64 ? 2 : 1;
    static constexpr int STAGE_BYTES = (BM + BN) * 128;
    // A slice's scales: of tokens, then of each 64 weight rows, gate's and up's.
    static constexpr int SCALES = FP8 ? BN + 8 : 0, WEIGHT_SCALES = 2 * ((BM + 63) / 64);
    static constexpr int TILE = BN * CLUSTER; // tokens of an item
    static constexpr int PITCH = 64 * 2 + 16; // bytes of a token's 64 results on their way out
    static constexpr int RING = 32;           // items known to the block; > STAGES
    static constexpr int PASS = 8;            // items on their way to the cluster's other block
    static constexpr bool TURNS = GROUPS == 1;
    static constexpr bool HEAVY = BM >= 192; // registers change hands
    // An item's results of GEMM 1 are whole blocks of 128 columns: their scales are known at once.
    static constexpr bool SCALED =
        FP8 && BM1 / (kActivation != MOE_ACT_RELU2 ? 2 : 1) % 128 == 0;
    // fp8: weight rows whose products are asked for at a time: registers hold their sums beside the
    // totals of all.
    static constexpr int PART = BM < 128 ? BM : 128;
    static constexpr bool GATED = kActivation != MOE_ACT_RELU2;
    static constexpr int M1 = ((GATED ? 2 : 1) * kInter + BM1 - 1) / BM1;
    static constexpr int M2 = (kHidden + BM2 - 1) / BM2;
    static constexpr int SHARED_M1 = ((GATED ? 2 : 1) * kSharedInter + BM1 - 1) / BM1;
    static constexpr int LOADERS = 96, LOADS = (BN + 11) / 12; // gathering threads, rows each
    static constexpr int FEW = GROUPS == 2 ? 6 : LOADS;        // of them, for tiles of up to 72

    const moe_args &a;
    const hopper_maps &maps;
    const int slots, rank; // of the block in its cluster
    hopper_item *ring;
    int *passed;                          // [PASS] items from the cluster's first block
    int *first_row, *first_tile, *record; // [slots + 1]
    int *row_of, *entry_of;               // [ENTRIES], or the workspace's
    unsigned scales, full, empty, known, taken, pass, finished, staging; // shared addresses

    __device__ __forceinline__ hopper(const moe_args &args, const hopper_maps &m)
        : a(args), maps(m), slots(args.params.slots), rank(blockIdx.x % CLUSTER) {
        unsigned char *smem = dyn_smem<unsigned char>();
        int at = STAGES * STAGE_BYTES;
        scales = smem_base() + at;
        at += STAGES * SCALES * 4;
        full = smem_base() + at;
        empty = full + 8 * STAGES;
        known = empty + 8 * STAGES;
        taken = known + 8 * RING;
        pass = taken + 8 * RING;
        finished = pass + 8 * PASS;
        at += 8 * (2 * STAGES + 2 * RING + PASS + 1);
        at = (at + 15) / 16 * 16;
        ring = reinterpret_cast<hopper_item *>(smem + at);
        at += RING * static_cast<int>(sizeof(hopper_item));
        staging = smem_base() + at;
        at += 128 * PITCH;
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
            for (int i = 0; i < RING; i++) {
                barrier_init(known + 8 * i, 1);
                barrier_init(taken + 8 * i, LOADERS / 32 + 8);
            }
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
        it.tile_row = first;
        it.tile_rows = rows;
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
        if (at < shared * SHARED_M1)
            return shared_item(at, HOPPER_SHARED1);
        at -= shared * SHARED_M1;
        if (at < routed * M1)
            return routed_item(at, HOPPER_GEMM1, M1);
        at -= routed * M1;
        if (at < shared * M2)
            return shared_item(at, HOPPER_SHARED2);
        at -= shared * M2;
        if (at < routed * M2)
            return routed_item(at, HOPPER_GEMM2, M2);
        hopper_item end = {HOPPER_END, 0, 0, 0, 0, 0, 0, 0};
        return end;
    }

    // Parts of an item: the multiplying warpgroups that share it. Those of all of GEMM 2, and of a
    // tile's GEMM 1.
    __device__ __forceinline__ int last_parts() const {
        return (tiles() + shared_tiles()) * M2 * GROUPS * CLUSTER;
    }
    __device__ __forceinline__ static int first_parts(bool routed) {
        return (routed ? M1 : SHARED_M1) * GROUPS * CLUSTER;
    }

    __device__ __forceinline__ static hopper_place next(hopper_place &at) {
        const hopper_place now = at;
        if (++at.stage == STAGES)
            at.stage = 0, at.phase ^= 1;
        return now;
    }

    __device__ __forceinline__ static void skip(hopper_place &at, int steps) {
        at.stage += steps;
        at.phase ^= at.stage / STAGES & 1;
        at.stage %= STAGES;
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
        int at = blockIdx.x / CLUSTER, drawn = 0;
        hopper_place place = {0, 1}; // the first round waits for nobody
        if (draws_all()) {
            at = draw(drawn);
            if (rank)
                at = hear(drawn);
            drawn++;
        }
        for (int n = 0;; n++) {
            const hopper_item it = item(at);
            if (n >= RING)
                barrier_wait(taken + 8 * (n % RING), (n / RING - 1) & 1);
            ring[n % RING] = it;
            barrier_arrive(known + 8 * (n % RING));
            if (it.kind == HOPPER_END)
                break;
            // Late, so that who waits for others has not taken what they could do; and soon enough.
            const int steps = steps_of(it.kind), draw_at = max(steps - 3, 0);
            const int bytes = weight_rows(it.kind) * 128, part = bytes / CLUSTER;
            for (int step = 0; step < steps; step++) {
                const hopper_place now = next(place);
                const unsigned bar = full + 8 * now.stage;
                const unsigned to = smem_base() + now.stage * STAGE_BYTES + rank * part;
                barrier_wait(empty + 8 * now.stage, now.phase);
                if (step == draw_at)
                    at = draw(n + drawn);
                barrier_expect(bar, bytes);
                if (CLUSTER > 1)
                    tma_load_cluster(to, &maps.map[it.kind], step * KSTEP,
                                     it.m0 + rank * (part / 128), it.record, bar);
                else
                    tma_load(to, &maps.map[it.kind], step * KSTEP, it.m0, it.record, bar);
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

    __device__ __forceinline__ void wait_item(int n) const {
        barrier_wait(known + 8 * (n % RING), n / RING & 1);
    }
    // By a warp that gathers or multiplies, each item once. The shuffles change nothing; they let the
    // compiler know that what hangs on an item is the same in all of a warp, and count in uniform
    // registers.
    __device__ __forceinline__ hopper_item take_item(int n) const {
        wait_item(n);
        hopper_item it = ring[n % RING];
        it.kind = __shfl_sync(0xffffffffu, it.kind, 0);
        it.record = __shfl_sync(0xffffffffu, it.record, 0);
        it.m0 = __shfl_sync(0xffffffffu, it.m0, 0);
        it.row = __shfl_sync(0xffffffffu, it.row, 0);
        it.rows = __shfl_sync(0xffffffffu, it.rows, 0);
        __syncwarp(); // all lanes have read it; shuffles order no memory
        if (threadIdx.x % 32 == 0)
            barrier_arrive(taken + 8 * (n % RING));
        return it;
    }

    __device__ __forceinline__ void wait_for_tile(const hopper_item &it) const {
        if (threadIdx.x % 32 == 0)
            while (load_acquire(counters() + it.counter) <
                   first_parts(is_routed(it.kind)) + (FP8 && !SCALED ? 1 : 0)) {
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

    // fp8: where scale `j` of an item's first slice is, the others behind it; null where there is none.
    __device__ __forceinline__ const float *scale_source(const hopper_item &it, int j) const {
        const bool second = is_second(it.kind), routed = is_routed(it.kind);
        const bool pairs = !second && GATED;
        const int steps = steps_of(it.kind), out = columns_out(it.kind);
        if (j < BN) {
            if (j >= it.rows)
                return nullptr;
            const int ws = !second ? MOE_WS_XS : routed ? MOE_WS_HIDS : MOE_WS_SHIDS;
            const int row = it.kind == HOPPER_GEMM1 ? entry_of[it.row + j] / kTopK : it.row + j;
            return static_cast<const float *>(a.ws[ws]) + static_cast<long long>(row) * steps;
        }
        const int c = (j - BN) / 2, up = pairs ? (j - BN) % 2 : 0;
        if (j >= BN + WEIGHT_SCALES)
            return nullptr;
        const char *from = routed ? a.pool + it.record * a.params.slot_bytes : a.shared;
        const long long at =
            routed ? (second ? a.params.s2_offset : a.params.s1_offset)
                   : (second ? a.params.shared_s2_offset : a.params.shared_s1_offset);
        const int column = (it.m0 + 64 * c) / (pairs ? 2 : 1);
        const int block = min(column, out - 1) / MOE_SCALE_BLOCK;
        return reinterpret_cast<const float *>(from + at) +
               static_cast<long long>(pairs ? 2 * block + up : block) * steps;
    }

    // A thread's rows FROM to END. Tiles of 64 may be nearly empty; of 128, a row that is not there is
    // another's copy, which costs less than to know.
    template <int FROM, int END>
    __device__ __forceinline__ static void
    load_rows(unsigned to, const hopper_item &it, const uint4 *from,
              const unsigned (&row_at)[LOADS], bool inside) {
        const int tid = static_cast<int>(threadIdx.x) - 32;
#pragma unroll
        for (int i = FROM; i < END; i++) {
            const int r = tid / 8 + 12 * i;
            if (GROUPS == 2 ? r < BN : r < it.rows)
                cp_async16(to + r * 128 + (tid % 8 ^ (r & 7)) * 16, from + row_at[i], inside);
        }
    }

    // By LOADERS threads: token rows, and fp8's scales.
    __device__ __forceinline__ void load_tokens(int tid) {
        const int chunk = tid % 8;
        hopper_place at = {0, 1};
        for (int n = 0;; n++) {
            const hopper_item it = take_item(n);
            if (it.kind == HOPPER_END)
                return;
            if (is_second(it.kind))
                wait_for_tile(it);
            const int columns = columns_in(it.kind);
            const uint4 *from = source(it.kind);
            unsigned row_at[LOADS]; // in chunks
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int r = tid / 8 + 12 * i;
                int row = it.rows > 0 ? it.row + (r < it.rows ? r : 0) : 0;
                if (it.kind == HOPPER_GEMM1 && it.rows > 0)
                    row = entry_of[row] / kTopK;
                row_at[i] =
                    static_cast<unsigned>(row) * static_cast<unsigned>(columns / CHUNK) +
                    static_cast<unsigned>(chunk);
            }
            const float *scale[(SCALES + LOADERS - 1) / LOADERS + 1];
#pragma unroll
            for (int j = 0; j < SCALES; j += LOADERS)
                scale[j / LOADERS] = scale_source(it, j + tid);
            for (int step = 0; step < steps_of(it.kind); step++) {
                const hopper_place now = next(at);
                barrier_wait(empty + 8 * now.stage, now.phase);
                const unsigned to = smem_base() + now.stage * STAGE_BYTES + BM * 128;
                const bool inside = step * KSTEP + chunk * CHUNK < columns;
                load_rows<0, FEW>(to, it, from + step * 8, row_at, inside);
                if (FEW < LOADS && it.rows > 12 * FEW)
                    load_rows<FEW, LOADS>(to, it, from + step * 8, row_at, inside);
#pragma unroll
                for (int j = 0; j < SCALES; j += LOADERS)
                    if (scale[j / LOADERS])
                        cp_async4(scales + (now.stage * SCALES + j + tid) * 4,
                                  scale[j / LOADERS] + step);
                barrier_arrive_copies(full + 8 * now.stage);
            }
        }
    }

    // ---- multiplying: one warpgroup ----

    __device__ __forceinline__ void release(int stage) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(empty + 8 * stage);
            if (CLUSTER > 1)
                barrier_free_cluster(empty + 8 * stage, rank ^ 1);
        }
    }

    // Which of a tile's 64 tokens are a warpgroup's.
    __device__ __forceinline__ static int half_of(int group) {
        return TURNS ? 0 : group;
    }

    // Items in turn: a warpgroup begins when the other's slices are all there. A barrier does not tell
    // that a slice is there from that it will be two rounds later.
    __device__ __forceinline__ static void await_turn(int group) {
        if (TURNS)
            named_barrier(3 + group, 256);
    }
    __device__ __forceinline__ static void pass_turn(int group) {
        if (TURNS)
            named_arrive(3 + (group ^ 1), 256);
    }

    __device__ __forceinline__ int await_slice(hopper_place &at, int group, bool last) const {
        const hopper_place now = next(at);
        const int stage = __shfl_sync(0xffffffffu, now.stage, 0); // as in take_item
        barrier_wait(full + 8 * stage, now.phase);
        fence_async_shared(); // cp.async wrote the token rows
        if (last)
            pass_turn(group);
        return stage;
    }

    // d[64 tokens][N weight rows] over all steps; a half without tokens only lets slices go.
    template <int N>
    __device__ __forceinline__ void multiply_bf16(const hopper_item &it, int group,
                                                  hopper_place &at, float (&d)[BM / 2]) const {
        const int half = half_of(group), steps = steps_of(it.kind);
        const bool any = half * 64 < it.rows;
        int before = at.stage;
        for (int step = 0; step < steps; step++) {
            const int stage = await_slice(at, group, step + 1 == steps);
            const moe_u64 w = wgmma_descriptor(smem_base()) + stage * (STAGE_BYTES / 16);
            const moe_u64 x = w + BM * 8 + half * 512;
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
        }
        wgmma_wait<0>();
        release(before);
    }

    // Products of a slice's 128 numbers by N weight rows from `row`, asked for.
    template <int N>
    __device__ __forceinline__ void ask(int half, int stage, int row,
                                        float (&part)[N / 2]) const {
        const moe_u64 from = wgmma_descriptor(smem_base()) + stage * (STAGE_BYTES / 16);
        const moe_u64 x = from + BM * 8 + half * 512, w = from + row * 8;
        wgmma_begin();
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            wgmma_e4m3<N>(part, x + 2 * kk, w + 2 * kk, kk);
        wgmma_commit();
    }

    // By what the sums of a slice are multiplied: scales of this thread's two tokens times, of each 64
    // weight rows of PART from `row`, the gate's and the up's.
    struct factors {
        float by[4][2];
    };
    __device__ __forceinline__ factors load_factors(int half, int stage, int row) const {
        const unsigned at = scales + stage * SCALES * 4;
        const int token = half * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        const float by[2] = {__uint_as_float(load_shared4(at + token * 4)),
                             __uint_as_float(load_shared4(at + token * 4 + 32))};
        const uint4 w = load_shared16(at + (BN + row / 32) * 4);
        const unsigned bits[4] = {w.x, w.y, w.z, w.w};
        factors f;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int t = 0; t < 2; t++)
                f.by[i][t] = __uint_as_float(bits[i]) * by[t];
        return f;
    }

    // The products are there: into the totals from FIRST (of w1's eights, odd ones are ups).
    template <int N, int FIRST>
    __device__ __forceinline__ static void promote(const factors &f, const float (&part)[N / 2],
                                                   float (&d)[BM / 2]) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            d[FIRST + i] = fmaf(part[i], f.by[i / 32 * 2 + i / 4 % 2][i / 2 % 2], d[FIRST + i]);
    }

    template <int N>
    __device__ __forceinline__ void multiply_fp8(const hopper_item &it, int group,
                                                 hopper_place &at, float (&d)[BM / 2]) const {
        constexpr int ROWS = N < PART ? N : PART;
        const int half = half_of(group), steps = steps_of(it.kind);
        if (half * 64 >= it.rows) {
            for (int step = 0; step < steps; step++)
                release(await_slice(at, group, step + 1 == steps));
            return;
        }
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            d[i] = 0.0f;
        for (int step = 0; step < steps; step++) {
            float part[ROWS / 2];
            const int stage = await_slice(at, group, step + 1 == steps);
            factors f = load_factors(half, stage, 0);
            ask<ROWS>(half, stage, 0, part);
            if constexpr (N > ROWS) {
                wgmma_wait<0>();
                promote<ROWS, 0>(f, part, d);
                f = load_factors(half, stage, ROWS);
                ask<ROWS>(half, stage, ROWS, part);
            }
            wgmma_wait<0>();
            release(stage);
            promote<ROWS, N / 2 - ROWS / 2>(f, part, d);
        }
    }

    template <int N>
    __device__ __forceinline__ void multiply(const hopper_item &it, int group, hopper_place &at,
                                             float (&d)[BM / 2]) const {
        if constexpr (FP8)
            multiply_fp8<N>(it, group, at, d);
        else
            multiply_bf16<N>(it, group, at, d);
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

    // fp8: a warp's 16 tokens of the activation, as they are. quantise() does the rest.
    __device__ __forceinline__ void finish_fp32(const hopper_item &it, int token0,
                                                const float (&scale)[2],
                                                const float (&d)[BM / 2]) const {
        constexpr int WIDE = GATED ? 16 : 8;
        const int lane = threadIdx.x % 32, columns = columns_out(it.kind);
        float *out = static_cast<float *>(target(it.kind));
#pragma unroll
        for (int j = 0; j < BM1 / WIDE; j++) {
            const int column = it.m0 / (WIDE / 8) + 8 * j + 2 * (lane % 4);
            float v[4];
            results<false>(it, it.m0 + j * WIDE + 2 * (lane % 4), d + j * WIDE / 2, scale, v);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = token0 + lane / 4 + 8 * i;
                if (t < it.rows && column < columns)
                    *reinterpret_cast<float2 *>(
                        out + static_cast<long long>(it.row + t) * columns + column) =
                        make_float2(v[2 * i], v[2 * i + 1]);
            }
        }
    }

    // fp8: a warp's 16 tokens of the activation become e4m3, a block of 128 columns at a time.
    __device__ __forceinline__ void finish_scaled(const hopper_item &it, int token0,
                                                  unsigned mine, const float (&scale)[2],
                                                  const float (&d)[BM / 2]) const {
        constexpr int WIDE = GATED ? 16 : 8;
        const int lane = threadIdx.x % 32, columns = columns_out(it.kind);
        const bool routed = is_routed(it.kind);
        unsigned char *out =
            static_cast<unsigned char *>(a.ws[routed ? MOE_WS_HID8 : MOE_WS_SHID8]);
        float *by = static_cast<float *>(a.ws[routed ? MOE_WS_HIDS : MOE_WS_SHIDS]);
#pragma unroll
        for (int b = 0; b < BM1 / (16 * WIDE); b++) {
            const int column0 = it.m0 / (WIDE / 8) + b * MOE_SCALE_BLOCK;
            float v[16][4], top[2];
            unsigned most[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const int w = (16 * b + j) * WIDE, column = column0 + 8 * j + 2 * (lane % 4);
                results<false>(it, it.m0 + w + 2 * (lane % 4), d + w / 2, scale, v[j]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    most[i / 2] = max(most[i / 2], column < columns ? magnitude(v[j][i]) : 0u);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = token0 + lane / 4 + 8 * i;
                most[i] = max(most[i], __shfl_xor_sync(0xffffffffu, most[i], 1));
                most[i] = max(most[i], __shfl_xor_sync(0xffffffffu, most[i], 2));
                top[i] = scale_of(most[i]);
                if (lane % 4 == 0 && t < it.rows && column0 < columns)
                    by[static_cast<long long>(it.row + t) * ((columns + 127) / 128) +
                       column0 / MOE_SCALE_BLOCK] = top[i];
            }
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const unsigned four = pack_e4m3(v[j][0] / top[0], v[j][1] / top[0],
                                                v[j][2] / top[1], v[j][3] / top[1]);
                const unsigned at = mine + lane / 4 * PITCH + j * 8 + 2 * (lane % 4);
                store_shared2(at, four & 0xffff);
                store_shared2(at + 8 * PITCH, four >> 16);
            }
            __syncwarp();
#pragma unroll
            for (int u = lane; u < 16 * 8; u += 32) {
                const int t = u / 8, column = column0 + u % 8 * 16;
                if (token0 + t < it.rows && column < columns)
                    *reinterpret_cast<uint4 *>(
                        out + static_cast<long long>(it.row + token0 + t) * columns + column) =
                        load_shared16(mine + t * PITCH + u % 8 * 16);
            }
            __syncwarp();
        }
    }

    // A warp's 16 tokens leave through its own part of shared memory, up to 64 columns at a time.
    template <bool Second>
    __device__ __forceinline__ void finish(const hopper_item &it, int group,
                                           const float (&d)[BM / 2]) const {
        constexpr bool HALF = !Second && GATED;
        constexpr int BLOCKS = (Second ? BM2 : BM1) / (HALF ? 16 : 8); // of eight columns
        const int lane = threadIdx.x % 32,
                  token0 = threadIdx.x % 128 / 32 * 16 + half_of(group) * 64;
        const int columns = columns_out(it.kind), column0 = HALF ? it.m0 / 2 : it.m0;
        const unsigned mine = staging + (group * 64 + token0 % 64) * PITCH;
        const bool scaled = !Second && kInputWeight && it.kind == HOPPER_GEMM1;
        const float scale[2] = {scaled ? row_scale(it, token0 + lane / 4) : 1.0f,
                                scaled ? row_scale(it, token0 + lane / 4 + 8) : 1.0f};
        if (token0 >= it.rows)
            return;
        if constexpr (FP8 && !Second) {
            if constexpr (SCALED)
                finish_scaled(it, token0, mine, scale, d);
            else
                finish_fp32(it, token0, scale, d);
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

    // fp8, by a warpgroup: a tile's rows of the activation become e4m3, a warp 128 columns at a time.
    __device__ __forceinline__ void quantise(const hopper_item &it) const {
        constexpr int AT_ONCE = 8;
        const bool routed = is_routed(it.kind);
        const int width = columns_out(it.kind), lane = threadIdx.x % 32;
        const int blocks = (width + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK;
        const int units = it.tile_rows * blocks;
        const void *from = a.ws[routed ? MOE_WS_HID : MOE_WS_SHID];
        unsigned *to = static_cast<unsigned *>(a.ws[routed ? MOE_WS_HID8 : MOE_WS_SHID8]);
        float *by = static_cast<float *>(a.ws[routed ? MOE_WS_HIDS : MOE_WS_SHIDS]);
        for (int u = threadIdx.x % 128 / 32; u < units; u += 4 * AT_ONCE) {
            float v[AT_ONCE][4];
            long long at[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int unit = u + 4 * i, column = unit % blocks * MOE_SCALE_BLOCK + lane * 4;
                at[i] =
                    unit < units && column < width
                        ? static_cast<long long>(it.tile_row + unit / blocks) * width + column
                        : -1;
                load4(from, at[i], true, at[i] >= 0, v[i]);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float scale = quant4(v[i], at[i] >= 0 ? to + at[i] / 4 : nullptr);
                if (lane == 0 && at[i] >= 0)
                    by[static_cast<long long>(it.tile_row) * blocks + u + 4 * i] = scale;
            }
        }
    }

    // Everyone's results are out before the one who says so.
    __device__ __forceinline__ void tell(const hopper_item &it, int group) const {
        const bool one = threadIdx.x % 128 == 0;
        int *done = counters() + (is_second(it.kind) ? HOPPER_DONE : it.counter);
        __threadfence();
        named_barrier(1 + group, 128);
        if (FP8 && !SCALED && !is_second(it.kind)) {
            const bool last =
                one && add_acq_rel(done, 1) == first_parts(is_routed(it.kind)) - 1;
            if (!named_barrier_any(1 + group, 128, last))
                return;
            quantise(it);
            __threadfence();
            named_barrier(1 + group, 128);
        }
        if (one)
            add_release(done, 1);
    }

    template <bool Second>
    __device__ __forceinline__ void take(const hopper_item &it, int group, hopper_place &at,
                                         float (&d)[BM / 2]) const {
        multiply<Second ? BM2 : BM1>(it, group, at, d);
        finish<Second>(it, group, d);
    }

    __device__ __forceinline__ void multiply_all(int group) {
        hopper_place at = {0, 0};
        if (group == 1)
            pass_turn(group);
        for (int n = 0;; n++) {
            const hopper_item it = take_item(n);
            float d[BM / 2];
            const bool mine = !TURNS || n % 2 == group;
            if (mine)
                await_turn(group);
            if (it.kind == HOPPER_END)
                return;
            if (!mine) {
                skip(at, steps_of(it.kind));
                continue;
            }
            if (is_second(it.kind))
                take<true>(it, group, at, d);
            else
                take<false>(it, group, at, d);
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
             u += gridDim.x * 8) {
            const long long token = u / SPANS;
            const int c = u % SPANS * 256 + lane * 8;
            const float gate = kSharedInter && a.shared_gate ? shared_gate(a, token) : 1.0f;
            if (c < kHidden)
                combine8(a, row_of + token * kTopK, token, c, gate);
        }
    }

    // After the last item of a multiplying warpgroup.
    __device__ __forceinline__ void end() const {
        if (ENTRIES && a.flags & MOE_COMBINE) {
            barrier_wait(finished, 0);
            combine();
        }
    }

    __device__ __forceinline__ void run() {
        launch_next();
        set_up();
        const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0) - 1;
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
template <int BM1, int BM2, int TOKENS, int STAGES, int ENTRIES, int CLUSTER>
__global__ void __launch_bounds__(384, 1)
    moe_experts(const __grid_constant__ moe_args a, const __grid_constant__ hopper_maps maps) {
    hopper<BM1, BM2, TOKENS, STAGES, ENTRIES, CLUSTER>(a, maps).run();
}
