// Random tensors for tests and benchmarks (moe_random_value in args.h).
#pragma once

// fill[i] = random value i * fill_scale, fp32 or rounded to bf16. Any grid.
template <int>
__global__ void __launch_bounds__(256) moe_random(const __grid_constant__ moe_args a) {
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
         i < a.fill_count; i += static_cast<long long>(gridDim.x) * blockDim.x) {
        float v = moe_random_value(a.seed, i) * a.fill_scale;
        if (a.fill_fp32)
            static_cast<float *>(a.fill)[i] = v;
        else
            static_cast<bf16 *>(a.fill)[i] = to_bf16(v);
    }
}
