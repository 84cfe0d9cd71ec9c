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
__device__ __forceinline__ void cp_async4(unsigned dst, const void *src) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
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

// Four floats as e4m3, rounded to nearest even, beyond 448 to 448; the first in the low byte.
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ unsigned pack_e4m3(float v0, float v1, float v2, float v3) {
    unsigned short lo, hi;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(lo) : "f"(v1), "f"(v0));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(hi) : "f"(v3), "f"(v2));
    return lo | static_cast<unsigned>(hi) << 16;
}
#else
#define MOE_E4M3_BY_HAND
#endif

// c[16x8] += a[16x32] b[32x8]: e4m3 in, fp32 accumulation. Fragments as ldmatrix reads them from
// rows of bytes. Hopper and the large Blackwells take e4m3 only in their wider instructions; what
// mma.sync is made into there adds up apart from c, so that fp16 is used as on sm_80.
#if __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
__device__ __forceinline__ void mma_e4m3(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
// Two of four e4m3 as fp16. By hand: the bits in fp16's places, then the exponent's bias put right
// by a product, which is exact. A NaN becomes 480: what brings NaN here has it in its scale, too.
template <int Pair> __device__ __forceinline__ unsigned widen_e4m3(unsigned v) {
    unsigned r;
#if __CUDA_ARCH__ >= 890
    unsigned short pair = static_cast<unsigned short>(v >> 16 * Pair);
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
#else
    unsigned t = __byte_perm(v, 0, Pair ? 0x3424 : 0x1404);
    t = (t & 0x80008000u) | (t & 0x7f007f00u) >> 1;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(t), "r"(0x5c005c00u)); // x 256
#endif
    return r;
}
template <int Pair>
__device__ __forceinline__ void mma_e4m3_pair(float (&c)[4], const unsigned (&a)[4],
                                              unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(widen_e4m3<Pair>(a[0])), "r"(widen_e4m3<Pair>(a[1])), "r"(widen_e4m3<Pair>(a[2])),
          "r"(widen_e4m3<Pair>(a[3])), "r"(widen_e4m3<Pair>(b0)), "r"(widen_e4m3<Pair>(b1)));
}
// Two products of 16 along K: bytes 0 and 1 of every word, then 2 and 3. Which of K's places they
// count as is the same for a and b.
__device__ __forceinline__ void mma_e4m3(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    mma_e4m3_pair<0>(c, a, b0, b1);
    mma_e4m3_pair<1>(c, a, b0, b1);
}
#endif

// A value written by another block of this launch: read past the first-level cache.
__device__ __forceinline__ float load_cg(const float *p) {
    return __ldcg(p);
}

// Flags between ranks. A release.sys store makes visible to the peer that acquires it whatever
// this block wrote before its last barrier, and what other blocks wrote before they added to a
// counter (atomic_add_acq_rel) whose last value this block has seen.
__device__ __forceinline__ void store_release_sys(moe_u64 *p, moe_u64 v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ moe_u64 load_acquire_sys(const moe_u64 *p) {
    moe_u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ int atomic_add_acq_rel(int *p, int v) {
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}
// Words that the host, or another block, writes while this one looks.
__device__ __forceinline__ int load_relaxed_sys(const int *p) {
    int v;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_release_sys(int *p, int v) {
    asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Nanoseconds since some moment, and a moment's pause for who polls.
__device__ __forceinline__ moe_u64 clock_ns() {
    moe_u64 v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v)::"memory");
    return v;
}
__device__ __forceinline__ void pause_poll() {
    __nanosleep(20);
}

// ---- Hopper: mbarriers, TMA, warpgroup products (sm_90a); templates/hopper.cuh alone uses them ----

// A tensor map as the driver encodes it.
struct alignas(64) moe_map {
    moe_u64 words[16];
};

// Barriers lie in shared memory and go by address. A phase ends when `count` arrivals and all bytes
// announced are there; waiting for parity p of a barrier whose phase p has ended returns at once.
__device__ __forceinline__ void barrier_init(unsigned bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(unsigned bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
// Arrives when this thread's cp.asyncs so far are there.
__device__ __forceinline__ void barrier_arrive_copies(unsigned bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned bar, unsigned parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}

// The same place in the shared memory of a block of the cluster.
__device__ __forceinline__ unsigned cluster_address(unsigned addr, int rank) {
    unsigned r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
    return r;
}
// Without the cluster's memory order, which would wait for all that this thread has under way: what
// the tensor cores have read may be overwritten.
__device__ __forceinline__ void barrier_free_cluster(unsigned bar, int rank) {
    asm volatile(
        "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(bar, rank))
        : "memory");
}
__device__ __forceinline__ void barrier_arrive_cluster(unsigned bar, int rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     cluster_address(bar, rank))
                 : "memory");
}
__device__ __forceinline__ void barrier_wait_cluster(unsigned bar, unsigned parity) {
    asm volatile(
        "{.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again;}" ::"r"(bar),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void store_cluster(unsigned addr, int rank, int v) {
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(cluster_address(addr, rank)), "r"(v)
                 : "memory");
}
__device__ __forceinline__ unsigned smem_address(const void *p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// Among all threads of a cluster.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// A box of a map's tensor to shared memory, coordinates innermost first; its bytes count for bar.
__device__ __forceinline__ void tma_load(unsigned dst, const moe_map *map, int c0, int c1,
                                         int c2, unsigned bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar)
        : "memory");
}
// The same to this address in both blocks of a cluster, whose bytes count for bar of each.
__device__ __forceinline__ void tma_load_cluster(unsigned dst, const moe_map *map, int c0,
                                                 int c1, int c2, unsigned bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar), "h"(static_cast<short>(3))
        : "memory");
}
__device__ __forceinline__ void tma_prefetch_map(const moe_map *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What this thread knows to be in shared memory, the tensor cores see too.
__device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile of rows of 128 bytes, 16-byte chunks permuted by the row's low three bits; 1024-aligned.
__device__ __forceinline__ moe_u64 wgmma_descriptor(unsigned addr) {
    return (static_cast<moe_u64>(addr & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Operands of a product of N weight rows: %0 and %1 descriptors, %2 whether to add, N / 2 sums.
#define MOE_EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
        "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOE_LIST1 "%3,%4,%5,%6,%7,%8,%9,%10"
#define MOE_LIST2 MOE_LIST1 ",%11,%12,%13,%14,%15,%16,%17,%18"
#define MOE_LIST3 MOE_LIST2 ",%19,%20,%21,%22,%23,%24,%25,%26"
#define MOE_LIST4 MOE_LIST3 ",%27,%28,%29,%30,%31,%32,%33,%34"
#define MOE_LIST5 MOE_LIST4 ",%35,%36,%37,%38,%39,%40,%41,%42"
#define MOE_LIST6 MOE_LIST5 ",%43,%44,%45,%46,%47,%48,%49,%50"
#define MOE_LIST7 MOE_LIST6 ",%51,%52,%53,%54,%55,%56,%57,%58"
#define MOE_LIST8 MOE_LIST7 ",%59,%60,%61,%62,%63,%64,%65,%66"
#define MOE_LIST9 MOE_LIST8 ",%67,%68,%69,%70,%71,%72,%73,%74"
#define MOE_LIST10 MOE_LIST9 ",%75,%76,%77,%78,%79,%80,%81,%82"
#define MOE_LIST11 MOE_LIST10 ",%83,%84,%85,%86,%87,%88,%89,%90"
#define MOE_LIST12 MOE_LIST11 ",%91,%92,%93,%94,%95,%96,%97,%98"
#define MOE_LIST13 MOE_LIST12 ",%99,%100,%101,%102,%103,%104,%105,%106"
#define MOE_LIST14 MOE_LIST13 ",%107,%108,%109,%110,%111,%112,%113,%114"
#define MOE_LIST15 MOE_LIST14 ",%115,%116,%117,%118,%119,%120,%121,%122"
#define MOE_LIST16 MOE_LIST15 ",%123,%124,%125,%126,%127,%128,%129,%130"
#define MOE_ACC1(d) MOE_EIGHT(d, 0)
#define MOE_ACC2(d) MOE_ACC1(d), MOE_EIGHT(d, 8)
#define MOE_ACC3(d) MOE_ACC2(d), MOE_EIGHT(d, 16)
#define MOE_ACC4(d) MOE_ACC3(d), MOE_EIGHT(d, 24)
#define MOE_ACC5(d) MOE_ACC4(d), MOE_EIGHT(d, 32)
#define MOE_ACC6(d) MOE_ACC5(d), MOE_EIGHT(d, 40)
#define MOE_ACC7(d) MOE_ACC6(d), MOE_EIGHT(d, 48)
#define MOE_ACC8(d) MOE_ACC7(d), MOE_EIGHT(d, 56)
#define MOE_ACC9(d) MOE_ACC8(d), MOE_EIGHT(d, 64)
#define MOE_ACC10(d) MOE_ACC9(d), MOE_EIGHT(d, 72)
#define MOE_ACC11(d) MOE_ACC10(d), MOE_EIGHT(d, 80)
#define MOE_ACC12(d) MOE_ACC11(d), MOE_EIGHT(d, 88)
#define MOE_ACC13(d) MOE_ACC12(d), MOE_EIGHT(d, 96)
#define MOE_ACC14(d) MOE_ACC13(d), MOE_EIGHT(d, 104)
#define MOE_ACC15(d) MOE_ACC14(d), MOE_EIGHT(d, 112)
#define MOE_ACC16(d) MOE_ACC15(d), MOE_EIGHT(d, 120)
#define MOE_WGMMA(N, TYPES, TRANSPOSED, LIST, ...) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0;" \
                 "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" LIST "}, " \
                 "%0, %1, p, 1, 1" TRANSPOSED ";}" \
                 : "+l"(a), "+l"(b), "+r"(add), __VA_ARGS__)

// d[64 x N] (+)= a[64 x 16] b[N x 16]^T of a warpgroup: bf16 in, fp32 accumulation; a and b are
// descriptors of shared memory. Lane l of warp w holds rows 16 w + l/4 and + 8, columns 8 j +
// 2 (l % 4) and + 1 in d[4 j .. 4 j + 3], as mma_bf16 does.
template <int N, int R>
__device__ __forceinline__ void wgmma_bf16(float (&d)[R], moe_u64 a, moe_u64 b, int add) {
    static_assert(N % 16 == 0 && R >= N / 2, "no such product");
    if constexpr (N == 16)
        MOE_WGMMA(16, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST1, MOE_ACC1(d));
    else if constexpr (N == 32)
        MOE_WGMMA(32, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST2, MOE_ACC2(d));
    else if constexpr (N == 48)
        MOE_WGMMA(48, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST3, MOE_ACC3(d));
    else if constexpr (N == 64)
        MOE_WGMMA(64, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST4, MOE_ACC4(d));
    else if constexpr (N == 80)
        MOE_WGMMA(80, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST5, MOE_ACC5(d));
    else if constexpr (N == 96)
        MOE_WGMMA(96, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST6, MOE_ACC6(d));
    else if constexpr (N == 112)
        MOE_WGMMA(112, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST7, MOE_ACC7(d));
    else if constexpr (N == 128)
        MOE_WGMMA(128, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST8, MOE_ACC8(d));
    else if constexpr (N == 144)
        MOE_WGMMA(144, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST9, MOE_ACC9(d));
    else if constexpr (N == 160)
        MOE_WGMMA(160, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST10, MOE_ACC10(d));
    else if constexpr (N == 176)
        MOE_WGMMA(176, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST11, MOE_ACC11(d));
    else if constexpr (N == 192)
        MOE_WGMMA(192, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST12, MOE_ACC12(d));
    else if constexpr (N == 208)
        MOE_WGMMA(208, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST13, MOE_ACC13(d));
    else if constexpr (N == 224)
        MOE_WGMMA(224, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST14, MOE_ACC14(d));
    else if constexpr (N == 240)
        MOE_WGMMA(240, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST15, MOE_ACC15(d));
    else if constexpr (N == 256)
        MOE_WGMMA(256, "k16.f32.bf16.bf16", ", 0, 0", MOE_LIST16, MOE_ACC16(d));
}
// The same of e4m3, 32 along K.
template <int N, int R>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[R], moe_u64 a, moe_u64 b, int add) {
    static_assert(N % 16 == 0 && R >= N / 2, "no such product");
    if constexpr (N == 16)
        MOE_WGMMA(16, "k32.f32.e4m3.e4m3", "", MOE_LIST1, MOE_ACC1(d));
    else if constexpr (N == 32)
        MOE_WGMMA(32, "k32.f32.e4m3.e4m3", "", MOE_LIST2, MOE_ACC2(d));
    else if constexpr (N == 48)
        MOE_WGMMA(48, "k32.f32.e4m3.e4m3", "", MOE_LIST3, MOE_ACC3(d));
    else if constexpr (N == 64)
        MOE_WGMMA(64, "k32.f32.e4m3.e4m3", "", MOE_LIST4, MOE_ACC4(d));
    else if constexpr (N == 80)
        MOE_WGMMA(80, "k32.f32.e4m3.e4m3", "", MOE_LIST5, MOE_ACC5(d));
    else if constexpr (N == 96)
        MOE_WGMMA(96, "k32.f32.e4m3.e4m3", "", MOE_LIST6, MOE_ACC6(d));
    else if constexpr (N == 112)
        MOE_WGMMA(112, "k32.f32.e4m3.e4m3", "", MOE_LIST7, MOE_ACC7(d));
    else if constexpr (N == 128)
        MOE_WGMMA(128, "k32.f32.e4m3.e4m3", "", MOE_LIST8, MOE_ACC8(d));
    else if constexpr (N == 144)
        MOE_WGMMA(144, "k32.f32.e4m3.e4m3", "", MOE_LIST9, MOE_ACC9(d));
    else if constexpr (N == 160)
        MOE_WGMMA(160, "k32.f32.e4m3.e4m3", "", MOE_LIST10, MOE_ACC10(d));
    else if constexpr (N == 176)
        MOE_WGMMA(176, "k32.f32.e4m3.e4m3", "", MOE_LIST11, MOE_ACC11(d));
    else if constexpr (N == 192)
        MOE_WGMMA(192, "k32.f32.e4m3.e4m3", "", MOE_LIST12, MOE_ACC12(d));
    else if constexpr (N == 208)
        MOE_WGMMA(208, "k32.f32.e4m3.e4m3", "", MOE_LIST13, MOE_ACC13(d));
    else if constexpr (N == 224)
        MOE_WGMMA(224, "k32.f32.e4m3.e4m3", "", MOE_LIST14, MOE_ACC14(d));
    else if constexpr (N == 240)
        MOE_WGMMA(240, "k32.f32.e4m3.e4m3", "", MOE_LIST15, MOE_ACC15(d));
    else if constexpr (N == 256)
        MOE_WGMMA(256, "k32.f32.e4m3.e4m3", "", MOE_LIST16, MOE_ACC16(d));
}

__device__ __forceinline__ void store_shared2(unsigned addr, unsigned v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(addr), "h"(static_cast<unsigned short>(v))
                 : "memory");
}
__device__ __forceinline__ void store_shared4(unsigned addr, unsigned v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(addr), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned load_shared4(unsigned addr) {
    unsigned v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_shared16(unsigned addr) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(addr)
                 : "memory");
    return v;
}

// A barrier among `threads` threads of the block, id 1 .. 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same without waiting for it.
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same; whether any thread's `p` is set.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool p) {
    int any;
    asm volatile("{.reg .pred p, q;\n"
                 "setp.ne.s32 p, %3, 0;\n"
                 "bar.red.or.pred q, %1, %2, p;\n"
                 "selp.s32 %0, 1, 0, q;}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"(static_cast<int>(p))
                 : "memory");
    return any;
}
// Registers per thread of this warpgroup from here on.
template <int N> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Counters in device memory that blocks of one launch tell each other by.
__device__ __forceinline__ void add_release(int *p, int v) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ int add_acq_rel(int *p, int v) { // what was there
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}
__device__ __forceinline__ int load_acquire(const int *p) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Programmatic dependent launch: until the launches before this one are done; lets the next begin.
__device__ __forceinline__ void launch_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Closes a source: on the host it exports the kernels by name, on a GPU NVRTC's name expressions
// pick them.
#define MOE_EXPORT(KERNELS)

#else // the host target: the same words on a CPU

// Each block's threads are fibers of one OS thread; blocks are spread over OS threads. A fiber runs
// until it meets a barrier or a warp collective that others have yet to reach. Faults are made to
// show: one warp runs as far ahead of the others as the barriers let it, and which one changes at
// every barrier; shared memory begins as NaN; a cp.async spoils its destination when issued and
// copies when waited for; shared addresses are checked. A fault ends the launch with a message.

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define MOE_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOE_HOST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define MOE_HOST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MOE_HOST_TSAN 1
#endif
#endif
#if defined(MOE_HOST_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MOE_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#define MOE_HOST_STACK_REGISTER(low, high) VALGRIND_STACK_REGISTER(low, high)
#define MOE_HOST_STACK_DEREGISTER(id) VALGRIND_STACK_DEREGISTER(id)
#else
#define MOE_HOST_STACK_REGISTER(low, high) 0
#define MOE_HOST_STACK_DEREGISTER(id) ((void)(id))
#endif

#pragma GCC visibility push(hidden)

#define __global__ static
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline float2 make_float2(float x, float y) {
    return {x, y};
}
static inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

namespace moe_host {

// ---- fibers ----

// Saves the callee-saved registers on the stack and its pointer at *from, and goes on at `to`.
extern "C" void moe_host_switch(void **from, void *to);
#if defined(__x86_64__)
asm(".text\n.hidden moe_host_switch\n.globl moe_host_switch\n"
    ".type moe_host_switch,@function\nmoe_host_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size moe_host_switch,.-moe_host_switch\n");
constexpr int kSavedWords = 7, kReturnWord = 6;
#elif defined(__aarch64__)
asm(".text\n.hidden moe_host_switch\n.globl moe_host_switch\n"
    ".type moe_host_switch,%function\nmoe_host_switch:\n"
    "sub sp, sp, #160\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\n"
    "stp d14, d15, [sp, #144]\nmov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\n"
    "ldp d14, d15, [sp, #144]\nadd sp, sp, #160\nret\n"
    ".size moe_host_switch,.-moe_host_switch\n");
constexpr int kSavedWords = 20, kReturnWord = 11;
#else
#error "the host target knows x86-64 and aarch64"
#endif

struct copy { // one cp.async under way
    unsigned to;
    const void *from;
    bool valid;
};

enum state { READY, AT_BARRIER, AT_WARP, DONE };

struct fiber {
    void *stack_pointer;
    unsigned char *stack;
    unsigned stack_id;
    enum state state;
    unsigned thread;
    std::vector<copy> copies;      // issued, not yet waited for
    std::vector<size_t> group_end; // copies of each committed group
    void *fake_stack, *tsan;
};

constexpr int kMaxThreads = 1024;
#if defined(MOE_HOST_ASAN) || defined(MOE_HOST_TSAN)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr unsigned kSmemBase = 1024; // shared addresses begin here, so that 0 is none
enum op { OP_SYNC, OP_SHUFFLE, OP_VOTE, OP_MATCH, OP_LDMATRIX, OP_MMA };

// Lanes of one mask that have reached one collective.
struct meeting {
    unsigned mask, arrived;
    enum op op;
    void *lane[32];
};

struct launch {
    const char *kernel;
    void (*run)(const moe_args);
    const moe_args *args;
    uint3 grid;
    unsigned block, smem;
    std::atomic<long long> next;
    std::atomic<bool> failed;
    char *error;
    unsigned error_bytes;
};

// One OS thread: the block it runs.
struct worker {
    struct launch *launch;
    uint3 block_index;
    fiber fibers[kMaxThreads];
    unsigned char *stacks; // one after the other
    fiber *self;
    void *scheduler; // its stack pointer
    void *scheduler_fake, *scheduler_tsan;
    const void *scheduler_stack;
    size_t scheduler_bytes;
    unsigned char *smem;
    unsigned at_barrier, phase;
    meeting meetings[kMaxThreads / 32][4];
};
static thread_local worker *here;

static void to_scheduler(bool last) {
    worker *w = here;
    fiber *f = w->self;
#if defined(MOE_HOST_ASAN)
    __sanitizer_start_switch_fiber(last ? nullptr : &f->fake_stack, w->scheduler_stack,
                                   w->scheduler_bytes);
#endif
    (void)last;
#if defined(MOE_HOST_TSAN)
    __tsan_switch_to_fiber(w->scheduler_tsan, 0);
#endif
    moe_host_switch(&f->stack_pointer, w->scheduler);
#if defined(MOE_HOST_ASAN)
    __sanitizer_finish_switch_fiber(f->fake_stack, &w->scheduler_stack, &w->scheduler_bytes);
#endif
}

static void to_fiber(worker *w, fiber *f) {
    w->self = f;
#if defined(MOE_HOST_ASAN)
    __sanitizer_start_switch_fiber(&w->scheduler_fake, f->stack, kStackBytes);
#endif
#if defined(MOE_HOST_TSAN)
    __tsan_switch_to_fiber(f->tsan, 0);
#endif
    moe_host_switch(&w->scheduler, f->stack_pointer);
#if defined(MOE_HOST_ASAN)
    __sanitizer_finish_switch_fiber(w->scheduler_fake, nullptr, nullptr);
#endif
}

// Ends the launch: the first message stays. Does not return to the kernel.
__attribute__((format(printf, 1, 2))) static void fault(const char *format, ...) {
    launch *l = here->launch;
    if (!l->failed.exchange(true)) {
        char text[256];
        va_list list;
        va_start(list, format);
        vsnprintf(text, sizeof text, format, list);
        va_end(list);
        snprintf(l->error, l->error_bytes, "%s, block (%u,%u,%u): %s", l->kernel,
                 here->block_index.x, here->block_index.y, here->block_index.z, text);
    }
    here->self->state = DONE;
    for (;;)
        to_scheduler(false);
}

static void fiber_main() {
#if defined(MOE_HOST_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &here->scheduler_stack, &here->scheduler_bytes);
#endif
    here->launch->run(*here->launch->args);
    here->self->state = DONE;
    for (;;)
        to_scheduler(true);
}

static void start(fiber *f, unsigned thread) {
    if (!f->stack) {
        f->stack = here->stacks + thread * kStackBytes;
        f->stack_id = MOE_HOST_STACK_REGISTER(f->stack, f->stack + kStackBytes);
    }
#if defined(MOE_HOST_TSAN)
    if (!f->tsan)
        f->tsan = __tsan_create_fiber(0);
#endif
    // After the switch has popped its words the stack is as if fiber_main had been called.
    uintptr_t top = reinterpret_cast<uintptr_t>(f->stack + kStackBytes) & ~uintptr_t(63);
    void **words = reinterpret_cast<void **>(top - 64) - (kSavedWords - kSavedWords % 2);
    memset(words, 0, kSavedWords * sizeof *words);
    words[kReturnWord] = reinterpret_cast<void *>(&fiber_main);
    f->stack_pointer = words;
    f->thread = thread;
    f->state = READY;
    f->copies.clear();
    f->group_end.clear();
}

static void stop(fiber *f) {
#if defined(MOE_HOST_TSAN)
    if (f->tsan)
        __tsan_destroy_fiber(f->tsan);
#endif
    if (f->stack)
        MOE_HOST_STACK_DEREGISTER(f->stack_id);
}

// Runs one warp until each of its lanes waits at a barrier or is done. True if any ran.
static bool run_warp(worker *w, unsigned warp) {
    const unsigned first = warp * 32,
                   last = first + 32 < w->launch->block ? first + 32 : w->launch->block;
    const unsigned phase = w->phase;
    bool any = false, again = true;
    while (again && !w->launch->failed && phase == w->phase) {
        again = false;
        for (unsigned i = first; i < last; i++) {
            fiber *f = &w->fibers[phase % 2 ? last - 1 - (i - first) : i];
            if (f->state != READY)
                continue;
            to_fiber(w, f);
            any = again = true;
        }
    }
    return any;
}

static void run_block(worker *w) {
    const unsigned threads = w->launch->block, warps = (threads + 31) / 32;
    memset(w->smem, 0xff, w->launch->smem);
    memset(w->meetings, 0, sizeof w->meetings);
    w->at_barrier = w->phase = 0;
    for (unsigned i = 0; i < threads; i++)
        start(&w->fibers[i], i);
    for (bool any = true; any && !w->launch->failed;) {
        any = false;
        // Which warp runs ahead changes with every barrier.
        const unsigned phase = w->phase;
        for (unsigned i = 0; i < warps && phase == w->phase; i++) {
            unsigned warp = (phase % 2 ? warps - 1 - i : i) + phase / 2;
            any = run_warp(w, warp % warps) || any;
        }
    }
    if (w->launch->failed)
        return;
    for (unsigned i = 0; i < threads; i++) {
        if (w->fibers[i].state == DONE)
            continue;
        if (!w->launch->failed.exchange(true))
            snprintf(w->launch->error, w->launch->error_bytes,
                     "%s, block (%u,%u,%u): thread %u waits at a %s that others never reach",
                     w->launch->kernel, w->block_index.x, w->block_index.y, w->block_index.z, i,
                     w->fibers[i].state == AT_BARRIER ? "barrier" : "warp collective");
    }
}

static void run_blocks(launch *l) {
    worker *w = new worker();
    here = w;
    w->launch = l;
    void *stacks = mmap(nullptr, l->block * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED)
        abort(); // no memory for a test's stacks: nothing to go on with
    w->stacks = static_cast<unsigned char *>(stacks);
    const size_t bytes = (l->smem + 1023) / 1024 * 1024 + 1024;
    w->smem = static_cast<unsigned char *>(aligned_alloc(1024, bytes));
#if defined(MOE_HOST_TSAN)
    w->scheduler_tsan = __tsan_get_current_fiber();
#endif
    for (long long i; (i = --l->next) >= 0 && !l->failed;) { // the last block first
        w->block_index = {static_cast<unsigned>(i % l->grid.x),
                          static_cast<unsigned>(i / l->grid.x % l->grid.y),
                          static_cast<unsigned>(i / l->grid.x / l->grid.y)};
        run_block(w);
    }
    for (fiber &f : w->fibers)
        stop(&f);
    munmap(w->stacks, l->block * kStackBytes);
    free(w->smem);
    delete w;
    here = nullptr;
}

// ---- barriers and warp collectives ----

static void barrier() {
    worker *w = here;
    w->self->state = AT_BARRIER;
    if (++w->at_barrier == w->launch->block) {
        w->at_barrier = 0;
        w->phase++;
        for (unsigned i = 0; i < w->launch->block; i++)
            w->fibers[i].state = READY;
    }
    to_scheduler(false);
}

// All lanes of mask meet; the last one calls meet(lane[32], mask) for all. `io` is the lane's own
// operands and results.
template <class F> static void together(enum op op, unsigned mask, void *io, F meet) {
    worker *w = here;
    const unsigned lane = w->self->thread % 32;
    meeting *m = nullptr, *list = w->meetings[w->self->thread / 32];
    if (!(mask >> lane & 1))
        fault("lane %u is not in its own mask %08x", lane, mask);
    for (int i = 0; i < 4 && !m; i++)
        if (list[i].arrived && list[i].mask == mask)
            m = &list[i];
    for (int i = 0; i < 4 && !m; i++)
        if (!list[i].arrived) {
            m = &list[i];
            m->mask = mask;
            m->op = op;
        }
    if (!m)
        fault("more than four warp collectives at a time");
    if (m->op != op)
        fault("lanes of warp %u are at different warp collectives", w->self->thread / 32);
    m->arrived |= 1u << lane;
    m->lane[lane] = io;
    w->self->state = AT_WARP;
    if (m->arrived == mask) {
        meet(m->lane, mask);
        m->arrived = 0;
        for (unsigned i = 0; i < 32; i++)
            if (mask >> i & 1)
                w->fibers[w->self->thread / 32 * 32 + i].state = READY;
    }
    to_scheduler(false);
}

template <class T> struct shuffle_io {
    T value, result;
    int from;
};
template <class T> static T shuffle(unsigned mask, T value, int from) {
    shuffle_io<T> io = {value, value, from};
    together(OP_SHUFFLE, mask, &io, [](void **lane, unsigned all) {
        for (int i = 0; i < 32; i++) {
            if (!(all >> i & 1))
                continue;
            auto *to = static_cast<shuffle_io<T> *>(lane[i]);
            if (!(all >> to->from & 1))
                fault("a shuffle reads lane %d, which takes no part", to->from);
            to->result = static_cast<shuffle_io<T> *>(lane[to->from])->value;
        }
    });
    return io.result;
}

// Bytes of shared memory at a shared address.
static unsigned char *shared(unsigned address, unsigned bytes) {
    const unsigned at = address - kSmemBase;
    if (address < kSmemBase || at + bytes > here->launch->smem)
        fault("shared address %u is outside the block's %u bytes", at, here->launch->smem);
    if (address % 16)
        fault("shared address %u is not 16-byte aligned", at);
    return here->smem + at;
}

static int launch_kernel(launch *l, int threads) {
    const long long blocks = static_cast<long long>(l->grid.x) * l->grid.y * l->grid.z;
    l->next = blocks;
    l->failed = false;
    if (threads > blocks)
        threads = static_cast<int>(blocks);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++)
        others.emplace_back(run_blocks, l);
    run_blocks(l);
    for (std::thread &t : others)
        t.join();
    return l->failed ? 1 : 0;
}

struct entry {
    const char *expression;
    void (*run)(const moe_args);
};

} // namespace moe_host

// ---- CUDA's words ----

#define threadIdx (uint3{moe_host::here->self->thread, 0, 0})
#define blockIdx (moe_host::here->block_index)
#define blockDim (uint3{moe_host::here->launch->block, 1, 1})
#define gridDim (moe_host::here->launch->grid)

static inline void __syncthreads() {
    moe_host::barrier();
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    moe_host::together(moe_host::OP_SYNC, mask, nullptr, [](void **, unsigned) {});
}
static inline void __threadfence() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

template <class T> static T __shfl_sync(unsigned mask, T v, int from) {
    return moe_host::shuffle(mask, v, from & 31);
}
template <class T> static T __shfl_xor_sync(unsigned mask, T v, int d) {
    return moe_host::shuffle(mask, v, static_cast<int>(threadIdx.x % 32) ^ d);
}
template <class T> static T __shfl_up_sync(unsigned mask, T v, unsigned d) {
    int lane = threadIdx.x % 32, from = lane - static_cast<int>(d);
    return moe_host::shuffle(mask, v, from < 0 ? lane : from);
}
static inline unsigned __match_any_sync(unsigned mask, int v) {
    struct io {
        int value;
        unsigned same;
    } mine = {v, 0};
    moe_host::together(moe_host::OP_MATCH, mask, &mine, [](void **lane, unsigned all) {
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 32; j++)
                if ((all >> i & 1) && (all >> j & 1) &&
                    static_cast<io *>(lane[i])->value == static_cast<io *>(lane[j])->value)
                    static_cast<io *>(lane[i])->same |= 1u << j;
    });
    return mine.same;
}
static inline int __any_sync(unsigned mask, int v) {
    const unsigned same = __match_any_sync(mask, v != 0);
    return v || same != mask;
}

static inline int atomicAdd(int *p, int v) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
static inline int min(int a, int b) {
    return a < b ? a : b;
}
static inline int max(int a, int b) {
    return a > b ? a : b;
}
#define __expf expf
static inline float __uint_as_float(unsigned v) {
    float f;
    memcpy(&f, &v, sizeof f);
    return f;
}
static inline unsigned __float_as_uint(float v) {
    unsigned u;
    memcpy(&u, &v, sizeof u);
    return u;
}

// ---- the wrappers of the device half ----

typedef unsigned long long moe_u64;
struct alignas(2) bf16 {
    unsigned short bits;
};
template <class T> static T *dyn_smem() {
    return reinterpret_cast<T *>(moe_host::here->smem);
}
static inline unsigned smem_base() {
    return moe_host::kSmemBase;
}
static inline float to_float(bf16 v) {
    return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
static inline float bf16_lo(unsigned v) {
    return __uint_as_float(v << 16);
}
static inline float bf16_hi(unsigned v) {
    return __uint_as_float(v & 0xffff0000u);
}
static inline bf16 to_bf16(float v) {
    unsigned u = __float_as_uint(v);
    if (v != v)
        return {0x7fff};
    return {static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline unsigned pack_bf16(float lo, float hi) {
    return to_bf16(lo).bits | static_cast<unsigned>(to_bf16(hi).bits) << 16;
}

static inline void cp_async16(unsigned to, const void *from, bool valid) {
    memset(moe_host::shared(to, 16), 0xff, 16);
    moe_host::here->self->copies.push_back({to, from, valid});
}
static inline void cp_async_commit() {
    moe_host::fiber *f = moe_host::here->self;
    f->group_end.push_back(f->copies.size());
}
template <int N> static void cp_async_wait() {
    moe_host::fiber *f = moe_host::here->self;
    if (f->group_end.size() <= N)
        return;
    const size_t groups = f->group_end.size() - N, done = f->group_end[groups - 1];
    for (size_t i = 0; i < done; i++) {
        unsigned char *to = moe_host::shared(f->copies[i].to, 16);
        if (f->copies[i].valid)
            memcpy(to, f->copies[i].from, 16);
        else
            memset(to, 0, 16);
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + done);
    f->group_end.erase(f->group_end.begin(), f->group_end.begin() + groups);
    for (size_t &end : f->group_end)
        end -= done;
}

template <int M> struct ldmatrix_io { unsigned address, r[M]; };
template <int M> static void ldmatrix(unsigned (&r)[M], unsigned address) {
    ldmatrix_io<M> io = {address, {}};
    moe_host::together(moe_host::OP_LDMATRIX, 0xffffffffu, &io, [](void **lane, unsigned) {
        for (int m = 0; m < M; m++)
            for (int l = 0; l < 32; l++) {
                auto *row = static_cast<ldmatrix_io<M> *>(lane[m * 8 + l / 4]);
                memcpy(&static_cast<ldmatrix_io<M> *>(lane[l])->r[m],
                       moe_host::shared(row->address, 16) + l % 4 * 4, 4);
            }
    });
    memcpy(r, io.r, sizeof io.r);
}
static inline void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    ldmatrix<4>(r, address);
}
static inline void ldmatrix_x2(unsigned (&r)[2], unsigned address) {
    ldmatrix<2>(r, address);
}

static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct io {
        float *c;
        const unsigned *a;
        unsigned b[2];
    } mine = {c, a, {b0, b1}};
    moe_host::together(moe_host::OP_MMA, 0xffffffffu, &mine, [](void **lane, unsigned) {
        float A[16][16], B[16][8], C[16][8] = {};
        for (int l = 0; l < 32; l++) {
            const io *p = static_cast<io *>(lane[l]);
            const int g = l / 4, q = l % 4 * 2;
            for (int i = 0; i < 4; i++) {
                A[g + i % 2 * 8][q + i / 2 * 8] = bf16_lo(p->a[i]);
                A[g + i % 2 * 8][q + i / 2 * 8 + 1] = bf16_hi(p->a[i]);
            }
            for (int i = 0; i < 2; i++) {
                B[q + i * 8][g] = bf16_lo(p->b[i]);
                B[q + i * 8 + 1][g] = bf16_hi(p->b[i]);
            }
        }
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 16; k++)
                for (int n = 0; n < 8; n++)
                    C[m][n] += A[m][k] * B[k][n];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++)
                static_cast<io *>(lane[l])->c[i] += C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    });
}

#define MOE_E4M3_BY_HAND
// One of the four e4m3 in a word.
static inline float e4m3_of(unsigned word, int i) {
    const unsigned b = word >> 8 * i & 0xff, e = b >> 3 & 15;
    const float m = static_cast<float>(b & 7);
    const float v = (b & 0x7f) == 0x7f ? NAN
                    : e                ? ldexpf(8 + m, static_cast<int>(e) - 10)
                                       : ldexpf(m, -9);
    return b & 0x80 ? -v : v;
}

static inline void mma_e4m3(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct io {
        float *c;
        const unsigned *a;
        unsigned b[2];
    } mine = {c, a, {b0, b1}};
    moe_host::together(moe_host::OP_MMA, 0xffffffffu, &mine, [](void **lane, unsigned) {
        float A[16][32], B[32][8], C[16][8] = {};
        for (int l = 0; l < 32; l++) {
            const io *p = static_cast<io *>(lane[l]);
            const int g = l / 4, q = l % 4 * 4;
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    A[g + i % 2 * 8][q + i / 2 * 16 + j] = e4m3_of(p->a[i], j);
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++)
                    B[q + i * 16 + j][g] = e4m3_of(p->b[i], j);
        }
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 32; k++)
                for (int n = 0; n < 8; n++)
                    C[m][n] += A[m][k] * B[k][n];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++)
                static_cast<io *>(lane[l])->c[i] += C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    });
}

// Hopper's own: only a GPU can run them, and templates/hopper.cuh is to be read here, too.
typedef unsigned long long moe_u64;
struct alignas(64) moe_map {
    moe_u64 words[16];
};
void barrier_init(unsigned bar, int count);
void barrier_init_fence();
void barrier_arrive(unsigned bar);
void barrier_arrive_cluster(unsigned bar, int rank);
void barrier_free_cluster(unsigned bar, int rank);
void barrier_arrive_copies(unsigned bar);
void barrier_expect(unsigned bar, int bytes);
void barrier_wait(unsigned bar, unsigned parity);
void barrier_wait_cluster(unsigned bar, unsigned parity);
void cluster_barrier();
void store_cluster(unsigned addr, int rank, int v);
unsigned smem_address(const void *p);
void tma_load(unsigned dst, const moe_map *map, int c0, int c1, int c2, unsigned bar);
void tma_load_cluster(unsigned dst, const moe_map *map, int c0, int c1, int c2, unsigned bar);
void tma_prefetch_map(const moe_map *map);
void fence_async_shared();
moe_u64 wgmma_descriptor(unsigned addr);
void wgmma_begin();
void wgmma_commit();
template <int N> void wgmma_wait();
template <int N, int R> void wgmma_bf16(float (&d)[R], moe_u64 a, moe_u64 b, int add);
template <int N, int R> void wgmma_e4m3(float (&d)[R], moe_u64 a, moe_u64 b, int add);
void store_shared2(unsigned addr, unsigned v);
void store_shared4(unsigned addr, unsigned v);
unsigned load_shared4(unsigned addr);
uint4 load_shared16(unsigned addr);
void cp_async4(unsigned dst, const void *src);
void named_barrier(int id, int threads);
void named_arrive(int id, int threads);
bool named_barrier_any(int id, int threads, bool p);
template <int N> void registers_down();
template <int N> void registers_up();
void add_release(int *p, int v);
int add_acq_rel(int *p, int v);
int load_acquire(const int *p);

static inline void launch_wait() {}
static inline void launch_next() {}

static inline float load_cg(const float *p) {
    return __uint_as_float(
        __atomic_load_n(reinterpret_cast<const unsigned *>(p), __ATOMIC_RELAXED));
}

static inline void store_release_sys(moe_u64 *p, moe_u64 v) {
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline void store_release_sys(int *p, int v) {
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline moe_u64 load_acquire_sys(const moe_u64 *p) {
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline int atomic_add_acq_rel(int *p, int v) {
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
static inline int load_relaxed_sys(const int *p) {
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline moe_u64 clock_ns() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<moe_u64>(t.tv_sec) * 1000000000u + static_cast<moe_u64>(t.tv_nsec);
}
static inline void pause_poll() {
    const timespec t = {0, 20000}; // the other ranks run in other threads
    nanosleep(&t, nullptr);
}

// moe_host_launch runs a kernel of the plan by its name expression: 0, or 1 with the fault's text
// in `error`. `threads`: OS threads for the blocks.
#define MOE_HOST_ENTRY(...) {#__VA_ARGS__, __VA_ARGS__},
#define MOE_EXPORT(KERNELS) \
    static const moe_host::entry moe_host_entries[] = {KERNELS(MOE_HOST_ENTRY)}; \
    extern "C" __attribute__((visibility("default"))) int moe_host_launch( \
        const char *expression, const unsigned grid[3], unsigned block, unsigned smem, \
        const moe_args *args, int threads, char *error, unsigned error_bytes) { \
        for (const moe_host::entry &e : moe_host_entries) { \
            if (strcmp(e.expression, expression) != 0) \
                continue; \
            moe_host::launch l = {}; \
            l.kernel = e.expression, l.run = e.run, l.args = args; \
            l.grid = {grid[0], grid[1], grid[2]}, l.block = block, l.smem = smem; \
            l.error = error, l.error_bytes = error_bytes; \
            return moe_host::launch_kernel(&l, threads); \
        } \
        snprintf(error, error_bytes, "no kernel %s in this source", expression); \
        return 1; \
    } \
    extern "C" __attribute__((visibility("default"))) int moe_host_abi(void) { \
        return MOE_ARGS_VERSION * 65536 + static_cast<int>(sizeof(moe_args)); \
    }

#endif

// ---- the same on both sides ----

#if defined(MOE_E4M3_BY_HAND)
__device__ __forceinline__ unsigned e4m3_by_hand(float v) {
    const unsigned u = __float_as_uint(v), sign = u >> 24 & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return 0x7fu;
    if (a >= 0x43e00000u) // 448
        return sign | 0x7eu;
    if (a >= 0x3c800000u) // 2^-6, the smallest normal number
        return sign | (((a + 0x7ffffu + (a >> 20 & 1)) >> 20) - 960u);
    // The sum is rounded to multiples of 2^-9, which are subnormal numbers.
    return sign | (__float_as_uint(__uint_as_float(a) + 16384.0f) & 15u);
}
__device__ __forceinline__ unsigned pack_e4m3(float v0, float v1, float v2, float v3) {
    return e4m3_by_hand(v0) | e4m3_by_hand(v1) << 8 | e4m3_by_hand(v2) << 16 |
           e4m3_by_hand(v3) << 24;
}
#endif
__device__ __forceinline__ unsigned char to_e4m3(float v) {
    return static_cast<unsigned char>(pack_e4m3(v, 0.0f, 0.0f, 0.0f));
}
