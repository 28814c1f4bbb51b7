// Activations as int8, as QUANTIZE_ROWS of the CPU rounds them: a float32 scale per 32 columns,
// max |x| / 127.
//
// Quantized rows lie as tensor cores take them. For 8 rows and a record: Q has 8 bytes per lane,
// for lane 4g + c columns 8c … 8c+7 of row g; SCALE has the scales of the 8 rows; SUM the sums of the
// integers of the first and the second 16 columns, 8 each.
#pragma once

#include "layout.cuh"

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

// Whether all rows of an activation [T, in] or [T, U, in] begin where 16 bytes can be loaded.
DEVICE bool is_aligned(const View& x) {
    const int32_t strides = x.stride[0] | (x.rank == 3 ? x.stride[1] : 0);
    return reinterpret_cast<uint64_t>(x.data) % 16 == 0 && strides % 4 == 0;
}

struct Quantized {
    uint32_t q[2];
    float scale;
    int32_t sum;  // Of the 16 columns that this lane has a part of.
};

// Quantizes 8 columns of each lane; 4 neighbouring lanes have a record's. What is not finite makes
// the scale not finite, so that it is not lost.
DEVICE Quantized quantize(const Eight& x) {
    // As integers, sizes of floats are in order, and NaN is the largest.
    uint32_t largest = 0;
    for (int i = 0; i < 8; i++) {
        const uint32_t size = bits_of(x.v[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    for (int mask = 1; mask < 4; mask *= 2) {
        const uint32_t other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    Quantized out;
    out.scale = float_of(largest) / 127.0f;
    const float inverse = out.scale > 0.0f ? 1.0f / out.scale : 0.0f;
    out.sum = 0;
    for (int i = 0; i < 2; i++) {
        uint32_t n[4];
        // Rounds to the nearest integer, which is then in the low bits.
        for (int j = 0; j < 4; j++) n[j] = bits_of(x.v[4 * i + j] * inverse + 12582912.0f);
        const uint32_t low = permute_bytes(n[0], n[1], 0x0040);
        const uint32_t high = permute_bytes(n[2], n[3], 0x0040);
        out.q[i] = permute_bytes(low, high, 0x5410);
        out.sum = dot4(static_cast<int32_t>(out.q[i]), 0x01010101, out.sum);
    }
    out.sum += shuffle_xor(out.sum, 1);
    return out;
}

}  // namespace gdn
