// ROUND_ROWS: rows of an activation [T, in] or [T, U, in] as bfloat16 without gaps.

#include "quantize.cuh"

// Grid: (in / (8 · threads), U, T).
KERNEL(round_rows) {
    using namespace gdn;
    enum { OUT, X };
    const View& x = a.v[X];
    const int n_in = x.shape[x.rank - 1], n_used = x.rank == 3 ? x.shape[1] : 1;
    const int t = blockIdx.z, u = blockIdx.y, k = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (t >= a.rows(x) || k >= n_in) return;
    const float* from = (x.rank == 3 ? x.row(t, u) : x.row(t)) + k;
    uint16_t* to = a.v[OUT].as<uint16_t>() + (static_cast<int64_t>(t) * n_used + u) * n_in + k;
    if (n_in % 8 == 0) {
        const Eight v = load_eight(from, are_rows_aligned(x));
        Words4 packed;
        for (int i = 0; i < 4; i++) packed.w[i] = pack_bf16(v.v[2 * i], v.v[2 * i + 1]);
        *reinterpret_cast<Words4*>(to) = packed;
        return;
    }
    for (int i = 0; i < 8 && k + i < n_in; i++) to[i] = float_to_bf16(from[i]);
}
