// Finishes a product y by cuBLAS: y = add + sigmoid(gate) · y.

#include "kernel.cuh"

// Grid: (columns / threads, rows).
KERNEL(finish_product) {
    using namespace gdn;
    enum { OUT, GATE, ADD };
    const int t = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
    const View& out = a.v[OUT];
    if (t >= a.rows(out) || c >= out.shape[1]) return;
    float y = out.row(t)[c];
    if (a.v[GATE]) y *= sigmoid(a.v[GATE].row(t)[0]);
    if (a.v[ADD]) y += a.v[ADD].row(t)[c];
    out.row(t)[c] = y;
}
