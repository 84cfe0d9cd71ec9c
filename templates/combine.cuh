// Combine: out[t] = sum over j of topk_weight[t][j] * y[row of (t, j)], j ascending whatever the
// placement, then the shared expert, all in fp32, rounded once. And the conversion of fp32 x.
#pragma once

// v[i] += scale * the eight bf16 at p.
__device__ __forceinline__ void add8(float (&v)[8], const bf16 *p, float scale) {
    uint4 u = *reinterpret_cast<const uint4 *>(p);
    v[0] = fmaf(scale, bf16_lo(u.x), v[0]), v[1] = fmaf(scale, bf16_hi(u.x), v[1]);
    v[2] = fmaf(scale, bf16_lo(u.y), v[2]), v[3] = fmaf(scale, bf16_hi(u.y), v[3]);
    v[4] = fmaf(scale, bf16_lo(u.z), v[4]), v[5] = fmaf(scale, bf16_hi(u.z), v[5]);
    v[6] = fmaf(scale, bf16_lo(u.w), v[6]), v[7] = fmaf(scale, bf16_hi(u.w), v[7]);
}

// sigmoid(x . gate) of the shared expert, by each warp for itself.
__device__ __forceinline__ float shared_gate(const moe_args &a, long long token) {
    float sum = 0.0f;
    for (int c = threadIdx.x % 32 * 8; c < kHidden; c += 256) {
        float x[8];
        load8(a.x, token * kHidden + c, a.flags & MOE_X_FP32, true, x);
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum = fmaf(x[i], a.shared_gate[c + i], sum);
    }
    return 1.0f / (1.0f + expf(-warp_sum(sum)));
}

// Columns c .. c + 7 of a token whose k rows are row_of.
__device__ __forceinline__ void combine8(const moe_args &a, const int *row_of, long long token,
                                         int c, float gate) {
    const float *weight = a.topk_weight + token * kTopK;
    const bf16 *y = static_cast<const bf16 *>(a.ws[MOE_WS_Y]);
    const bf16 *sy = static_cast<const bf16 *>(a.ws[MOE_WS_SY]);
    float v[8] = {};
#pragma unroll 8
    for (int j = 0; j < kTopK; j++) {
        int row = row_of[j];
        if (row >= 0)
            add8(v, y + static_cast<long long>(row) * kHidden + c,
                 kInputWeight || a.flags & MOE_SUMMED ? 1.0f : weight[j]);
    }
    if (kSharedInter)
        add8(v, sy + token * kHidden + c, gate);
    if (a.flags & MOE_OUT_FP32) {
        float4 *out =
            reinterpret_cast<float4 *>(static_cast<float *>(a.out) + token * kHidden + c);
        out[0] = make_float4(v[0], v[1], v[2], v[3]);
        out[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        *reinterpret_cast<uint4 *>(static_cast<bf16 *>(a.out) + token * kHidden + c) =
            make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                       pack_bf16(v[6], v[7]));
    }
}

// grid (T, any): one token per blockIdx.x, eight columns per thread at a time.
template <int>
__global__ void __launch_bounds__(256) moe_combine(const __grid_constant__ moe_args a) {
    const long long token = blockIdx.x;
    launch_next();
    launch_wait();
    const int *row_of = static_cast<const int *>(a.ws[MOE_WS_ROW_OF]) + token * kTopK;
    const float gate = kSharedInter && a.shared_gate ? shared_gate(a, token) : 1.0f;
    for (int c = (blockIdx.y * blockDim.x + threadIdx.x) * 8; c < kHidden;
         c += gridDim.y * blockDim.x * 8)
        combine8(a, row_of, token, c, gate);
}

// ws[X16] = bf16 of fp32 x. Any grid.
template <int>
__global__ void __launch_bounds__(256) moe_convert(const __grid_constant__ moe_args a) {
    uint4 *out = static_cast<uint4 *>(a.ws[MOE_WS_X16]);
    const long long chunks = static_cast<long long>(a.num_tokens) * kHidden / 8;
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
         i < chunks; i += static_cast<long long>(gridDim.x) * blockDim.x) {
        float v[8];
        load8(a.x, i * 8, true, true, v);
        out[i] = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                            pack_bf16(v[6], v[7]));
    }
}
