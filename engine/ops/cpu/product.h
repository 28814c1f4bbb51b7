// Products of one panel (16 rows of a weight) with rows of an activation.
//
// A row's sum has the same order of operations however many rows there are, so that results do not
// depend on how rows are grouped.
#pragma once

#include "../layout.h"
#include "simd.h"

namespace gdn {

// One row of an activation: float32, and integers with their scales (per k-block) and sums (per
// SUM_GROUP). Integers are int8. Those of a fine row have 15 bits, 128 · high + low: a k-block is 32
// int8 `high` from -127 to 127, then 32 `low` from -64 to 63.
struct Row {
    const float* x;
    const int8_t* q;
    const float* scale;
    const int32_t* sum;
    bool is_fine;
};

constexpr int SUM_GROUP = 16;
// The most rows of one call, which share a panel while it is in the cache.
constexpr int64_t TILE = 64;

// The sum of an activation's group G of k-block i.
template <typename F, int G>
GDN_INLINE int32_t sum_of(const Row& row, int64_t i) {
    return F::GROUPS == 2 ? row.sum[2 * i + G] : row.sum[2 * i] + row.sum[2 * i + 1];
}

// The same, with the activation's scale.
template <typename F, int G>
GDN_INLINE float scaled_sum(const Row& row, int64_t i) {
    return row.scale[i] * static_cast<float>(sum_of<F, G>(row, i));
}

// acc += scale · x_scale · dot.
GDN_INLINE void add_scaled(vf& acc, vi dot, vf scale, float x_scale) {
    acc = fma(to_float(dot), scale * splat(x_scale), acc);
}

// acc -= min · scaled_sum.
GDN_INLINE void subtract_min(vf& acc, vf min, float scaled_sum) {
    acc = fma(-min, splat(scaled_sum), acc);
}

// out[i] = the 16 rows of a panel times rows[i], for n ≤ TILE rows.
void multiply(int32_t layout, const uint8_t* panel, int64_t n_in, const Row* rows, int64_t n,
              float (*out)[PANEL]);

}  // namespace gdn
