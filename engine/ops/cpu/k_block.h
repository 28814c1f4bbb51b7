// Reading k-blocks of a packed weight: words of W rows, and their scales.
#pragma once

#include <type_traits>

#include "../layout.h"
#include "simd.h"

namespace gdn {

// Vectors that cover the 16 rows of a panel.
constexpr int PARTS = PANEL / W;
// K-blocks of a super-block, which are summed together.
constexpr int SUPER_K_BLOCKS = SUPER / K_BLOCK;

constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
// The highest bit of FP4 is the sign.
constexpr int8_t FP4_VALUES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <typename F>
constexpr const int8_t* table_of() {
    return F::VALUES == Values::FP4 ? FP4_VALUES : IQ4_VALUES;
}

// W bytes of T, int8 or uint8, as int32.
template <typename T>
GDN_INLINE vi widen(const uint8_t* p) {
#if defined(__AVX512F__)
    const auto b = load_as<__m128i>(p);
    return (vi)(std::is_signed_v<T> ? _mm512_maskz_cvtepi8_epi32(ALL, b)
                                    : _mm512_maskz_cvtepu8_epi32(ALL, b));
#elif defined(__AVX2__)
    const auto b = _mm_loadl_epi64((const __m128i*)p);
    return (vi)(std::is_signed_v<T> ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
#else
    vi v;
    for (int i = 0; i < W; i++) v[i] = static_cast<T>(p[i]);
    return v;
#endif
}

GDN_INLINE vi look_up(const int8_t* values, vi nibbles) {
#if defined(__AVX512F__)
    const __m512i table = _mm512_maskz_broadcast_i32x4(ALL, load_as<__m128i>(values));
    return reinterpret_cast<vi>(_mm512_shuffle_epi8(table, reinterpret_cast<__m512i>(nibbles)));
#elif defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(load_as<__m128i>(values));
    return reinterpret_cast<vi>(_mm256_shuffle_epi8(table, reinterpret_cast<__m256i>(nibbles)));
#else
    uint8_t bytes[4 * W];
    std::memcpy(bytes, &nibbles, sizeof(bytes));
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(values[b]);
    return load_as<vi>(bytes);
#endif
}

// Shifted left by N bits, or right where N is negative.
template <int N>
GDN_INLINE vi shifted(vi v) {
    return N == 0 ? v : N > 0 ? v << (N > 0 ? N : 0) : v >> (N < 0 ? -N : 0);
}

// Word I (4 columns) of the W rows of part p: unsigned bytes, or int8 where F is SIGNED. Each
// plane's bits are shifted into place and masked there.
template <typename F, int I>
GDN_INLINE vi word(const uint8_t* planes, int p) {
    planes += p * 4 * W;
    if constexpr (F::BITS == 8) return load_as<vi>(planes + I * WORD_BYTES);
    constexpr int NIBBLE = F::BITS >= 4 ? 4 : 0, PAIR = F::BITS % 4 >= 2 ? 2 : 0;
    vi v{};
    if constexpr (NIBBLE > 0)
        v = shifted<-4 * (I % 2)>(load_as<vi>(planes + I / 2 * WORD_BYTES)) & 0x0f0f0f0f;
    planes += NIBBLE * WORD_BYTES;
    if constexpr (PAIR > 0)
        v |= shifted<NIBBLE - 2 * (I % 4)>(load_as<vi>(planes + I / 4 * WORD_BYTES)) &
             0x03030303 << NIBBLE;
    planes += PAIR * WORD_BYTES;
    if constexpr (F::BITS % 2 > 0)
        v |= shifted<NIBBLE + PAIR + F::LOWEST - I>(load_as<vi>(planes)) &
             0x01010101 << (NIBBLE + PAIR + F::LOWEST);
    return F::CODEBOOK ? look_up(table_of<F>(), v) : v;
}

// Calls f with each number from FIRST to LAST - 1 as a constant.
template <int FIRST, int LAST, typename F>
GDN_INLINE void for_constants(F f) {
    if constexpr (FIRST < LAST) {
        f(std::integral_constant<int, FIRST>{});
        for_constants<FIRST + 1, LAST>(f);
    }
}

// W unsigned floats of 4 bits of exponent and 3 of mantissa, 2^-8 times. As float16, whose exponent
// has one bit more and counts 8 less, they have the same bits.
GDN_INLINE vf small_floats(const uint8_t* p) {
#if defined(__AVX512F__)
    const auto halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16(load_as<__m128i>(p)), 7);
    return (vf)_mm512_maskz_cvtph_ps(ALL, halves);
#elif defined(__AVX2__)
    const auto halves = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
    return (vf)_mm256_cvtph_ps(halves);
#else
    uint16_t halves[W];
    for (int i = 0; i < W; i++) halves[i] = static_cast<uint16_t>(p[i] << 7);
    return half_to_float(halves);
#endif
}

// The scales of W rows for group G of a k-block; of a super-block's in units of its own scale.
template <typename F, int G>
GDN_INLINE vf scale_of(const uint8_t* k_block, int p) {
    const int at = G * PANEL + p * W;
    if constexpr (F::SCALE == Scale::POWERS) return from_bits(widen<uint8_t>(k_block + at) << 23);
    if constexpr (F::SCALE == Scale::SMALL_FLOATS) return small_floats(k_block + at);
    if constexpr (F::SCALE == Scale::BYTES)
        return to_float(F::HAS_MIN ? widen<uint8_t>(k_block + at) : widen<int8_t>(k_block + at));
    return half_to_float(reinterpret_cast<const uint16_t*>(k_block) + at);
}

// Their mins, likewise.
template <typename F, int G>
GDN_INLINE vf min_of(const uint8_t* k_block, int p) {
    const int at = G * PANEL + p * W;
    if constexpr (F::IS_SUPER) return to_float(widen<uint8_t>(k_block + F::SCALE_BYTES + at));
    return half_to_float(reinterpret_cast<const uint16_t*>(k_block + F::SCALE_BYTES) + at);
}

// The units of both: the scales in front of a super-block; part PARTS + p has those of the mins.
template <typename F>
GDN_INLINE vf super_of(const uint8_t* super_block, int part) {
    if constexpr (F::SCALE == Scale::SMALL_FLOATS)
        return load(reinterpret_cast<const float*>(super_block) + part * W);
    if constexpr (F::IS_SUPER)
        return half_to_float(reinterpret_cast<const uint16_t*>(super_block) + part * W);
    return splat(1.0f);
}

}  // namespace gdn
