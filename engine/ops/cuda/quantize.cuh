// Activations as integers of 15 bits: a float32 scale for each batch of 256 columns of a row,
// max |x| / (127 · 128).
#pragma once

#include "kernel.cuh"
#include "layout.h"

namespace gdn {

struct Eight {
    float v[8];
};

struct alignas(16) Floats4 {
    float v[4];
};

// 4 or 8 neighbouring floats; `aligned`: to 16 bytes. PUBLISHED: past the L1 cache.
template <bool PUBLISHED = false>
DEVICE Floats4 load_four(const float* p, bool aligned) {
    Floats4 x;
    if (aligned) {
        const auto* at = reinterpret_cast<const Words4*>(p);
        const Words4 v = PUBLISHED ? load_published(at) : *at;
        for (int i = 0; i < 4; i++) x.v[i] = float_of(v.w[i]);
    } else {
        for (int i = 0; i < 4; i++) x.v[i] = PUBLISHED ? load_published(p + i) : p[i];
    }
    return x;
}
template <bool PUBLISHED = false>
DEVICE Eight load_eight(const float* p, bool aligned) {
    Eight x;
    const Floats4 low = load_four<PUBLISHED>(p, aligned);
    const Floats4 high = load_four<PUBLISHED>(p + 4, aligned);
    for (int i = 0; i < 4; i++) x.v[i] = low.v[i], x.v[i + 4] = high.v[i];
    return x;
}

DEVICE void store_eight(float* p, const Eight& x, bool aligned) {
    if (aligned) {
        auto* at = reinterpret_cast<Floats4*>(p);
        at[0] = {x.v[0], x.v[1], x.v[2], x.v[3]}, at[1] = {x.v[4], x.v[5], x.v[6], x.v[7]};
    } else {
        for (int i = 0; i < 8; i++) p[i] = x.v[i];
    }
}

// Whether all rows of an activation [T, in] or [T, U, in] are aligned to 16 bytes.
DEVICE bool are_rows_aligned(const View& x) {
    const int32_t strides = x.stride[0] | (x.rank == 3 ? x.stride[1] : 0);
    return is_aligned(x.data) && strides % 4 == 0;
}

// The bits of the largest magnitude of 8 floats. As integers, magnitudes are in order, and NaN is the
// largest.
DEVICE uint32_t largest_of(const Eight& x) {
    uint32_t largest = 0;
    for (int i = 0; i < 8; i++) {
        const uint32_t size = bits_of(x.v[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return largest;
}

// The scale of a batch whose largest magnitude is given. A value that is not finite makes the scale
// not finite, so that it shows in the products.
DEVICE float batch_scale(uint32_t largest) { return float_of(largest) * (1.0f / 16256.0f); }

// Four integers' lowest bytes.
DEVICE uint32_t low_bytes(const uint32_t (&n)[4]) {
    const uint32_t low = permute_bytes(n[0], n[1], 0x0040);
    return permute_bytes(low, permute_bytes(n[2], n[3], 0x0040), 0x5410);
}

constexpr int32_t ONES = 0x01010101;
// Added to a small float, it leaves the nearest integer in the lowest bits.
constexpr float ROUNDING = 12582912.0f;

// Integers of 15 bits, high · 128 + low, with low from 0 to 127.
struct Integers {
    uint32_t high[2], low[2];
    int32_t sum;
};

// 8 columns, in units of `scale`.
DEVICE Integers to_integers(const Eight& x, float scale) {
    Integers out;
    const float inverse = scale > 0.0f ? reciprocal_of(scale) : 0.0f;
    int32_t high = 0, low = 0;
    for (int i = 0; i < 2; i++) {
        uint32_t n[4], above[4];
        for (int j = 0; j < 4; j++) {
            n[j] = bits_of(x.v[4 * i + j] * inverse + ROUNDING);
            above[j] = n[j] >> 7;
        }
        out.high[i] = low_bytes(above);
        out.low[i] = low_bytes(n) & 0x7f7f7f7f;
        high = dot4(static_cast<int32_t>(out.high[i]), ONES, high);
        low = dot4(static_cast<int32_t>(out.low[i]), ONES, low);
    }
    out.sum = high * 128 + low;
    return out;
}

}  // namespace gdn
