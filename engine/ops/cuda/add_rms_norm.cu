// ADD_RMS_NORM: the residual sum and its RMS norm, a block for each row.

#include "vectors.cuh"

namespace gdn {

// Attribute: eps. TOTAL and DELTA come together or not at all.
enum { NORM, TOTAL, X, WEIGHT, DELTA };

// Vectors that a thread keeps in registers, with their weights; it reads the rest twice.
constexpr int THREADS = THREADS_add_rms_norm, KEPT = 8;

template <int V>
DEVICE Floats<V> sum_at(const float* x, const float* delta, float* total, int c) {
    Floats<V> sum = load<V>(x + c);
    if (!delta) return sum;
    const Floats<V> more = load<V>(delta + c);
    for (int i = 0; i < V; i++) sum.v[i] += more.v[i];
    store<V>(total + c, sum);
    return sum;
}

template <int V>
DEVICE void scale_at(float* norm, int c, Floats<V> x, float scale, Floats<V> weight) {
    for (int i = 0; i < V; i++) x.v[i] *= scale * weight.v[i];
    store<V>(norm + c, x);
}

template <int V>
DEVICE void norm_row(const Args& a, int64_t t, float* shared) {
    constexpr int STEP = THREADS * V;
    const int n = a.v[X].shape[1], first = threadIdx.x * V;
    const float *x = a.v[X].row(t), *weight = a.v[WEIGHT].as<float>();
    const float* delta = a.v[DELTA] ? a.v[DELTA].row(t) : nullptr;
    float *norm = a.v[NORM].row(t), *total = delta ? a.v[TOTAL].row(t) : nullptr;
    Floats<V> kept[KEPT], weights[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = first + i * STEP;
        if (c >= n) break;
        kept[i] = sum_at<V>(x, delta, total, c);
        weights[i] = load<V>(weight + c);
        sum += squares(kept[i]);
    }
    for (int c = first + KEPT * STEP; c < n; c += STEP)
        sum += squares(sum_at<V>(x, delta, total, c));
    const float mean = block_sum(sum, shared) / static_cast<float>(n);
    const float scale = rsqrt_of(mean + a.attr[0]);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = first + i * STEP;
        if (c < n) scale_at(norm, c, kept[i], scale, weights[i]);
    }
    const float* again = delta ? total : x;
    for (int c = first + KEPT * STEP; c < n; c += STEP)
        scale_at(norm, c, load<V>(again + c), scale, load<V>(weight + c));
}

}  // namespace gdn

// Grid: rows.
KERNEL(add_rms_norm) {
    using namespace gdn;
    __shared__ float shared[32];
    const int t = blockIdx.x;
    if (t >= a.rows(a.v[X])) return;
    bool fours = true;
    for (int i = NORM; i <= DELTA; i++) fours = fours && in_fours(a.v[i]);
    fours ? norm_row<4>(a, t, shared) : norm_row<1>(a, t, shared);
}
