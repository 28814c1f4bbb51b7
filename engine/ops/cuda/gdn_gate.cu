// GDN_GATE: g = a · softplus(alpha + dt), or lower_bound · sigmoid(a · (alpha + dt)) where there is a
// lower bound, and sigmoid(beta), a thread for each entry of g.

#include "gdn_gate.cuh"

namespace gdn {

// Attribute: lower_bound.
enum { G, STEP, ALPHA, BETA, A, DT };

}  // namespace gdn

// Grid: (rows · entries of a row) / threads. An entry is a head, or a key row of a head (KDA).
KERNEL(gdn_gate) {
    using namespace gdn;
    const View& alpha = a.v[ALPHA];
    const int n = gate_entries(alpha), i = blockIdx.x * blockDim.x + threadIdx.x, t = i / n;
    if (t >= a.rows(alpha)) return;
    const GateViews views{a.v[G], a.v[STEP], alpha, a.v[BETA], a.v[A], a.v[DT]};
    gate_entry(views, a.attr[0], t, i - t * n);
}
