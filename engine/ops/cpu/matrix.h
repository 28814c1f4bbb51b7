// Products of bfloat16 tiles with float32 sums: on AMX if the library is built for it, else
// emulated in vectors, so that kernels of tiles can be tested on any machine.
//
// An A tile is 16 rows × 32 columns, row after row. A B tile is 32 rows × 16 columns, where two
// rows' elements lie side by side, as a packed BF16 weight has them. Both have 1 KiB. A row of a
// product has the same bits whatever rows it shares tiles with.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gdn {

typedef uint16_t bf16;

constexpr int SIDE = 16, DEPTH = 32;
constexpr int64_t TILE_SIZE = SIDE * DEPTH;  // Elements.

GDN_INLINE float bf16_to_float(bf16 x) {
    const uint32_t wide = static_cast<uint32_t>(x) << 16;
    return load_as<float>(&wide);
}

// Bits of the nearest bfloat16 (ties to even) in the upper half of each lane. NaN stays NaN.
GDN_INLINE vi round_to_bf16(vf v) {
    const vi b = bits(v);
    return v != v ? b | 0x400000 : b + 0x7fff + ((b >> 16) & 1);
}

// Lane by lane, `low` in the lower half and `high` in the upper one.
GDN_INLINE vi bf16_pairs(vf low, vf high) {
#if defined(__AVX512BF16__)
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return reinterpret_cast<vi>(_mm512_maskz_permutexvar_epi16(0xffffffff, order, both));
#else
    return (round_to_bf16(low) >> 16 & 0xffff) | (round_to_bf16(high) & ~0xffff);
#endif
}

// The first n ≤ W lanes as bfloat16.
GDN_INLINE void store_bf16(bf16* p, vf v, int n) {
#if defined(__AVX512BF16__)
    const auto narrow = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    if (n == W) return _mm256_storeu_si256((__m256i*)p, narrow);
    std::memcpy(p, &narrow, 2 * static_cast<size_t>(n));
#else
    const vi wide = round_to_bf16(v);
    for (int i = 0; i < n; i++) p[i] = static_cast<bf16>(static_cast<uint32_t>(wide[i]) >> 16);
#endif
}

// Bytes that a product prefetches into the L2 cache with each tile that it sums over.
struct Soon {
    const char* at = nullptr;
    int64_t bytes = 0;
};

// The tiles of an operand: `side` elements from one to the next along the result's rows (A) or
// columns (B), `depth` along the sum.
struct Tiles {
    const bf16* at;
    int64_t side, depth;

    const bf16* tile(int64_t i, int64_t k) const { return at + i * side + k * depth; }
};

// Rows of sums, `stride` elements apart; with at == nullptr zeros.
struct TileSums {
    float* at = nullptr;
    int64_t stride = 0;
};

#if defined(__AMX_BF16__)

// AMX's configuration, which every thread loads: all eight tiles are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Asks Linux to save the tiles with a thread's state: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool allow_matrix_products() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

inline void begin_matrix_products() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void end_matrix_products() { asm volatile("tilerelease"); }

// The compiler's intrinsics don't tell it that they read and write memory.
template <int T>
GDN_INLINE void load_tile(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
GDN_INLINE void store_tile(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
GDN_INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int C, int A, int B>
GDN_INLINE void multiply_tile() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

template <int I, int J>
GDN_INLINE void begin_sum(TileSums from) {
    constexpr int T = 2 * I + J;
    if (from.at)
        load_tile<T>(from.at + I * SIDE * from.stride + J * SIDE, 4 * from.stride);
    else
        clear_tile<T>();
}
template <int I, int J>
GDN_INLINE void end_sum(TileSums to) {
    store_tile<2 * I + J>(to.at + I * SIDE * to.stride + J * SIDE, 4 * to.stride);
}

// to [16 · MT, 16 · NT] = from + a · b, summed over n tiles; MT and NT are 1 or 2.
template <int MT, int NT>
void multiply_tiles(Tiles a, Tiles b, int64_t n, TileSums from, TileSums to, Soon soon) {
    constexpr int A0 = 4, A1 = 5, B0 = 6, B1 = 7;
    begin_sum<0, 0>(from);
    if constexpr (NT == 2) begin_sum<0, 1>(from);
    if constexpr (MT == 2) begin_sum<1, 0>(from);
    if constexpr (MT == 2 && NT == 2) begin_sum<1, 1>(from);
    for (int64_t k = 0; k < n; k++) {
        for (int64_t i = 0; i < soon.bytes; i += 64)
            __builtin_prefetch(soon.at + k * soon.bytes + i, 0, 2);
        load_tile<B0>(b.tile(0, k), 2 * DEPTH);
        load_tile<A0>(a.tile(0, k), 2 * DEPTH);
        multiply_tile<0, A0, B0>();
        if constexpr (NT == 2) {
            load_tile<B1>(b.tile(1, k), 2 * DEPTH);
            multiply_tile<1, A0, B1>();
        }
        if constexpr (MT == 2) {
            load_tile<A1>(a.tile(1, k), 2 * DEPTH);
            multiply_tile<2, A1, B0>();
        }
        if constexpr (MT == 2 && NT == 2) multiply_tile<3, A1, B1>();
    }
    end_sum<0, 0>(to);
    if constexpr (NT == 2) end_sum<0, 1>(to);
    if constexpr (MT == 2) end_sum<1, 0>(to);
    if constexpr (MT == 2 && NT == 2) end_sum<1, 1>(to);
}

#else

inline bool allow_matrix_products() { return true; }
inline void begin_matrix_products() {}
inline void end_matrix_products() {}

template <int MT, int NT>
void multiply_tiles(Tiles a, Tiles b, int64_t n, TileSums from, TileSums to, Soon) {
    constexpr int PARTS = SIDE / W;
    for (int i = 0; i < MT * SIDE; i++)
        for (int j = 0; j < NT * PARTS; j++) {
            vf sum = from.at ? load(from.at + i * from.stride + j * W) : vf{};
            for (int64_t k = 0; k < n; k++) {
                const bf16* x = a.tile(i / SIDE, k) + i % SIDE * DEPTH;
                const bf16* y = b.tile(j / PARTS, k) + j % PARTS * 2 * W;
                for (int d = 0; d < DEPTH; d += 2) {
                    const vi pair = load_as<vi>(y + d * SIDE);
                    sum = fma(splat(bf16_to_float(x[d])), from_bits(pair << 16), sum);
                    sum = fma(splat(bf16_to_float(x[d + 1])), from_bits(pair & ~0xffff), sum);
                }
            }
            store(to.at + i * to.stride + j * W, sum);
        }
}

#endif

// The same with MT and NT as numbers.
inline void multiply_some(int64_t mt, int64_t nt, Tiles a, Tiles b, int64_t n, TileSums from,
                          TileSums to, Soon soon = {}) {
    const auto f = mt == 2 ? (nt == 2 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                           : (nt == 2 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
    f(a, b, n, from, to, soon);
}

struct Nothing {
    void operator()() const {}
};

// The same for any number of tiles: c [16 · m, 16 · n_columns] (+)= a · b. `between` is called
// before every two by two of them.
template <typename F = Nothing>
void multiply_matrices(Tiles a, int64_t m, Tiles b, int64_t n_columns, int64_t n, float* c,
                       int64_t c_stride, bool add, F between = {}) {
    for (int64_t j = 0; j < n_columns; j += 2)
        for (int64_t i = 0; i < m; i += 2) {
            between();
            const Tiles x{a.tile(i, 0), a.side, a.depth}, y{b.tile(j, 0), b.side, b.depth};
            const TileSums to{c + i * SIDE * c_stride + j * SIDE, c_stride};
            multiply_some(i + 1 < m ? 2 : 1, j + 1 < n_columns ? 2 : 1, x, y, n,
                          add ? to : TileSums{}, to);
        }
}

}  // namespace gdn
