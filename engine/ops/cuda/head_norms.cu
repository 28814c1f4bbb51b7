// L2_NORM: x / sqrt(Σx² + eps); RMS_NORM_GATED: rms(x) · weight · act(gate). A warp for each head
// of a row.

#include "vectors.cuh"

namespace gdn {

// What a lane keeps in registers; the rest it reads twice.
constexpr int KEPT = 2;

// scale(Σx²) is what the row is multiplied by; more(c) gives what each column is besides, and is
// asked for before the sum is known.
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

namespace l2 {

// Attribute: eps.
enum { OUT, X };

template <int V>
DEVICE void run(const Args& a, int t, int h) {
    const auto ones = [](int) {
        Floats<V> one;
        for (int j = 0; j < V; j++) one.v[j] = 1.0f;
        return one;
    };
    const auto scale = [&](float sum) { return rsqrt_of(sum + a.attr[0]); };
    norm_head<V>(a.v[X].row(t, h), a.v[OUT].row(t, h), a.v[X].shape[2], scale, ones);
}

}  // namespace l2

namespace gated {

// Attributes: eps, act.
enum { OUT, X, GATE, WEIGHT };
enum { SILU, SIGMOID };

template <int V>
DEVICE void run(const Args& a, int t, int h) {
    const float *gate = a.v[GATE].row(t, h), *weight = a.v[WEIGHT].as<float>();
    const bool is_silu = a.attr[1] == SILU;
    const int n = a.v[X].shape[2];
    const auto factor = [&](int c) {
        const Floats<V> g = load<V>(gate + c);
        Floats<V> w = load<V>(weight + c);
        for (int j = 0; j < V; j++) w.v[j] *= is_silu ? silu(g.v[j]) : sigmoid(g.v[j]);
        return w;
    };
    const auto scale = [&](float sum) {
        return rsqrt_of(sum / static_cast<float>(n) + a.attr[0]);
    };
    norm_head<V>(a.v[X].row(t, h), a.v[OUT].row(t, h), n, scale, factor);
}

}  // namespace gated

// The warp's number among those of all blocks.
DEVICE int warp_number() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

}  // namespace gdn

// Grid: (rows · heads) / warps.
KERNEL(l2_norm, 256) {
    using namespace gdn;
    const View& x = a.v[l2::X];
    const int i = warp_number(), n_heads = x.shape[1], t = i / n_heads, h = i % n_heads;
    if (t >= a.rows(x)) return;
    in_fours(x) && in_fours(a.v[l2::OUT]) ? l2::run<4>(a, t, h) : l2::run<1>(a, t, h);
}

// Grid: (rows · heads) / warps.
KERNEL(rms_norm_gated, 256) {
    using namespace gdn;
    const View& x = a.v[gated::X];
    const int i = warp_number(), n_heads = x.shape[1], t = i / n_heads, h = i % n_heads;
    if (t >= a.rows(x)) return;
    bool fours = true;
    for (int view = gated::OUT; view <= gated::WEIGHT; view++)
        fours = fours && in_fours(a.v[view]);
    fours ? gated::run<4>(a, t, h) : gated::run<1>(a, t, h);
}
