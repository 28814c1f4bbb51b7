// GDN_GATE: g = a · softplus(alpha + dt) and sigmoid(beta), a thread for each entry of g.

#include "gdn_gate.cuh"

namespace gdn {

enum { G, STEP, ALPHA, BETA, A, DT };

}  // namespace gdn

// Grid: (rows · entries of a row) / threads. An entry is a head, or a key row of a head (KDA).
KERNEL(gdn_gate) {
    using namespace gdn;
    const View& alpha = a.v[ALPHA];
    const int n = gate_entries(alpha), i = blockIdx.x * blockDim.x + threadIdx.x, t = i / n;
    if (t >= a.rows(alpha)) return;
    gate_entry({a.v[G], a.v[STEP], alpha, a.v[BETA], a.v[A], a.v[DT]}, t, i - t * n);
}
