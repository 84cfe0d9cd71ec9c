// Random tensors for tests and benchmarks (moe_random_value in args.h).
#pragma once

// fill[i] = random value i * fill_scale in the form that fill_kind says. Any grid.
template <int>
__global__ void __launch_bounds__(256) moe_random(const __grid_constant__ moe_args a) {
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
         i < a.fill_count; i += static_cast<long long>(gridDim.x) * blockDim.x) {
        float v = moe_random_value(a.seed, i);
        if (a.fill_kind == MOE_FILL_FP32)
            static_cast<float *>(a.fill)[i] = v * a.fill_scale;
        else if (a.fill_kind == MOE_FILL_BF16)
            static_cast<bf16 *>(a.fill)[i] = to_bf16(v * a.fill_scale);
        else if (a.fill_kind == MOE_FILL_E4M3)
            static_cast<unsigned char *>(a.fill)[i] = to_e4m3(v * MOE_FILL_E4M3_UNIT);
        else
            static_cast<float *>(a.fill)[i] = moe_random_scale(a.seed, i) * a.fill_scale;
    }
}
