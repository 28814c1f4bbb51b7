// SWIGLU: silu(gate) · up, each clamped where the pair has a limit, a thread for four columns of a row.

#include "vectors.cuh"

namespace gdn {

// Attribute: limit, 0 for none.
enum { OUT, GATE, UP };

// Row i of token t. Each axis may have gaps, so the index is split into one per axis.
DEVICE float* row_of(const View& v, int t, int i) {
    float* p = v.row(t);
    for (int axis = v.rank - 2; axis > 0; axis--) {
        p += static_cast<int64_t>(i % v.shape[axis]) * v.stride[axis];
        i /= v.shape[axis];
    }
    return p;
}

// NaN stays NaN.
DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }
DEVICE float at_least(float x, float limit) { return x < limit ? limit : x; }

template <int V>
DEVICE void columns(const Args& a, int t, int i, int c, int n) {
    const float *gate = row_of(a.v[GATE], t, i), *up = row_of(a.v[UP], t, i);
    float* out = row_of(a.v[OUT], t, i);
    const float limit = a.attr[0] > 0.0f ? a.attr[0] : bf16_to_float(0x7f80);  // Infinity.
    for (int k = 0; k < 4 && c + k < n; k += V) {
        const Floats<V> g = load<V>(gate + c + k);
        Floats<V> u = load<V>(up + c + k);
        for (int j = 0; j < V; j++)
            u.v[j] = at_least(at_most(u.v[j], limit), -limit) * at_most(silu(g.v[j]), limit);
        store<V>(out + c + k, u);
    }
}

}  // namespace gdn

// Grid: (tokens · fours of columns / threads, rows of a token).
KERNEL(swiglu) {
    using namespace gdn;
    const View& gate = a.v[GATE];
    const int n = gate.shape[gate.rank - 1], per_row = (n + 3) / 4;
    const int i = blockIdx.x * blockDim.x + threadIdx.x, t = i / per_row, c = i % per_row * 4;
    if (t >= a.rows(gate)) return;
    if (in_fours(gate) && in_fours(a.v[UP]) && in_fours(a.v[OUT]))
        columns<4>(a, t, blockIdx.y, c, n);
    else
        columns<1>(a, t, blockIdx.y, c, n);
}
