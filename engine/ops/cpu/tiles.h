// Making tiles of vectors: a row of an A tile, pairs of rows of a B tile, transposes, and operands
// split into two bfloat16 parts: the rounded number and the rounding error.
#pragma once

#include "matrix.h"

namespace gdn {

// A split tile becomes three, side by side in a product's depth: high, low, high of an A
// operand, and high, high, low of a B operand, so that one product has the three sums that count.
constexpr int64_t SPLIT = 3;

GDN_INLINE void put(bf16* p, vi pairs) { std::memcpy(p, &pairs, sizeof(pairs)); }

// 2 W columns of an A tile's row. The instruction set decides which of them are paired: their order
// in a product's depth does not matter where B is the transposed tile.
GDN_INLINE vi bf16_row(vf a, vf b) {
#if defined(__AVX512BF16__)
    return (vi)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    return bf16_pairs(a, b);
#endif
}

// The error of rounding to bfloat16.
GDN_INLINE vf bf16_rest(vf v) { return v - from_bits(round_to_bf16(v) & ~0xffff); }

struct Pairs {
    vi high, low;
};

GDN_INLINE Pairs split(vf a, vf b) {
    const vi high = bf16_pairs(a, b);
    return {high, bf16_pairs(a - from_bits(high << 16), b - from_bits(high & ~0xffff))};
}

// Into a split tile of A, or of B, at `p` in its first part.
GDN_INLINE void put_a(bf16* p, Pairs x) {
    put(p, x.high), put(p + TILE_SIZE, x.low), put(p + 2 * TILE_SIZE, x.high);
}
GDN_INLINE void put_b(bf16* p, Pairs x) {
    put(p, x.high), put(p + TILE_SIZE, x.high), put(p + 2 * TILE_SIZE, x.low);
}

// a0 b0 a1 b1 … of the lower half of two vectors' lanes, or of the upper.
template <typename V>
GDN_INLINE V mix_low(V a, V b) {
    if constexpr (sizeof(V) == 64)
        return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                       23);
    else if constexpr (sizeof(V) == 32)
        return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    else
        return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
template <typename V>
GDN_INLINE V mix_high(V a, V b) {
    if constexpr (sizeof(V) == 64)
        return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                       15, 31);
    else if constexpr (sizeof(V) == 32)
        return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    else
        return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// Turns W vectors into their transpose: mixing those that are W / 2 apart log2(W) times.
GDN_INLINE void transpose(vi* v) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        vi mixed[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) {
            mixed[2 * i] = mix_low(v[i], v[i + W / 2]);
            mixed[2 * i + 1] = mix_high(v[i], v[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) v[i] = mixed[i];
    }
}

// A tile of 16 × 16 pairs transposed: from get(row, column), W columns at a time, to
// set(offset in the tile, pairs).
template <typename Get, typename Set>
GDN_INLINE void transpose_tile(Get get, Set set) {
    for (int c = 0; c < SIDE; c += W)
        for (int r = 0; r < SIDE; r += W) {
            vi v[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) v[i] = get(r + i, c);
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) set((c + i) * DEPTH + 2 * r, v[i]);
        }
}

// Tiles of an operand that has `depth` of them beside each other.
inline Tiles tiles(const bf16* at, int64_t depth) { return {at, depth * TILE_SIZE, TILE_SIZE}; }

}  // namespace gdn
