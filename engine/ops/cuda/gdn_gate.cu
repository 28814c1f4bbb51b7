// GDN_GATE: g = a · softplus(alpha + dt) and sigmoid(beta), a thread for each entry of g.

#include "kernel.cuh"

namespace gdn {

enum { G, STEP, ALPHA, BETA, A, DT };

DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

}  // namespace gdn

// Grid: (rows · entries of a row) / threads. An entry is a head, or a key row of a head (KDA).
KERNEL(gdn_gate, 256) {
    using namespace gdn;
    const View& alpha = a.v[ALPHA];
    const int n_heads = alpha.shape[1], per_head = alpha.rank == 3 ? alpha.shape[2] : 1;
    const int n = n_heads * per_head, i = blockIdx.x * blockDim.x + threadIdx.x, t = i / n;
    if (t >= a.rows(alpha)) return;
    const int c = i - t * n;
    const float x = alpha.row(t)[c] + a.v[DT].as<float>()[c];
    a.v[G].row(t)[c] = a.v[A].as<float>()[c / per_head] * softplus(x);
    if (c < n_heads) a.v[STEP].row(t)[c] = sigmoid(a.v[BETA].row(t)[c]);
}
