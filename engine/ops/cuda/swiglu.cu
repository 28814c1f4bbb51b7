// SWIGLU: silu(gate) · up, a thread for four columns of a row.

#include "vectors.cuh"

namespace gdn {

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

template <int V>
DEVICE void columns(const Args& a, int t, int i, int c, int n) {
    const float *gate = row_of(a.v[GATE], t, i), *up = row_of(a.v[UP], t, i);
    float* out = row_of(a.v[OUT], t, i);
    for (int k = 0; k < 4 && c + k < n; k += V) {
        const Floats<V> g = load<V>(gate + c + k);
        Floats<V> u = load<V>(up + c + k);
        for (int j = 0; j < V; j++) u.v[j] *= silu(g.v[j]);
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
