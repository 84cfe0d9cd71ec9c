// Activations as e4m3 with one fp32 scale per 128 columns of a row (fp8 records only): x once per
// token, before it is spread over experts, and what comes out of the first grouped GEMM.
//
// scale = max |v| / 448; e4m3 = v / scale, rounded to nearest even. A NaN or an infinity spoils its
// own block: the scale becomes NaN or infinite, and so does what the block adds to its row.
#pragma once

// Four consecutive elements of a row, as fp32; zeros where !valid.
__device__ __forceinline__ void load4(const void *base, long long at, bool fp32, bool valid,
                                      float (&v)[4]) {
    v[0] = v[1] = v[2] = v[3] = 0.0f;
    if (valid && fp32) {
        float4 p = *reinterpret_cast<const float4 *>(static_cast<const float *>(base) + at);
        v[0] = p.x, v[1] = p.y, v[2] = p.z, v[3] = p.w;
    } else if (valid) {
        uint2 p = *reinterpret_cast<const uint2 *>(static_cast<const bf16 *>(base) + at);
        v[0] = bf16_lo(p.x), v[1] = bf16_hi(p.x), v[2] = bf16_lo(p.y), v[3] = bf16_hi(p.y);
    }
}

// |v| as a number that compares as it does; a NaN is larger than all numbers.
__device__ __forceinline__ unsigned magnitude(float v) {
    return __float_as_uint(v) & 0x7fffffffu;
}
// Of a block whose largest magnitude is `top`.
__device__ __forceinline__ float scale_of(unsigned top) {
    const float scale = __uint_as_float(top) / MOE_E4M3_MAX;
    return scale < MOE_SCALE_MIN ? MOE_SCALE_MIN : scale; // NaN stays
}

// A warp's block of 128 columns, four a lane, as e4m3 to `to` (null for lanes beyond the row). Returns
// its scale.
__device__ __forceinline__ float quant4(const float (&v)[4], unsigned *to) {
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        top = max(top, magnitude(v[i]));
    for (int d = 16; d > 0; d /= 2)
        top = max(top, __shfl_xor_sync(0xffffffffu, top, d));
    const float scale = scale_of(top);
    if (to)
        *to = pack_e4m3(v[0] / scale, v[1] / scale, v[2] / scale, v[3] / scale);
    return scale;
}

// Of: 0 x, 1 hidden activations, 2 the shared expert's. One warp per block of 128 columns. Any
// grid.
template <int Of>
__global__ void __launch_bounds__(256) moe_quant(const __grid_constant__ moe_args a) {
    launch_next();
    launch_wait();
    const int width = Of == 0 ? kHidden : Of == 1 ? kInter : kSharedInter;
    const unsigned blocks = (width + MOE_SCALE_BLOCK - 1) / MOE_SCALE_BLOCK;
    const void *from = Of == 0 ? a.x : a.ws[Of == 1 ? MOE_WS_HID : MOE_WS_SHID];
    const bool fp32 = Of != 0 || (a.flags & MOE_X_FP32);
    unsigned *to = static_cast<unsigned *>(a.ws[Of == 0   ? MOE_WS_X8
                                                : Of == 1 ? MOE_WS_HID8
                                                          : MOE_WS_SHID8]);
    float *scales = static_cast<float *>(a.ws[Of == 0   ? MOE_WS_XS
                                              : Of == 1 ? MOE_WS_HIDS
                                                        : MOE_WS_SHIDS]);
    const unsigned rows =
        Of == 1 ? static_cast<const int *>(a.ws[MOE_WS_OFFSETS])[a.params.slots] : a.num_tokens;
    const int lane = threadIdx.x % 32;
    // 2^32 blocks would be 512 GB.
    for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) / 32; i < rows * blocks;
         i += gridDim.x * blockDim.x / 32) {
        const int col = static_cast<int>(i % blocks) * MOE_SCALE_BLOCK + lane * 4;
        const long long at = static_cast<long long>(i / blocks) * width + col;
        float v[4];
        load4(from, at, fp32, col < width, v);
        const float scale = quant4(v, col < width ? to + at / 4 : nullptr);
        if (lane == 0)
            scales[i] = scale;
    }
}
