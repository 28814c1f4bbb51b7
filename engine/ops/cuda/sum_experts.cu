// SUM_EXPERTS: a token's results of its experts, weighted, in the router's order.

#include "kernel.cuh"

// Grid: (columns / threads, tokens).
KERNEL(sum_experts) {
    using namespace gdn;
    enum { OUT, PARTIAL, WEIGHTS };
    const View &out = a.v[OUT], &partial = a.v[PARTIAL], &weights = a.v[WEIGHTS];
    const int t = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x, n = out.shape[1];
    if (t >= a.rows(out) || c >= n) return;
    float total = 0.0f;
    for (int u = 0; u < partial.shape[1]; u++)
        total = fmaf(weights.row(t)[u * weights.stride[1]], partial.row(t, u)[c], total);
    out.row(t)[c] = total;
}
