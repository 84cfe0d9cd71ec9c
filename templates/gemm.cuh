// Grouped GEMMs on mma.sync: bf16 or e4m3 in, fp32 accumulation, sm_80 and up.
//
//   gemm1    hid[row] = act(w1[slot] x[token of row] + b1)     rows gathered while loading
//   gemm2    y[row]   = w2[slot] hid[row] + b2
//   shared1, shared2: the same for the shared expert, whose rows are the tokens
//
// Weights are the M side (BM rows of the record), tokens the N side (BN rows of a tile), K the
// reduction in steps of 128 bytes. A block takes work items (tile, BM rows) b, b + gridDim.x, ... with
// the tiles of a slot innermost, so that blocks running together share weights in the second-level
// cache. The cp.async pipeline runs on over the end of an item: the loader is STAGES - 1 steps
// ahead of the tensor cores, in the next item when it must be.
//
// A step's slice in shared memory: [BM + BN] rows of 128 bytes, whose 16-byte chunks are permuted
// by the row's low three bits, so that neither cp.async nor ldmatrix meets a bank conflict.
// Fragments are read 32 bytes of K ahead of their use (the sm_80 main loop of CUTLASS).
//
// fp8 records: a step is the 128 numbers that share a scale. Its products are summed apart; the sum
// enters the total times the scales of its weights and of its token's activations. gemm1 then
// leaves fp32 activations, which moe_quant makes e4m3.
#pragma once

template <int V> struct gemm_shape;
#define X(id, bm, bn, bk, wm, wn, st) \
    template <> struct gemm_shape<id> { \
        static constexpr int BM = bm, BN = bn, BK = bk, WM = wm, WN = wn, STAGES = st; \
        static constexpr int THREADS = 32 * wm * wn; \
    };
MOE_GEMM_VARIANTS(X)
#undef X

// Which of the four products: sizes, operands, and where the result goes.
template <bool Second, bool Shared> struct gemm_problem {
    const moe_args &a;
    __device__ __forceinline__ bool gated() const {
        return kActivation != MOE_ACT_RELU2;
    }
    __device__ __forceinline__ bool fp8() const {
        return kFormat == MOE_FORMAT_FP8_BLOCK;
    }
    // Numbers in 16 bytes, which is what a thread copies at a time.
    __device__ __forceinline__ int chunk() const {
        return fp8() ? 16 : 8;
    }
    __device__ __forceinline__ int inter() const {
        return Shared ? kSharedInter : kInter;
    }
    // Weight rows, and the reduction.
    __device__ __forceinline__ int m() const {
        return Second ? kHidden : gated() ? 2 * inter() : inter();
    }
    __device__ __forceinline__ int k() const {
        return Second ? inter() : kHidden;
    }
    __device__ __forceinline__ const char *record(int slot) const {
        return Shared ? a.shared : a.pool + a.phys_of_slot[slot] * a.params.slot_bytes;
    }
    // Chunks in a row of weights and in one of tokens().
    __device__ __forceinline__ int row_chunks() const {
        return k() / chunk();
    }
    __device__ __forceinline__ const uint4 *weights(int slot) const {
        long long w2 = Shared ? a.params.shared_w2_offset : a.params.w2_offset;
        return reinterpret_cast<const uint4 *>(record(slot) + (Second ? w2 : 0));
    }
    // Scales of the weights, [blocks of rows][gate, up][blocks of K], and of tokens(), [row][blocks
    // of K].
    __device__ __forceinline__ const float *weight_scales(int slot) const {
        long long s1 = Shared ? a.params.shared_s1_offset : a.params.s1_offset;
        long long s2 = Shared ? a.params.shared_s2_offset : a.params.s2_offset;
        return reinterpret_cast<const float *>(record(slot) + (Second ? s2 : s1));
    }
    __device__ __forceinline__ const float *token_scales() const {
        return static_cast<const float *>(a.ws[!Second  ? MOE_WS_XS
                                               : Shared ? MOE_WS_SHIDS
                                                        : MOE_WS_HIDS]);
    }
    __device__ __forceinline__ const float *bias(int slot) const {
        long long offset = Second ? a.params.b2_offset : a.params.b1_offset;
        return reinterpret_cast<const float *>(record(slot) + offset);
    }
    __device__ __forceinline__ const uint4 *tokens() const {
        if (fp8())
            return static_cast<const uint4 *>(a.ws[!Second  ? MOE_WS_X8
                                                   : Shared ? MOE_WS_SHID8
                                                            : MOE_WS_HID8]);
        return static_cast<const uint4 *>(Second ? a.ws[Shared ? MOE_WS_SHID : MOE_WS_HID]
                                                 : a.x16);
    }
    // Row of tokens() that feeds a row.
    __device__ __forceinline__ int source(int row) const {
        if (Second || Shared)
            return row;
        return static_cast<const int *>(a.ws[MOE_WS_ROW_ENTRY])[row] / kTopK;
    }
    __device__ __forceinline__ void *result() const {
        return Second ? a.ws[Shared ? MOE_WS_SY : MOE_WS_Y]
                      : a.ws[Shared ? MOE_WS_SHID : MOE_WS_HID];
    }
    __device__ __forceinline__ int columns() const {
        return Second ? kHidden : inter();
    }
    // What the pre-activation is multiplied by: the routing weight where it belongs to the input.
    __device__ __forceinline__ float row_scale(int row) const {
        if (Second || Shared || !kInputWeight)
            return 1.0f;
        return a.topk_weight[static_cast<const int *>(a.ws[MOE_WS_ROW_ENTRY])[row]];
    }
};

// One work item: BM weight rows from m0, `rows` token rows from `row`.
struct gemm_item {
    int slot, row, rows, m0;
};

template <int BM, int BN, bool Shared>
__device__ __forceinline__ gemm_item gemm_decode(const moe_args &a, int item, int m_tiles) {
    gemm_item out;
    if (Shared) {
        int tiles = (a.num_tokens + BN - 1) / BN;
        out.slot = 0;
        out.m0 = item / tiles * BM;
        out.row = item % tiles * BN;
        out.rows = min(BN, a.num_tokens - out.row);
        return out;
    }
    // Slot s has the items [first, first + count) * m_tiles, so item / m_tiles is one of its tiles.
    const moe_tile *list = static_cast<const moe_tile *>(a.ws[MOE_WS_TILES]) + 1;
    const moe_tile any = list[item / m_tiles];
    int local = item - any.first * m_tiles;
    const moe_tile tile = list[any.first + local % any.count];
    out.slot = any.slot;
    out.m0 = local / any.count * BM;
    out.row = tile.row;
    out.rows = tile.rows;
    return out;
}

__device__ __forceinline__ float sigmoid(float v) {
    return 1.0f / (1.0f + __expf(-v));
}

__device__ __forceinline__ float gelu(float v) {
    if (kActivation == MOE_ACT_GEGLU_TANH)
        return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
}

__device__ __forceinline__ float activate(const moe_params &p, float gate, float up) {
    if (kActivation == MOE_ACT_SWIGLU)
        return gate * sigmoid(gate) * up;
    if (kActivation == MOE_ACT_SWIGLU_OAI) {
        float g = fminf(gate, p.act_limit), u = fminf(fmaxf(up, -p.act_limit), p.act_limit);
        return g * sigmoid(p.act_alpha * g) * (u + 1.0f);
    }
    return gelu(gate) * up;
}

// Stores one 8x8 block of results, as bf16 or fp32, transposed by a shuffle so that a thread writes
// two adjacent columns. Lane l holds column `col` + l/4 of tokens 2*(l%4) and +1 (v0, v1); afterwards even
// columns write the first token, odd ones the second.
__device__ __forceinline__ void store_block(void *out, bool fp32, long long stride, int col,
                                            int columns, int row, int rows_left, float v0,
                                            float v1) {
    const int lane = threadIdx.x % 32, odd = lane / 4 & 1;
    float other = __shfl_xor_sync(0xffffffffu, odd ? v0 : v1, 4);
    float low = odd ? other : v0, high = odd ? v1 : other;
    int token = 2 * (lane % 4) + odd, at = col + (lane / 4 & ~1);
    if (token < rows_left && at < columns) {
        const long long place = (row + token) * stride + at;
        if (fp32)
            *reinterpret_cast<float2 *>(static_cast<float *>(out) + place) =
                make_float2(low, high);
        else
            *reinterpret_cast<unsigned *>(static_cast<bf16 *>(out) + place) =
                pack_bf16(low, high);
    }
}

template <int V, bool Second, bool Shared> struct gemm {
    typedef gemm_shape<V> S;
    static constexpr int BM = S::BM, BN = S::BN, STAGES = S::STAGES, THREADS = S::THREADS;
    static constexpr int TM = BM / S::WM, TN = BN / S::WN; // a warp's tile
    static constexpr int MI = TM / 16, NI = TN / 8;        // in mma tiles
    static constexpr int A_CHUNKS = BM * 8 / THREADS;      // 16-byte chunks per thread
    static constexpr int B_CHUNKS = (BN * 8 + THREADS - 1) / THREADS;
    static constexpr int STAGE_BYTES = (BM + BN) * 128;

    const gemm_problem<Second, Shared> p;
    const int m_tiles, k_steps, items;

    // The loader: the item and step that the next slice comes from.
    int load_item, load_step = 0, load_stage = 0;
    const uint4 *load_a;       // this thread's first chunk of the item's weights
    int load_m;                // its row
    unsigned load_b[B_CHUNKS]; // chunks of tokens(), NONE: zeros
    static constexpr unsigned NONE = 0xffffffffu;

    // Fragments of 32 bytes of K, double-buffered.
    unsigned a_frag[2][MI][4], b_frag[2][NI][2];

    // fp8: scales of this thread's accumulators in one K step, and where they come from.
    const float *weight_scale[2]; // of (c0, c1) and of (c2, c3)
    unsigned token_scale[NI][2];  // index into token_scales(), NONE: no such token
    float weight_by[2], token_by[NI][2];

    __device__ __forceinline__ gemm(const moe_args &a)
        : p{a}, m_tiles((p.m() + BM - 1) / BM),
          k_steps((p.k() + 8 * p.chunk() - 1) / (8 * p.chunk())),
          items((Shared ? (a.num_tokens + BN - 1) / BN
                        : static_cast<const moe_tile *>(a.ws[MOE_WS_TILES])[0].slot) *
                m_tiles),
          load_item(blockIdx.x) {
        if (load_item < items)
            begin_item();
    }

    __device__ __forceinline__ void begin_item() {
        const gemm_item item = gemm_decode<BM, BN, Shared>(p.a, load_item, m_tiles);
        const int tid = threadIdx.x;
        load_m = item.m0 + tid / 8;
        load_a =
            p.weights(item.slot) + static_cast<long long>(load_m) * p.row_chunks() + tid % 8;
#pragma unroll
        for (int i = 0; i < B_CHUNKS; i++) {
            int r = tid / 8 + i * (THREADS / 8);
            load_b[i] =
                r < item.rows ? p.source(item.row + r) * p.row_chunks() + tid % 8 : NONE;
        }
    }

    // Issues a quarter of the next slice; the last quarter closes the group and moves on. When
    // there is no next slice the group is empty, so that groups count steps.
    __device__ __forceinline__ void load(int quarter) {
        if (load_item < items) {
            const int tid = threadIdx.x;
            const bool k_valid =
                p.row_chunks() % 8 == 0 || load_step * 8 + tid % 8 < p.row_chunks();
            const unsigned chunk = (tid % 8 ^ tid / 8 % 8) * 16;
            const unsigned to = smem_base() + load_stage * STAGE_BYTES + tid / 8 * 128 + chunk;
            const uint4 *from = load_a + load_step * 8;
            const uint4 *tokens = p.tokens() + load_step * 8;
#pragma unroll
            for (int i = quarter; i < A_CHUNKS; i += 4) {
                const int r = i * (THREADS / 8);
                const bool valid = k_valid && (p.m() % BM == 0 || load_m + r < p.m());
                cp_async16(to + r * 128,
                           from + (valid ? static_cast<long long>(r) * p.row_chunks() : 0),
                           valid);
            }
#pragma unroll
            for (int i = quarter; i < B_CHUNKS; i += 4) {
                const int r = i * (THREADS / 8);
                const bool valid = k_valid && load_b[i] != NONE;
                if (BN * 8 >= THREADS || tid < BN * 8)
                    cp_async16(to + (BM + r) * 128, tokens + (valid ? load_b[i] : 0), valid);
            }
        }
        if (quarter < 3)
            return;
        cp_async_commit();
        if (load_item < items) {
            load_stage = load_stage + 1 == STAGES ? 0 : load_stage + 1;
            if (++load_step == k_steps) {
                load_step = 0;
                load_item += gridDim.x;
                if (load_item < items)
                    begin_item();
            }
        }
    }

    // Where an item's scales are. A warp's rows are of one block of 128 (each gate and up).
    __device__ __forceinline__ void begin_scales(const gemm_item &item) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const bool pairs = !Second && p.gated();
        const int m = item.m0 + warp % S::WM * TM, n = warp / S::WM * TN + 2 * (lane % 4);
        const int block = min(pairs ? m / 2 : m, p.columns() - 1) / MOE_SCALE_BLOCK;
        weight_scale[0] = p.weight_scales(item.slot) + (pairs ? 2 * block : block) * k_steps;
        weight_scale[1] = weight_scale[0] + (pairs ? k_steps : 0);
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int v = 0; v < 2; v++) {
                const int r = n + 8 * j + v;
                token_scale[j][v] = r < item.rows ? p.source(item.row + r) * k_steps : NONE;
            }
    }

    // Asks for a step's scales, which are there when its products are.
    __device__ __forceinline__ void load_scales(int step) {
        weight_by[0] = weight_scale[0][step], weight_by[1] = weight_scale[1][step];
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int v = 0; v < 2; v++)
                token_by[j][v] = token_scale[j][v] == NONE
                                     ? 0.0f
                                     : p.token_scales()[token_scale[j][v] + step];
    }

    __device__ __forceinline__ void promote(float (&acc)[MI][NI][4],
                                            const float (&part)[MI][NI][4]) {
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int v = 0; v < 4; v++) {
                const float by = weight_by[v / 2] * token_by[j][v % 2];
#pragma unroll
                for (int i = 0; i < MI; i++)
                    acc[i][j][v] = fmaf(part[i][j][v], by, acc[i][j][v]);
            }
    }

    // Reads 32 bytes of K, the kk-th of a stage, into fragment buffer `to`.
    __device__ __forceinline__ void read(int stage, int kk, int to) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const unsigned base = smem_base() + stage * STAGE_BYTES;
        // Lane l addresses row l%8 of the l/8-th 8x8 matrix: for A rows +8 then K +8, for B two
        // blocks of 8 tokens, K first.
        const int a_row = warp % S::WM * TM + lane % 16, a_k = lane / 16;
        const int b_row = BM + warp / S::WM * TN + (NI > 1 ? lane / 16 * 8 : 0) + lane % 8;
        const int b_k = lane / 8 % 2;
#pragma unroll
        for (int i = 0; i < MI; i++)
            ldmatrix_x4(a_frag[to][i],
                        base + (a_row + 16 * i) * 128 + ((2 * kk + a_k) ^ (a_row & 7)) * 16);
        const unsigned b_at = base + b_row * 128 + ((2 * kk + b_k) ^ (b_row & 7)) * 16;
        if (NI == 1)
            ldmatrix_x2(b_frag[to][0], b_at);
#pragma unroll
        for (int j = 0; j + 1 < NI; j += 2) {
            unsigned r[4];
            ldmatrix_x4(r, b_at + j * 8 * 128);
            b_frag[to][j][0] = r[0], b_frag[to][j][1] = r[1];
            b_frag[to][j + 1][0] = r[2], b_frag[to][j + 1][1] = r[3];
        }
    }

    // Bias, scale, activation, and out. A 16-row block of w1 is 8 gate rows over their 8 up rows:
    // an accumulator's (c0, c1) are gates of two tokens, (c2, c3) the matching ups.
    __device__ __forceinline__ void finish(const gemm_item &item, float (&acc)[MI][NI][4]) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int n0 = warp / S::WM * TN, m0 = item.m0 + warp % S::WM * TM;
        void *out = p.result();
        const bool wide = !Second && p.fp8();
        const long long stride = p.columns();
        const bool has_bias = kBias && !Shared;
        const float *bias = has_bias ? p.bias(item.slot) : nullptr;
#pragma unroll
        for (int j = 0; j < NI; j++) {
            const int row = item.row + n0 + 8 * j, left = item.rows - n0 - 8 * j;
            float scale0 = 1.0f, scale1 = 1.0f;
            if (kInputWeight && !Second && !Shared) {
                const int token = 2 * (lane % 4);
                scale0 = token < left ? p.row_scale(row + token) : 0.0f;
                scale1 = token + 1 < left ? p.row_scale(row + token + 1) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < MI; i++) {
                const int m = m0 + 16 * i;
                float(&c)[4] = acc[i][j];
                if (!Second && kInputWeight) {
                    c[0] *= scale0, c[1] *= scale1;
                    c[2] *= scale0, c[3] *= scale1;
                }
                if (has_bias && m < p.m()) {
                    float low = bias[m + lane / 4], high = bias[m + 8 + lane / 4];
                    c[0] += low, c[1] += low;
                    c[2] += high, c[3] += high;
                }
                if (!Second && p.gated()) {
                    store_block(out, wide, stride, m / 2, p.columns(), row, left,
                                activate(p.a.params, c[0], c[2]),
                                activate(p.a.params, c[1], c[3]));
                    continue;
                }
                if (!Second)
#pragma unroll
                    for (int v = 0; v < 4; v++) {
                        float r = fmaxf(c[v], 0.0f);
                        c[v] = r * r;
                    }
                store_block(out, wide, stride, m, p.columns(), row, left, c[0], c[1]);
                store_block(out, wide, stride, m + 8, p.columns(), row, left, c[2], c[3]);
            }
        }
    }

    // Waits until everyone's next slice is there and everyone is done with the one before the
    // last, whose place the next load takes.
    __device__ __forceinline__ void next_slice() {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
    }

    // The kk-th 32 bytes of a stage's K. The next fragments come while the tensor cores work on
    // these.
    template <int kk>
    __device__ __forceinline__ void multiply(int &stage, float (&acc)[MI][NI][4],
                                             float (&part)[MI][NI][4]) {
        load(kk);
        if (kk == 3) {
            next_slice();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        read(stage, (kk + 1) % 4, (kk + 1) % 2);
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j++)
                if (p.fp8())
                    mma_e4m3(part[i][j], a_frag[kk % 2][i], b_frag[kk % 2][j][0],
                             b_frag[kk % 2][j][1]);
                else
                    mma_bf16(acc[i][j], a_frag[kk % 2][i], b_frag[kk % 2][j][0],
                             b_frag[kk % 2][j][1]);
    }

    __device__ __forceinline__ void run() {
        int stage = 0;
        if (load_item >= items)
            return;
        for (int s = 0; s < STAGES - 1; s++)
#pragma unroll
            for (int quarter = 0; quarter < 4; quarter++)
                load(quarter);
        next_slice();
        read(0, 0, 0);
        for (int at = blockIdx.x; at < items; at += gridDim.x) {
            float acc[MI][NI][4] = {};
            if (p.fp8())
                begin_scales(gemm_decode<BM, BN, Shared>(p.a, at, m_tiles));
            for (int step = 0; step < k_steps; step++) {
                float part[MI][NI][4] = {};
                if (p.fp8())
                    load_scales(step);
                multiply<0>(stage, acc, part);
                multiply<1>(stage, acc, part);
                multiply<2>(stage, acc, part);
                multiply<3>(stage, acc, part);
                if (p.fp8())
                    promote(acc, part);
            }
            finish(gemm_decode<BM, BN, Shared>(p.a, at, m_tiles), acc);
        }
    }
};

// Persistent grids; blocks beyond the items leave at once. Dynamic shared memory:
// STAGES * (BM + BN) * 128 bytes.
template <int V>
__global__ void __launch_bounds__(gemm_shape<V>::THREADS)
    moe_gemm1(const __grid_constant__ moe_args a) {
    gemm<V, false, false>(a).run();
}
template <int V>
__global__ void __launch_bounds__(gemm_shape<V>::THREADS)
    moe_gemm2(const __grid_constant__ moe_args a) {
    gemm<V, true, false>(a).run();
}
template <int V>
__global__ void __launch_bounds__(gemm_shape<V>::THREADS)
    moe_shared1(const __grid_constant__ moe_args a) {
    gemm<V, false, true>(a).run();
}
template <int V>
__global__ void __launch_bounds__(gemm_shape<V>::THREADS)
    moe_shared2(const __grid_constant__ moe_args a) {
    gemm<V, true, true>(a).run();
}
