// How the records of a packed weight are read: words of W rows, and their scales.
#pragma once

#include "layout.h"

namespace gdn {

GDN_INLINE vi widen_signed(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vi>(_mm512_maskz_cvtepi8_epi32(ALL, load_as<__m128i>(p)));
#elif defined(__AVX2__)
    return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vi v;
    for (int i = 0; i < W; i++) v[i] = static_cast<int8_t>(p[i]);
    return v;
#endif
}

GDN_INLINE vi widen_unsigned(const uint8_t* p) { return widen_signed(p) & 255; }

GDN_INLINE vi codebook(vi nibbles) {
#if defined(__AVX512F__)
    const __m512i table = _mm512_maskz_broadcast_i32x4(ALL, load_as<__m128i>(IQ4_VALUES));
    return reinterpret_cast<vi>(_mm512_shuffle_epi8(table, reinterpret_cast<__m512i>(nibbles)));
#elif defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(load_as<__m128i>(IQ4_VALUES));
    return reinterpret_cast<vi>(_mm256_shuffle_epi8(table, reinterpret_cast<__m256i>(nibbles)));
#else
    uint8_t bytes[4 * W];
    std::memcpy(bytes, &nibbles, sizeof(bytes));
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(IQ4_VALUES[b]);
    return load_as<vi>(bytes);
#endif
}

// Bytes from what is multiplied to what is fetched. Without it, decoding is a third slower (Xeon,
// measured); 1 KiB is too near, and so is the hint for data that is used once.
constexpr int AHEAD = 4096;

// Word i (4 columns) of the W rows of part p: unsigned bytes, or int8 where F is SIGNED.
template <typename F>
GDN_INLINE vi word(const uint8_t* planes, int i, int p) {
    planes += p * 4 * W;
    if (F::BITS == 8) return load_as<vi>(planes + i * WORD_BYTES);
    vi v{};
    int shift = 0;
    if (F::BITS >= 4) {
        v = load_as<vi>(planes + i / 2 * WORD_BYTES) >> 4 * (i % 2) & 0x0f0f0f0f;
        planes += 4 * WORD_BYTES, shift = 4;
    }
    if (F::BITS % 4 >= 2) {
        const vi two = load_as<vi>(planes + i / 4 * WORD_BYTES) >> 2 * (i % 4) & 0x03030303;
        v |= two << shift;
        planes += 2 * WORD_BYTES, shift += 2;
    }
    if (F::BITS % 2) v |= (load_as<vi>(planes) >> i & 0x01010101) << shift;
    return F::CODEBOOK ? codebook(v) : v;
}

// The scales of W rows for group G of a record, and their mins.
template <typename F, int G>
GDN_INLINE void scales_of(const uint8_t* record, const vf* super, int p, vf& scale, vf& min) {
    const int at = G * ROWS + p * W;
    if (F::IS_SUPER) {
        const vi s = F::HAS_MIN ? widen_unsigned(record + at) : widen_signed(record + at);
        scale = super[p] * to_float(s);
        if (F::HAS_MIN)
            min = super[PARTS + p] * to_float(widen_unsigned(record + F::SCALE_BYTES + at));
    } else {
        const auto* halves = reinterpret_cast<const uint16_t*>(record) + at;
        scale = half_to_float(halves);
        if (F::HAS_MIN) min = half_to_float(halves + F::SCALE_BYTES / 2);
    }
}

}  // namespace gdn
