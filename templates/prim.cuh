// The machine's primitives, and the only file that holds asm or knows about the host target.
//
// Templates are written in CUDA's own words (threadIdx, __syncthreads, __shfl_xor_sync, atomicAdd,
// ...) plus the wrappers below. The host target gives every one of them a meaning on the CPU.
// Shared memory is dynamic only: dyn_smem<T>() as a pointer, smem_base() as the 32-bit address
// that cp_async16 and ldmatrix take.
#pragma once

#if defined(__CUDACC__)

typedef unsigned long long moe_u64;
struct alignas(2) bf16 {
    unsigned short bits;
};

extern __shared__ __align__(1024) unsigned char moe_smem[];

template <class T> __device__ __forceinline__ T *dyn_smem() {
    return reinterpret_cast<T *>(moe_smem);
}
__device__ __forceinline__ unsigned smem_base() {
    return static_cast<unsigned>(__cvta_generic_to_shared(moe_smem));
}

__device__ __forceinline__ float to_float(bf16 v) {
    return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
__device__ __forceinline__ float bf16_lo(unsigned v) {
    return __uint_as_float(v << 16);
}
__device__ __forceinline__ float bf16_hi(unsigned v) {
    return __uint_as_float(v & 0xffff0000u);
}

// Two floats rounded to nearest even; lo in the low half.
__device__ __forceinline__ unsigned pack_bf16(float lo, float hi) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
__device__ __forceinline__ bf16 to_bf16(float v) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

// 16 bytes from global to shared memory, asynchronously; zeros when !valid (src is not read).
__device__ __forceinline__ void cp_async16(unsigned dst, const void *src, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most N of this thread's latest groups are still under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four (two) 8x8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], unsigned addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(addr)
                 : "memory");
}

// c[16x8] += a[16x16] b[16x8]: bf16 in, fp32 accumulation.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A value written by another block of this launch: read past the first-level cache.
__device__ __forceinline__ float load_cg(const float *p) {
    return __ldcg(p);
}

// Closes a source: on the host it exports the kernels by name, on a GPU NVRTC's name expressions
// pick them.
#define MOE_EXPORT(KERNELS)

#else
#error "host target"
#endif
