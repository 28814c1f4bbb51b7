// Activations as int8, as QUANTIZE_ROWS of the CPU rounds them: a float32 scale per 32 columns,
// max |x| / 127. A single row has room for integers of 15 bits.
//
// Quantized rows are stored as fragments of tensor cores. For 8 rows (ROW_GROUP) and a k-block, Q
// has 8 bytes per lane: lane 4g + c has columns 8c … 8c+7 of row g. SCALE has the scales of the 8
// rows, SUM the sums of the integers of the first 16 columns, then of the second, 8 each.
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

// 8 neighbouring floats; `aligned`: to 16 bytes.
DEVICE Eight load_eight(const float* p, bool aligned) {
    Eight x;
    if (aligned) {
        const auto* at = reinterpret_cast<const Floats4*>(p);
        const Floats4 low = at[0], high = at[1];
        for (int i = 0; i < 4; i++) x.v[i] = low.v[i], x.v[i + 4] = high.v[i];
    } else {
        for (int i = 0; i < 8; i++) x.v[i] = p[i];
    }
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
DEVICE bool is_aligned(const View& x) {
    const int32_t strides = x.stride[0] | (x.rank == 3 ? x.stride[1] : 0);
    return reinterpret_cast<uint64_t>(x.data) % 16 == 0 && strides % 4 == 0;
}

struct Quantized {
    uint32_t q[2];
    float scale;
    int32_t sum;  // Of the 16 columns that this lane has a part of.
};

// The largest magnitude in a k-block, of which each of 4 neighbouring lanes has 8 columns.
DEVICE float largest_of_k_block(const Eight& x) {
    // As integers, magnitudes of floats are in order, and NaN is the largest.
    uint32_t largest = 0;
    for (int i = 0; i < 8; i++) {
        const uint32_t size = bits_of(x.v[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    for (int mask = 1; mask < 4; mask *= 2) {
        const uint32_t other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    return float_of(largest);
}

// Four integers' lowest bytes.
DEVICE uint32_t low_bytes(const uint32_t (&n)[4]) {
    const uint32_t low = permute_bytes(n[0], n[1], 0x0040);
    return permute_bytes(low, permute_bytes(n[2], n[3], 0x0040), 0x5410);
}

constexpr int32_t ONES = 0x01010101;
// Added to a small float, it leaves the nearest integer in the lowest bits.
constexpr float ROUNDING = 12582912.0f;

// Quantizes 8 columns of each lane; 4 neighbouring lanes have a k-block. A value that is not finite
// makes the scale not finite, so that it shows in the products.
DEVICE Quantized quantize(const Eight& x) {
    Quantized out;
    out.scale = largest_of_k_block(x) / 127.0f;
    const float inverse = out.scale > 0.0f ? 1.0f / out.scale : 0.0f;
    out.sum = 0;
    for (int i = 0; i < 2; i++) {
        uint32_t n[4];
        for (int j = 0; j < 4; j++) n[j] = bits_of(x.v[4 * i + j] * inverse + ROUNDING);
        out.q[i] = low_bytes(n);
        out.sum = dot4(static_cast<int32_t>(out.q[i]), ONES, out.sum);
    }
    out.sum += shuffle_xor(out.sum, 1);
    return out;
}

// Integers of 15 bits, high · 128 + low, with low from 0 to 127.
struct Integers {
    uint32_t high[2], low[2];
    float scale;
    int32_t sum;  // Of the 16 columns that this lane has a part of.
};

// As `quantize`, with a scale of max |x| / (127 · 128).
DEVICE Integers to_integers(const Eight& x) {
    Integers out;
    out.scale = largest_of_k_block(x) * (1.0f / 16256.0f);
    const float inverse = out.scale > 0.0f ? reciprocal_of(out.scale) : 0.0f;
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
    out.sum += shuffle_xor(out.sum, 1);
    return out;
}

}  // namespace gdn
