// The functions of engine/ops/cuda/primitives.cuh on the host: same names, same results. Kernels of
// tests, which constants.cuh does not know, are KERNEL_OF(name, threads).
#pragma once

#include <chrono>

#include "constants.cuh"
#include "emulator.h"

#define DEVICE inline
#define KERNEL(NAME) KERNEL_OF(NAME, gdn::THREADS_##NAME)
#define KERNEL_OF(NAME, THREADS)                                                \
    extern "C" {                                                                \
    __attribute__((visibility("default"))) extern const int32_t NAME##_threads; \
    const int32_t NAME##_threads = THREADS;                                     \
    }                                                                           \
    extern "C" __attribute__((visibility("default"))) void NAME(const gdn::Args& a)
#define KERNEL_FOR(NAME, BLOCKS) KERNEL(NAME)
#define EAGER_KERNEL_FOR(NAME, BLOCKS) KERNEL(NAME)
#define REHEARSED_KERNEL(NAME, BLOCKS, N)                     \
    namespace gdn {                                           \
    DEVICE void NAME##_body(const Args& a, int rehearsal);    \
    }                                                         \
    KERNEL(NAME) {                                            \
        for (int i = gdn::rehearses() ? N : 0; i >= 0; i--) { \
            gdn::NAME##_body(a, i);                           \
            __syncthreads();                                  \
        }                                                     \
    }                                                         \
    DEVICE void gdn::NAME##_body(const gdn::Args& a, int rehearsal)
#define DYNAMIC_SHARED(NAME) char* const NAME = emulator::dynamic_shared()

namespace gdn {

constexpr uint32_t ALL_LANES = 0xffffffffu;

// A launch is over before the next one starts. One that is a rehearsal alone ends here.
DEVICE void wait_for_inputs() { emulator::end_rehearsal(); }
DEVICE bool rehearses() { return true; }

// A lane's part of a shuffle: what it gives, what it asks for, what it gets.
template <typename T>
struct Shuffled {
    T given;
    int argument;
    T got;
};

// FROM(lane, argument) is the lane whose value a lane gets.
template <typename T, int (*FROM)(int, int)>
void shuffle_all(void* const* records) {
    for (int lane = 0; lane < emulator::LANES; lane++) {
        auto* to = static_cast<Shuffled<T>*>(records[lane]);
        to->got = static_cast<Shuffled<T>*>(records[FROM(lane, to->argument)])->given;
    }
}

inline int from_xor(int lane, int mask) { return (lane ^ mask) % emulator::LANES; }
inline int from_lane(int, int from) { return from & (emulator::LANES - 1); }
inline int from_above(int lane, int by) { return lane + by < emulator::LANES ? lane + by : lane; }
inline int from_below(int lane, int by) { return lane - by >= 0 ? lane - by : lane; }

template <int (*FROM)(int, int), typename T>
T shuffled(const char* what, T x, int argument) {
    Shuffled<T> record{x, argument, {}};
    emulator::exchange(what, &record, shuffle_all<T, FROM>);
    return record.got;
}

template <typename T>
DEVICE T shuffle_xor(T x, int mask) {
    return shuffled<from_xor>("shuffle_xor", x, mask);
}
template <typename T>
DEVICE T shuffle(T x, int lane) {
    return shuffled<from_lane>("shuffle", x, lane);
}
template <typename T>
DEVICE T shuffle_down(T x, int by) {
    return shuffled<from_above>("shuffle_down", x, by);
}
template <typename T>
DEVICE T shuffle_up(T x, int by) {
    return shuffled<from_below>("shuffle_up", x, by);
}

struct Voted {
    bool vote;
    uint32_t votes;
};

inline void vote_all(void* const* records) {
    uint32_t votes = 0;
    for (int lane = 0; lane < emulator::LANES; lane++)
        votes |= static_cast<uint32_t>(static_cast<Voted*>(records[lane])->vote) << lane;
    for (int lane = 0; lane < emulator::LANES; lane++)
        static_cast<Voted*>(records[lane])->votes = votes;
}

DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE uint32_t ballot(bool x) {
    Voted record{x, 0};
    emulator::exchange("ballot", &record, vote_all);
    return record.votes;
}
DEVICE int32_t count_bits(uint32_t x) { return __popc(x); }
inline void nothing(void* const*) {}
DEVICE void sync_warp() { emulator::exchange("sync_warp", nullptr, nothing); }

// The highest (lowest) value of a warp, in every lane.
template <bool HIGHEST>
void reduce_all(void* const* records) {
    uint32_t best = *static_cast<uint32_t*>(records[0]);
    for (int lane = 1; lane < emulator::LANES; lane++) {
        const uint32_t x = *static_cast<uint32_t*>(records[lane]);
        if (HIGHEST ? x > best : x < best) best = x;
    }
    for (int lane = 0; lane < emulator::LANES; lane++)
        *static_cast<uint32_t*>(records[lane]) = best;
}
DEVICE uint32_t warp_highest(uint32_t x) {
    emulator::exchange("warp_highest", &x, reduce_all<true>);
    return x;
}
DEVICE uint32_t warp_lowest(uint32_t x) {
    emulator::exchange("warp_lowest", &x, reduce_all<false>);
    return x;
}

DEVICE float exp_fast(float x) { return std::exp(x); }
DEVICE float rsqrt_of(float x) { return 1.0f / std::sqrt(x); }
DEVICE float reciprocal_of(float x) { return 1.0f / x; }

DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}

DEVICE uint32_t permute_or_fill(uint32_t a, uint32_t b, uint32_t selector) {
    const uint32_t chosen = permute_bytes(a, b, selector);
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t byte = chosen >> 8 * i & 0xff;
        out |= (selector >> 4 * i & 8 ? byte >> 7 ? 0xffu : 0u : byte) << 8 * i;
    }
    return out;
}

DEVICE float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31;
    const uint32_t fraction = h & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
}
// `bits` of a float with the last n taken away, rounded to nearest, ties to even.
DEVICE uint32_t round_bits(uint32_t bits, int n) {
    return (bits + (1u << (n - 1)) - 1 + (bits >> n & 1)) >> n;
}
DEVICE uint16_t float_to_half(float f) {
    const uint32_t bits = __float_as_uint(f), sign = bits >> 16 & 0x8000;
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fff;
    if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (size >= 0x38800000u)  // Normal; a carry may reach infinity.
        return static_cast<uint16_t>(sign | (round_bits(size, 13) - (112 << 10)));
    // Adding 0.5 leaves units of 2^-24 in the fraction, rounded as floats are.
    const uint32_t units = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | units);
}
DEVICE float bf16_to_float(uint16_t b) { return __uint_as_float(static_cast<uint32_t>(b) << 16); }
DEVICE uint16_t float_to_bf16(float f) {
    const uint32_t bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>(round_bits(bits, 16));
}
DEVICE uint32_t pack_bf16(float low, float high) {
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
DEVICE uint32_t pack_half(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}

DEVICE int32_t dot4(int32_t a, int32_t b, int32_t c) {
    int8_t x[4], y[4];
    std::memcpy(x, &a, 4), std::memcpy(y, &b, 4);
    for (int i = 0; i < 4; i++) c += x[i] * y[i];
    return c;
}
DEVICE int32_t dot4_unsigned(uint32_t a, int32_t b, int32_t c) {
    uint8_t x[4];
    int8_t y[4];
    std::memcpy(x, &a, 4), std::memcpy(y, &b, 4);
    for (int i = 0; i < 4; i++) c += x[i] * y[i];
    return c;
}

struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};
template <typename T>
DEVICE T load_stream(const T* p) {
    emulator::check("load_stream", p, sizeof(T), false);
    return *p;
}

DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
    emulator::check("copy_async", shared, 16, true);
    emulator::check("copy_async", global, 16, false);
    emulator::copy_later(shared, global, valid);
}
DEVICE void fence_copies() { emulator::close_group(); }
template <int N>
DEVICE void wait_copies() {
    emulator::finish_groups(N);
}

struct alignas(8) Arrivals {
    int64_t n;
};
DEVICE void begin_arrivals(Arrivals* to, int n_pairs, int stride) {
    sync_warp();
    for (int i = 0; i < n_pairs && threadIdx.x % 32 == 0; i++) {
        auto* pair = reinterpret_cast<Arrivals*>(reinterpret_cast<char*>(to) + i * stride);
        pair[0].n = pair[1].n = 0;
    }
    sync_warp();
}
DEVICE void end_arrivals(Arrivals*, int, int) {}
DEVICE void copy_piece(void* shared, const void* global, int bytes, Arrivals* at) {
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16)
        copy_async(static_cast<char*>(shared) + i, static_cast<const char*>(global) + i);
    fence_copies();
    if (threadIdx.x % 32 == 0) at->n++;
}
DEVICE void wait_for_piece(Arrivals* at, int n) {
    wait_copies<0>();
    sync_warp();
    if (at->n != n + 1) emulator::fail("wait_for_piece: %d copies, not %d", (int)at->n, n + 1);
}

// A lane's part of load_matrices: a row of 8 elements it points to, and what it gets.
struct Loaded {
    const uint16_t* row;
    uint32_t* m;
};

template <bool TRANSPOSED>
void load_all(void* const* records) {
    const auto element = [&](int matrix, int i, int j) -> uint32_t {
        return static_cast<Loaded*>(records[8 * matrix + i])->row[j];
    };
    for (int lane = 0; lane < emulator::LANES; lane++) {
        uint32_t* m = static_cast<Loaded*>(records[lane])->m;
        const int i = lane / 4, j = lane % 4 * 2;
        for (int k = 0; k < 4; k++)
            m[k] = TRANSPOSED ? element(k, j, i) | element(k, j + 1, i) << 16
                              : element(k, i, j) | element(k, i, j + 1) << 16;
    }
}

template <bool TRANSPOSED>
void load_lane(uint32_t (&m)[4], const void* shared) {
    emulator::check("load_matrices", shared, 16, true);
    Loaded record{static_cast<const uint16_t*>(shared), m};
    emulator::exchange("load_matrices", &record, load_all<TRANSPOSED>);
}
DEVICE void load_matrices(uint32_t (&m)[4], const void* shared) { load_lane<false>(m, shared); }
DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* shared) {
    load_lane<true>(m, shared);
}

struct Multiplied {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// Fragments as the PTX ISA draws them for mma.m16n8k16.
template <float (*TO_FLOAT)(uint16_t)>
void multiply_all(void* const* records) {
    float a[16][16], b[8][16];
    const auto put = [](float* to, uint32_t pair) {
        to[0] = TO_FLOAT(static_cast<uint16_t>(pair));
        to[1] = TO_FLOAT(static_cast<uint16_t>(pair >> 16));
    };
    for (int lane = 0; lane < emulator::LANES; lane++) {
        const auto* r = static_cast<Multiplied*>(records[lane]);
        const int i = lane / 4, j = lane % 4 * 2;
        for (int k = 0; k < 4; k++) put(&a[i + k % 2 * 8][j + k / 2 * 8], r->a[k]);
        for (int k = 0; k < 2; k++) put(&b[i][j + 8 * k], r->b[k]);
    }
    for (int lane = 0; lane < emulator::LANES; lane++) {
        float* d = static_cast<Multiplied*>(records[lane])->d;
        for (int e = 0; e < 4; e++) {
            const float *row = a[lane / 4 + e / 2 * 8], *column = b[lane % 4 * 2 + e % 2];
            for (int k = 0; k < 16; k++) d[e] += row[k] * column[k];
        }
    }
}

DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Multiplied record{d, a, {b0, b1}};
    emulator::exchange("multiply_bf16", &record, multiply_all<bf16_to_float>);
}
DEVICE void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Multiplied record{d, a, {b0, b1}};
    emulator::exchange("multiply_half", &record, multiply_all<half_to_float>);
}
struct MultipliedInt8 {
    int32_t* d;
    const uint32_t* a;
    uint32_t b[2];
};

// Fragments of mma.m16n8k32: registers of 4 bytes where those of k16 have 2 elements.
inline void multiply_all_int8(void* const* records) {
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < emulator::LANES; lane++) {
        const auto* r = static_cast<MultipliedInt8*>(records[lane]);
        const int i = lane / 4, j = lane % 4 * 4;
        for (int k = 0; k < 4; k++) std::memcpy(&a[i + k % 2 * 8][j + k / 2 * 16], &r->a[k], 4);
        for (int k = 0; k < 2; k++) std::memcpy(&b[i][j + 16 * k], &r->b[k], 4);
    }
    for (int lane = 0; lane < emulator::LANES; lane++) {
        int32_t* d = static_cast<MultipliedInt8*>(records[lane])->d;
        for (int e = 0; e < 4; e++) {
            const int8_t *row = a[lane / 4 + e / 2 * 8], *column = b[lane % 4 * 2 + e % 2];
            for (int k = 0; k < 32; k++) d[e] += row[k] * column[k];
        }
    }
}

DEVICE void multiply_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MultipliedInt8 record{d, a, {b0, b1}};
    emulator::exchange("multiply_int8", &record, multiply_all_int8);
}

DEVICE void multiply_int8_to(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             int32_t c) {
    for (int i = 0; i < 4; i++) d[i] = c;
    multiply_int8(d, a, b0, b1);
}

DEVICE uint64_t nanoseconds() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

DEVICE int32_t add_atomic(int32_t* p, int32_t x) {
    const int32_t before = *p;
    *p += x;
    return before;
}
DEVICE void publish() {}
DEVICE Words4 load_published(const Words4* p) { return *p; }
DEVICE int32_t load_published(const int32_t* p) { return *p; }
DEVICE float load_published(const float* p) { return *p; }

}  // namespace gdn
