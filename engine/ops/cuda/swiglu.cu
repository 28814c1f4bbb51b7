// SWIGLU: silu(gate) · up, a thread for each column of a row.

#include "kernel.cuh"

namespace gdn {

// Row i of token t. Any of the axes may have gaps, so its index is taken apart.
DEVICE float* row_of(const View& v, int64_t t, int i) {
    float* p = v.row(t);
    for (int axis = v.rank - 2; axis > 0; axis--) {
        p += static_cast<int64_t>(i % v.shape[axis]) * v.stride[axis];
        i /= v.shape[axis];
    }
    return p;
}

}  // namespace gdn

// Grid: (columns / threads, rows of a token, tokens).
KERNEL(swiglu, 256) {
    using namespace gdn;
    enum { OUT, GATE, UP };
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    const int t = blockIdx.z, i = blockIdx.y;
    const View& gate = a.v[GATE];
    if (t >= a.rows(gate) || c >= gate.shape[gate.rank - 1]) return;
    row_of(a.v[OUT], t, i)[c] = silu(row_of(gate, t, i)[c]) * row_of(a.v[UP], t, i)[c];
}
