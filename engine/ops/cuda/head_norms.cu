// L2_NORM: x / sqrt(Σx² + eps); RMS_NORM_GATED: rms(x) · weight · act(gate). A warp for each head
// of a row.

#include "head_norms.cuh"

namespace gdn {

namespace l2 {

// Attribute: eps.
enum { OUT, X };

template <int V>
DEVICE void run(const Args& a, int t, int h) {
    l2_norm_head<V>(a.v[X].row(t, h), a.v[OUT].row(t, h), a.v[X].shape[2], a.attr[0]);
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
    const auto scale = [&](float sum) { return rsqrt_of(sum / static_cast<float>(n) + a.attr[0]); };
    norm_head<V>(a.v[X].row(t, h), a.v[OUT].row(t, h), n, scale, factor);
}

}  // namespace gated

// The warp's number among those of all blocks.
DEVICE int warp_number() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

}  // namespace gdn

// Grid: (rows · heads) / warps.
KERNEL(l2_norm) {
    using namespace gdn;
    const View& x = a.v[l2::X];
    const int i = warp_number(), n_heads = x.shape[1], t = i / n_heads, h = i % n_heads;
    if (t >= a.rows(x)) return;
    in_fours(x) && in_fours(a.v[l2::OUT]) ? l2::run<4>(a, t, h) : l2::run<1>(a, t, h);
}

// Grid: (rows · heads) / warps.
KERNEL(rms_norm_gated) {
    using namespace gdn;
    const View& x = a.v[gated::X];
    const int i = warp_number(), n_heads = x.shape[1], t = i / n_heads, h = i % n_heads;
    if (t >= a.rows(x)) return;
    bool fours = true;
    for (int view = gated::OUT; view <= gated::WEIGHT; view++) fours = fours && in_fours(a.v[view]);
    fours ? gated::run<4>(a, t, h) : gated::run<1>(a, t, h);
}
