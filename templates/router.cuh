// Router: logits[T][E] = x[T][H] w[E][H]^T in fp32, then scores, choice and weights.
//
// The product is plain fp32 FMA: expert ids must not depend on a rounding of the inputs. Sums are
// kept short (32 terms, then slices, then K splits) so that weights hold 1e-6 at H = 7168.
// The last block to finish a tile of tokens adds the K splits in order and routes the tile, one
// warp per token, lane l holding experts l, l+32, ...
// Equal scores go to the lowest expert id, always.
#pragma once

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kPerLane = (kExperts + 31) / 32;      // experts per lane
constexpr int kGroupsPerLane = (kGroups + 31) / 32; // groups per lane

__device__ __forceinline__ float neg_inf() {
    return -__uint_as_float(0x7f800000u);
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d > 0; d /= 2)
        v += __shfl_xor_sync(kFullMask, v, d);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int d = 16; d > 0; d /= 2)
        v = fmaxf(v, __shfl_xor_sync(kFullMask, v, d));
    return v;
}

// Floats as unsigned numbers of the same order; NaN counts as -inf, -0 as +0.
__device__ __forceinline__ unsigned order_of(float v) {
    if (!(v == v))
        v = neg_inf();
    unsigned u = __float_as_uint(v + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Index of the warp's largest value, lowest index first among equals. Lane l holds indices
// l + 32*i; bit i of taken leaves one out.
template <int N>
__device__ __forceinline__ int warp_argmax(const float (&v)[N], unsigned taken, int count) {
    const int lane = threadIdx.x % 32;
    unsigned best = 0;
    int index = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < N; i++) {
        unsigned u = order_of(v[i]);
        bool free = lane + 32 * i < count && !(taken >> i & 1);
        if (free && u > best) {
            best = u;
            index = lane + 32 * i;
        }
    }
    for (int d = 16; d > 0; d /= 2) {
        unsigned other = __shfl_xor_sync(kFullMask, best, d);
        int other_index = __shfl_xor_sync(kFullMask, index, d);
        if (other > best || (other == best && other_index < index)) {
            best = other;
            index = other_index;
        }
    }
    return index;
}

// The value of expert e, in every lane.
template <int N> __device__ __forceinline__ float warp_pick(const float (&v)[N], int e) {
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i == e / 32)
            mine = v[i];
    return __shfl_sync(kFullMask, mine, e % 32);
}

// exp(v - max) of the experts that count, and their sum.
__device__ __forceinline__ float softmax_terms(float (&v)[kPerLane]) {
    const int lane = threadIdx.x % 32;
    float top = neg_inf(), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
        if (lane + 32 * i < kExperts)
            top = fmaxf(top, v[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
        v[i] = lane + 32 * i < kExperts ? expf(v[i] - top) : 0.0f;
        sum += v[i];
    }
    return warp_sum(sum);
}

// Leaves the scores of the best topk_group groups, by the sum of each group's two best scores, and
// fills the others (DeepSeek-V3's noaux_tc).
__device__ __forceinline__ void keep_best_groups(const moe_params &p,
                                                 float (&choice)[kPerLane]) {
    constexpr int size = kExperts / kGroups;
    const int lane = threadIdx.x % 32;
    float group[kGroupsPerLane];
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; i++)
        group[i] = neg_inf();
    for (int g = 0; g < kGroups; g++) {
        float first = neg_inf(), second = neg_inf();
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            int e = lane + 32 * i;
            if (e < kExperts && e / size == g) {
                second = fmaxf(second, fminf(first, choice[i]));
                first = fmaxf(first, choice[i]);
            }
        }
        for (int d = 16; d > 0; d /= 2) {
            float f = __shfl_xor_sync(kFullMask, first, d);
            float s = __shfl_xor_sync(kFullMask, second, d);
            second = fmaxf(fminf(first, f), fmaxf(second, s));
            first = fmaxf(first, f);
        }
#pragma unroll
        for (int i = 0; i < kGroupsPerLane; i++)
            if (g == lane + 32 * i)
                group[i] = p.group_best ? first : first + second;
    }
    unsigned taken = 0, keep = 0; // keep: bit i for this lane's expert lane + 32*i
    for (int n = 0; n < p.top_groups; n++) {
        int g = warp_argmax<kGroupsPerLane>(group, taken, kGroups);
        if (g % 32 == lane)
            taken |= 1u << (g / 32);
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            if ((lane + 32 * i) / size == g)
                keep |= 1u << i;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
        if (!(keep >> i & 1))
            choice[i] = p.mask_zero ? 0.0f : neg_inf();
}

// SparseMixer's one step (Liu et al. 2024, phimoe): the winner of choice, and its softmax weight
// among the logits within a relative 2*eps of it. Entries that are -inf do not take part; taken is
// warp_argmax's.
__device__ __forceinline__ int sparse_mixer_step(float jitter, const float (&logit)[kPerLane],
                                                 const float (&choice)[kPerLane],
                                                 unsigned taken, float *weight) {
    const int lane = threadIdx.x % 32;
    int winner = warp_argmax<kPerLane>(choice, taken, kExperts);
    float top = warp_pick<kPerLane>(choice, winner), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
        float scale = fmaxf(fabsf(logit[i]), top);
        bool near = !((top - logit[i]) / scale > 2.0f * jitter);
        if (lane + 32 * i < kExperts && near && choice[i] > neg_inf())
            sum += expf(choice[i] - top);
    }
    *weight = 1.0f / warp_sum(sum);
    return winner;
}

// Top-k of choice; lane j of the result holds the j-th id (-1 from k on).
__device__ __forceinline__ int warp_topk(const float (&choice)[kPerLane]) {
    const int lane = threadIdx.x % 32;
    unsigned taken = 0;
    int mine = -1;
    for (int j = 0; j < kTopK; j++) {
        int e = warp_argmax<kPerLane>(choice, taken, kExperts);
        if (e % 32 == lane)
            taken |= 1u << (e / 32);
        if (j == lane)
            mine = e;
    }
    return mine;
}

// The score of each lane's own id out of the warp's scores.
__device__ __forceinline__ float warp_gather(const float (&score)[kPerLane], int mine) {
    float w = 0.0f;
    for (int j = 0; j < kTopK; j++) {
        float s = warp_pick<kPerLane>(score, __shfl_sync(kFullMask, mine, j));
        if (j == static_cast<int>(threadIdx.x % 32))
            w = s;
    }
    return w;
}

// Chooses for one token: lane j returns the j-th id in *id and its weight in *weight. Destroys
// logit.
__device__ __forceinline__ void route_scores(const moe_args &a, float (&logit)[kPerLane],
                                             int *id, float *weight) {
    const int lane = threadIdx.x % 32;
    const moe_params &p = a.params;
    const bool mine = lane < kTopK;
    float w = 0.0f;
    int e = -1;
    if (a.router_bias && !a.logits_in)
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            if (lane + 32 * i < kExperts)
                logit[i] += a.router_bias[lane + 32 * i];
    if (p.logits_bf16)
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            logit[i] = to_float(to_bf16(logit[i]));
    if (kRouter == MOE_ROUTER_SPARSE_MIXER) {
        float first_weight, second_weight, choice[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            choice[i] = logit[i];
        unsigned taken = 0;
        int first = sparse_mixer_step(p.jitter, logit, choice, taken, &first_weight);
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
            if (lane + 32 * i == first) {
                choice[i] = neg_inf();
                taken = 1u << i;
            }
        int second = sparse_mixer_step(p.jitter, logit, choice, taken, &second_weight);
        e = lane == 0 ? first : second;
        w = lane == 0 ? first_weight : second_weight;
    } else if (kRouter == MOE_ROUTER_LLAMA4) {
        e = warp_topk(logit);
        w = 1.0f / (1.0f + expf(-warp_gather(logit, e)));
    } else if (kRouter == MOE_ROUTER_TOPK_SOFTMAX || (kRouter == MOE_ROUTER_SOFTMAX_TOPK)) {
        e = warp_topk(logit);
        float top = warp_gather(logit, e), best = __shfl_sync(kFullMask, top, 0);
        w = expf(top - best);
        if (kRouter == MOE_ROUTER_TOPK_SOFTMAX || p.norm_topk)
            // Softmax over all, renormalised over the k, is softmax over the k.
            w /= warp_sum(mine ? w : 0.0f);
        else
            w /= softmax_terms(logit);
        w *= p.scale;
    } else { // deepseek_v3, minimax2: scores choose with a bias, weigh without it
        float choice[kPerLane];
        float sum = p.sigmoid ? 1.0f : softmax_terms(logit);
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            logit[i] = p.sigmoid ? 1.0f / (1.0f + expf(-logit[i])) : logit[i] / sum;
            choice[i] = logit[i];
            if (a.correction_bias && lane + 32 * i < kExperts)
                choice[i] += a.correction_bias[lane + 32 * i];
        }
        if (kGroups > 1)
            keep_best_groups(p, choice);
        e = warp_topk(choice);
        w = warp_gather(logit, e);
        if (p.norm_topk)
            w /= warp_sum(mine ? w : 0.0f) + 1e-20f;
        w *= p.scale;
    }
    *id = e;
    *weight = w;
}

// Routes token t, by one warp. `logit` has this lane's experts.
__device__ __forceinline__ void route_token(const moe_args &a, int t,
                                            float (&logit)[kPerLane]) {
    const int lane = threadIdx.x % 32;
    int id;
    float weight;
    if (kRouter == MOE_ROUTER_STATIC) {
        id = a.static_experts[lane < kTopK ? lane : 0];
        weight = 1.0f;
    } else if (kRouter == MOE_ROUTER_BALANCED) {
        id = static_cast<int>((static_cast<long long>(t) * kTopK + lane) % kExperts);
        weight = 1.0f;
    } else {
        route_scores(a, logit, &id, &weight);
    }
    if (lane < kTopK) {
        a.topk_idx[static_cast<long long>(t) * kTopK + lane] = id;
        a.topk_weight[static_cast<long long>(t) * kTopK + lane] = weight;
    }
    __syncwarp();
}

// From the caller's logits, or from none (static, balanced). One warp per token.
template <int>
__global__ void __launch_bounds__(128) moe_route(const __grid_constant__ moe_args a) {
    launch_next();
    const int lane = threadIdx.x % 32;
    const int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (t >= a.num_tokens)
        return;
    float logit[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
        int e = lane + 32 * i;
        long long at = static_cast<long long>(t) * kExperts + e;
        logit[i] = 0.0f;
        if (a.logits_in != nullptr && e < kExperts)
            logit[i] = a.flags & MOE_LOGITS_BF16
                           ? to_float(static_cast<const bf16 *>(a.logits_in)[at])
                           : static_cast<const float *>(a.logits_in)[at];
    }
    route_token(a, t, logit);
}

template <int V> struct router_shape;
#define X(id, tokens, experts, split) \
    template <> struct router_shape<id> { \
        static constexpr int kTokens = tokens, kCols = experts, kSplit = split; \
    };
MOE_ROUTER_VARIANTS(X)
#undef X

constexpr int kSlice = 32; // K per step

// Eight consecutive elements of a row, as fp32; zeros where !valid.
__device__ __forceinline__ void load8(const void *base, long long at, bool fp32, bool valid,
                                      float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = 0.0f;
    if (!valid)
        return;
    if (fp32) {
        const float4 *p =
            reinterpret_cast<const float4 *>(static_cast<const float *>(base) + at);
        float4 lo = p[0], hi = p[1];
        v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
        v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
    } else {
        uint4 p = *reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(base) + at);
        v[0] = bf16_lo(p.x), v[1] = bf16_hi(p.x), v[2] = bf16_lo(p.y), v[3] = bf16_hi(p.y);
        v[4] = bf16_lo(p.z), v[5] = bf16_hi(p.z), v[6] = bf16_lo(p.w), v[7] = bf16_hi(p.w);
    }
}

// grid (ceil(T/kTokens), ceil(E/kCols), kSplit), 128 threads. Shared memory: two slices of x and
// of the weights, K-major: [2][kSlice][kTokens + kCols] fp32.
template <int V>
__global__ void __launch_bounds__(128) moe_router(const __grid_constant__ moe_args a) {
    launch_next();
    typedef router_shape<V> S;
    constexpr int TM = S::kTokens, TE = S::kCols, ROWS = TM + TE;
    constexpr int RE = TE >= 64 ? 4 : 1, RM = TM * TE / (128 * RE); // per thread
    constexpr int LOADS = (ROWS * kSlice / 8 + 127) / 128;
    const int tid = threadIdx.x, lane = tid % 32;
    const int col = tid % (TE / RE), row = tid / (TE / RE);
    const int t0 = blockIdx.x * TM, e0 = blockIdx.y * TE;
    const int slices = (kHidden + kSlice - 1) / kSlice;
    const int per_split = (slices + S::kSplit - 1) / S::kSplit;
    const int first = blockIdx.z * per_split;
    const int last = min(first + per_split, slices);
    float *smem = dyn_smem<float>();
    float stage[LOADS][8], sum[RM][RE] = {}, part[RM][RE];

    // Row r of a slice: token t0 + r, or expert e0 + r - TM.
    auto load = [&](int slice) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            int unit = tid + 128 * i, r = unit / (kSlice / 8);
            int k = slice * kSlice + unit % (kSlice / 8) * 8;
            bool token = r < TM;
            int from = token ? t0 + r : e0 + r - TM;
            bool valid = r < ROWS && k < kHidden && from < (token ? a.num_tokens : kExperts);
            load8(token ? a.x : a.router_weight, static_cast<long long>(from) * kHidden + k,
                  a.flags & (token ? MOE_X_FP32 : MOE_ROUTER_FP32), valid, stage[i]);
        }
    };
    auto store = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            int unit = tid + 128 * i, r = unit / (kSlice / 8), k = unit % (kSlice / 8) * 8;
            if (r < ROWS)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    smem[(buffer * kSlice + k + j) * ROWS + r] = stage[i][j];
        }
    };
    if (first < last)
        load(first);
    for (int slice = first; slice < last; slice++) {
        const int buffer = slice & 1;
        store(buffer);
        __syncthreads();
        if (slice + 1 < last)
            load(slice + 1);
#pragma unroll
        for (int m = 0; m < RM; m++)
#pragma unroll
            for (int n = 0; n < RE; n++)
                part[m][n] = 0.0f;
#pragma unroll 8
        for (int k = 0; k < kSlice; k++) {
            const float *at = smem + (buffer * kSlice + k) * ROWS;
            float x[RM], w[RE];
#pragma unroll
            for (int m = 0; m < RM; m++)
                x[m] = at[row * RM + m];
#pragma unroll
            for (int n = 0; n < RE; n++)
                w[n] = at[TM + col * RE + n];
#pragma unroll
            for (int m = 0; m < RM; m++)
#pragma unroll
                for (int n = 0; n < RE; n++)
                    part[m][n] = fmaf(x[m], w[n], part[m][n]);
        }
#pragma unroll
        for (int m = 0; m < RM; m++)
#pragma unroll
            for (int n = 0; n < RE; n++)
                sum[m][n] += part[m][n];
    }

    float *logits = static_cast<float *>(a.ws[MOE_WS_LOGITS]);
    const long long plane = static_cast<long long>(a.num_tokens) * kExperts;
#pragma unroll
    for (int m = 0; m < RM; m++)
#pragma unroll
        for (int n = 0; n < RE; n++) {
            int t = t0 + row * RM + m, e = e0 + col * RE + n;
            if (t < a.num_tokens && e < kExperts)
                logits[blockIdx.z * plane + static_cast<long long>(t) * kExperts + e] =
                    sum[m][n];
        }

    // The tile's last block goes on; it leaves the counter at zero for the next launch.
    int *arrived = static_cast<int *>(a.ws[MOE_WS_SYNC]) + blockIdx.x;
    int *is_last = dyn_smem<int>();
    __threadfence();
    __syncthreads();
    if (tid == 0) {
        *is_last = atomicAdd(arrived, 1) == static_cast<int>(gridDim.y * gridDim.z) - 1;
        if (*is_last)
            *arrived = 0;
    }
    __syncthreads();
    if (!*is_last)
        return;
    __threadfence();
    for (int t = t0 + tid / 32; t < min(t0 + TM, a.num_tokens); t += 4) {
        float logit[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            int e = lane + 32 * i;
            long long at = static_cast<long long>(t) * kExperts + e;
            logit[i] = 0.0f;
            if (e < kExperts) {
                for (int s = 0; s < S::kSplit; s++)
                    logit[i] += load_cg(logits + s * plane + at);
                logits[at] = logit[i];
            }
        }
        route_token(a, t, logit);
    }
}
