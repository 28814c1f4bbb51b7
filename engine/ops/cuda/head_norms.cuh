// Norms of heads: a warp scales one row.
#pragma once

#include "vectors.cuh"

namespace gdn {

// Vectors that a lane keeps in registers; it reads the rest twice.
constexpr int KEPT = 2;

// Multiplies a row by scale(Σx²) and each column c by more(c), which is called before the sum is
// known.
template <int V, typename Scale, typename More>
DEVICE void norm_head(const float* x, float* out, int n, Scale scale, More more) {
    constexpr int STEP = 32 * V;
    const int first = threadIdx.x % 32 * V;
    Floats<V> kept[KEPT], factors[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = first + i * STEP;
        if (c >= n) break;
        kept[i] = load<V>(x + c);
        factors[i] = more(c);
        sum += squares(kept[i]);
    }
    for (int c = first + KEPT * STEP; c < n; c += STEP) sum += squares(load<V>(x + c));
    const float s = scale(warp_sum(sum));
    const auto put = [&](int c, Floats<V> y, Floats<V> factor) {
        for (int j = 0; j < V; j++) y.v[j] *= s * factor.v[j];
        store<V>(out + c, y);
    };
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (first + i * STEP < n) put(first + i * STEP, kept[i], factors[i]);
    for (int c = first + KEPT * STEP; c < n; c += STEP) put(c, load<V>(x + c), more(c));
}

// x / sqrt(Σx² + eps).
template <int V>
DEVICE void l2_norm_head(const float* x, float* out, int n, float eps) {
    const auto scale = [&](float sum) { return rsqrt_of(sum + eps); };
    const auto ones = [](int) {
        Floats<V> one;
        for (int j = 0; j < V; j++) one.v[j] = 1.0f;
        return one;
    };
    norm_head<V>(x, out, n, scale, ones);
}

}  // namespace gdn
