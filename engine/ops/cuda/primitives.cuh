// Types and device primitives that kernels may use beyond plain CUDA C++ (indices, __shared__,
// __syncthreads, math functions). Each is one instruction or a few; tests that run kernels without
// a GPU replace this file by another of the same functions.
#pragma once

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

// Written by engine/backends/cuda/kernels.py: what the host knows of kernels, THREADS_ of each.
#include "constants.cuh"

#define DEVICE __device__ __forceinline__
// The head of a kernel named NAME; `a` lies in constant memory. Its thread blocks may start while
// the kernel before still runs, so every thread waits for that kernel first; see wait_for_inputs.
#define KERNEL(NAME) KERNEL_FOR(NAME, 1)
// The compiler uses so few registers that BLOCKS thread blocks fit on a multiprocessor.
#define KERNEL_FOR(NAME, BLOCKS) KERNEL_THAT_FIRST(gdn::wait_for_inputs(), NAME, BLOCKS)
// The body itself calls wait_for_inputs in every thread, after it has started to fetch weights.
#define EAGER_KERNEL_FOR(NAME, BLOCKS) KERNEL_THAT_FIRST((void)0, NAME, BLOCKS)
// The body runs N times without effect, in a thread block that waits for the kernel before, to bring
// its instructions to the multiprocessor's cache: it gets the number of the rehearsal, then 0, and
// calls wait_for_inputs if it is 0. A rehearsal writes nothing, reads past the L1 cache what a kernel
// before writes, and no index of it.
#define REHEARSED_KERNEL(NAME, BLOCKS, N)                                         \
    namespace gdn {                                                               \
    DEVICE void NAME##_body(const Args& a, int rehearsal);                        \
    }                                                                             \
    extern "C" __global__ void __launch_bounds__(gdn::THREADS_##NAME, BLOCKS)     \
        NAME(const __grid_constant__ gdn::Args a) {                               \
        gdn::let_next_start();                                                    \
        _Pragma("unroll 1") for (int i = gdn::rehearses() ? N : 0; i >= 0; i--) { \
            gdn::NAME##_body(a, i);                                               \
            __syncthreads();                                                      \
        }                                                                         \
    }                                                                             \
    DEVICE void gdn::NAME##_body(const gdn::Args& a, int rehearsal)
#define KERNEL_THAT_FIRST(BEGIN, NAME, BLOCKS)                                \
    namespace gdn {                                                           \
    DEVICE void NAME##_body(const Args& a);                                   \
    }                                                                         \
    extern "C" __global__ void __launch_bounds__(gdn::THREADS_##NAME, BLOCKS) \
        NAME(const __grid_constant__ gdn::Args a) {                           \
        gdn::let_next_start();                                                \
        BEGIN;                                                                \
        gdn::NAME##_body(a);                                                  \
    }                                                                         \
    DEVICE void gdn::NAME##_body(const gdn::Args& a)
// Shared memory whose size the launch gives, aligned to 128 bytes.
#define DYNAMIC_SHARED(NAME) extern __shared__ __align__(128) char NAME[]

namespace gdn {

constexpr uint32_t ALL_LANES = 0xffffffffu;

// Programmatic dependent launch (from compute capability 9.0 on): the next kernel's thread blocks
// may start as soon as all of this kernel's have started …
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// … and wait here until the kernel before is done and its writes are visible. That kernel has
// waited too, so all earlier ones are done. Before it, a kernel may read only weights and live
// counts.
DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True in the first thread blocks, one for each multiprocessor: these may rehearse.
DEVICE bool rehearses() {
#if __CUDA_ARCH__ >= 900
    uint32_t n;
    asm("mov.u32 %0, %nsmid;" : "=r"(n));
    return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x < n;
#else
    return false;
#endif
}

template <typename T>
DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(ALL_LANES, x, mask);
}
template <typename T>
DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(ALL_LANES, x, lane);
}
template <typename T>
DEVICE T shuffle_down(T x, int by) {
    return __shfl_down_sync(ALL_LANES, x, by);
}
template <typename T>
DEVICE T shuffle_up(T x, int by) {
    return __shfl_up_sync(ALL_LANES, x, by);
}
// The warp's number in its thread block; the compiler knows that all lanes have the same.
DEVICE int warp_index() { return __shfl_sync(ALL_LANES, threadIdx.x / 32, 0); }
DEVICE uint32_t ballot(bool x) { return __ballot_sync(ALL_LANES, x); }
DEVICE int32_t count_bits(uint32_t x) { return __popc(x); }
DEVICE void sync_warp() { __syncwarp(); }
// The highest (lowest) value of a warp, in every lane.
DEVICE uint32_t warp_highest(uint32_t x) { return __reduce_max_sync(ALL_LANES, x); }
DEVICE uint32_t warp_lowest(uint32_t x) { return __reduce_min_sync(ALL_LANES, x); }

// exp(x), as exp2 of a rounded product: the error grows with |x|, to some 25 ulp at x = -20. 0 for
// large negative x.
DEVICE float exp_fast(float x) { return __expf(x); }
DEVICE float rsqrt_of(float x) { return rsqrtf(x); }
// 1 / x within 1 ulp.
DEVICE float reciprocal_of(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Four of the eight bytes of a (0 to 3) and b (4 to 7): byte i is number `selector >> 4 * i & 7`.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// The same, but 4 bits a byte of which the highest fills the byte with the chosen one's sign.
DEVICE uint32_t permute_or_fill(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

DEVICE float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
DEVICE float bf16_to_float(uint16_t b) { return __uint_as_float(static_cast<uint32_t>(b) << 16); }
DEVICE uint16_t float_to_bf16(float f) {
    uint16_t b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
    return b;
}
// Two floats as bf16 (or f16), the first in the low half.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t p;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(p) : "f"(high), "f"(low));
    return p;
}
DEVICE uint32_t pack_half(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}

// c + the four products of signed bytes of a and b; of unsigned bytes of a and signed ones of b.
DEVICE int32_t dot4(int32_t a, int32_t b, int32_t c) {
    int32_t d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE int32_t dot4_unsigned(uint32_t a, int32_t b, int32_t c) {
    int32_t d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Weights are read once: 16 (or 8, 4) bytes past the L1 cache.
struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};
DEVICE Words4 load_stream(const Words4* p) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p));
    return v;
}
DEVICE Words2 load_stream(const Words2* p) {
    Words2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.w[0]), "=r"(v.w[1])
                 : "l"(p));
    return v;
}
DEVICE uint32_t load_stream(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Copies 16 bytes from global to shared memory in the background; `fence` closes a group of copies,
// `wait_copies<N>` waits until at most N groups are on their way. With `valid` false: zeros.
DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
}
DEVICE void fence_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A warp's copies to shared memory of whole pieces, one after the other: a count of them that have
// arrived. From compute capability 9.0 on the copy engine makes them, else the lanes.
struct alignas(8) Arrivals {
    uint64_t barrier;
};
// Of pairs that lie `stride` bytes apart. Copies come after what lanes have written or read before.
DEVICE void begin_arrivals(Arrivals* to, int n_pairs, int stride) {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (threadIdx.x % 32 < n_pairs) {
        const uint32_t at =
            static_cast<uint32_t>(__cvta_generic_to_shared(to)) + threadIdx.x % 32 * stride;
        asm volatile(
            "mbarrier.init.shared.b64 [%0], 1;\n mbarrier.init.shared.b64 [%1], 1;\n"
            " fence.mbarrier_init.release.cluster;" ::"r"(at),
            "r"(at + 8)
            : "memory");
    }
    __syncwarp();
#endif
}
DEVICE void end_arrivals(Arrivals* to, int n_pairs, int stride) {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    if (threadIdx.x % 32 < n_pairs) {
        const uint32_t at =
            static_cast<uint32_t>(__cvta_generic_to_shared(to)) + threadIdx.x % 32 * stride;
        asm volatile("mbarrier.inval.shared.b64 [%0];\n mbarrier.inval.shared.b64 [%1];" ::"r"(at),
                     "r"(at + 8)
                     : "memory");
    }
    __syncwarp();
#endif
}
// Starts the next copy, of a multiple of 16 bytes; the warp has read what was there before.
DEVICE void copy_piece(void* shared, const void* global, int bytes, Arrivals* at) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 > 0) return;
    const uint32_t barrier = static_cast<uint32_t>(__cvta_generic_to_shared(at));
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    if (bytes == 0) return;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
#else
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16)
        copy_async(static_cast<char*>(shared) + i, static_cast<const char*>(global) + i);
    fence_copies();
#endif
}
// Waits for copy number n of those that `at` counts, the last that has been started.
DEVICE void wait_for_piece(Arrivals* at, int n) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred done;\n again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        " @!done bra again;\n}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))),
        "r"(n & 1)
        : "memory");
#else
    wait_copies<0>();
    __syncwarp();
#endif
}

// Four 8 × 8 matrices of 16-bit elements from shared memory, as the tensor cores take them: lane l
// gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32_t (&m)[4], const void* shared) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* shared) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

// d += a · b of a warp's fragments: a [16, 16] row-major, b [16, 8] by columns, d [16, 8] float32
// (mma.sync.m16n8k16; PTX ISA, "Matrix fragments for mma.m16n8k16").
DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d += a · b of a warp's fragments of signed bytes: a [16, 32] row-major, b [32, 8] by columns,
// d [16, 8] int32 (mma.sync.m16n8k32). A register has 4 neighbouring bytes.
DEVICE void multiply_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d = c + a · b, as above, where all of c are the same.
DEVICE void multiply_int8_to(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             int32_t c) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
}

// The GPU's clock.
DEVICE uint64_t nanoseconds() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

DEVICE int32_t add_atomic(int32_t* p, int32_t x) { return atomicAdd(p, x); }
// Other thread blocks see this thread's earlier writes before its later ones …
DEVICE void publish() { __threadfence(); }
// … and read them past the L1 cache. So does a kernel that may read them too early, in a rehearsal.
DEVICE Words4 load_published(const Words4* p) {
    Words4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p));
    return v;
}
DEVICE int32_t load_published(const int32_t* p) {
    int32_t v;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE float load_published(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

}  // namespace gdn
