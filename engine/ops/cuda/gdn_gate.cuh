// One entry of GDN_GATE.
#pragma once

#include "kernel.cuh"

namespace gdn {

DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Outputs g and step, then operands.
struct GateViews {
    const View &g, &step, &alpha, &beta, &a, &dt;
};

// Entry c of row t: a head, or a key row of a head (KDA). lower_bound: 0 for none.
DEVICE void gate_entry(const GateViews& v, float lower_bound, int t, int c) {
    const int n_heads = v.alpha.shape[1], per_head = v.alpha.rank == 3 ? v.alpha.shape[2] : 1;
    const float x = v.alpha.row(t)[c] + v.dt.as<float>()[c];
    const float scale = v.a.as<float>()[c / per_head];
    v.g.row(t)[c] = lower_bound != 0.0f ? lower_bound * sigmoid(scale * x) : scale * softplus(x);
    if (c < n_heads) v.step.row(t)[c] = sigmoid(v.beta.row(t)[c]);
}

DEVICE int gate_entries(const View& alpha) {
    return alpha.shape[1] * (alpha.rank == 3 ? alpha.shape[2] : 1);
}

}  // namespace gdn
