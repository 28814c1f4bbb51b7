// What the host's compiler needs to take a .cu file for C++, and what runtime.cpp offers kernels.
//
// A thread of a block is a fiber; fibers run one at a time, so nothing here is atomic or locked.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(N) __attribute__((aligned(N)))
// Storage of its own in each library, which runtime.cpp finds and fills with NaN before each block.
#define __shared__ static thread_local
#define __syncthreads() emulator::sync_block(__LINE__)

struct Index3 {
    unsigned x, y, z;
};
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int LANES = 32;

// Waits for all threads of the block; a thread elsewhere, or one that has returned, is an error.
void sync_block(int line);

// Waits for all lanes of the warp; then `combine` gets every lane's record once, and may write to
// them. Lanes that wait with another `combine` are an error.
using Combine = void (*)(void* const* records);
void exchange(const char* what, void* record, Combine combine);

// Dynamic shared memory of the block.
char* dynamic_shared();
// Fails unless `size` bytes from p are aligned to as many, and lie in shared memory if they must.
void check(const char* what, const void* p, size_t size, bool in_shared);

// Copies that are done when they are waited for; until then the target is NaN.
void copy_later(void* target, const void* source, bool valid);
void close_group();
void finish_groups(int n_left);

// Ends the thread, if the launch is a rehearsal alone.
void end_rehearsal();

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator

// Vector types and functions that CUDA has without a header.
#define VECTOR_TYPES(T, NAME)                                  \
    struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };         \
    struct alignas(4 * sizeof(T)) NAME##4 { T x, y, z, w; };   \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_TYPES(float, float)
VECTOR_TYPES(int, int)
VECTOR_TYPES(unsigned, uint)
#undef VECTOR_TYPES

template <typename T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
inline float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <typename T>
inline T __ldg(const T* p) {
    return *p;
}
