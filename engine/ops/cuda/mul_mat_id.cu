// MUL_MAT_ID of few tokens: a block for each panel and (token, choice), or token; see mul_mat.cuh.

#include "mul_mat.cuh"

namespace gdn {

// There is a live token wherever a kernel is launched, so that the first one needs no check.
constexpr int MAX_MATRICES = 4;
enum MulMatId { OUT, X = MAX_MATRICES, MATRIX, IDS = MATRIX + MAX_MATRICES, WEIGHTS };

// Which matrix and panel a block has.
struct ExpertPlace {
    int matrix, panel;

    DEVICE explicit ExpertPlace(const Args& a) : matrix(0), panel(blockIdx.x) {
        bool found = false;
#pragma unroll
        for (int i = 0; i + 1 < MAX_MATRICES; i++) {
            const int n = (a.v[MATRIX + i].shape[1] + ROWS - 1) / ROWS;
            found = found || panel < n;
            if (!found) panel -= n, matrix = i + 1;
        }
    }
};

// The part of warp `warp` of n in the products of a pair's panel, to sums [16].
template <typename F>
DEVICE void multiply_pair(F f, const Args& a, const ExpertPlace& at, int t, int u, int warp, int n,
                          float* sums) {
    const View &x = a.v[X], &w = a.v[MATRIX + at.matrix], &ids = a.v[IDS];
    const int64_t expert = ids.as<int32_t>()[t * ids.stride[0] + u * ids.stride[1]];
    const uint8_t* panel = panel_at(w, at.panel) + expert * w.stride[0];
    const float* row = x.rank == 3 ? x.row(t, u) : x.row(t);
    const auto row_at = [&](int) { return row; };
    const int n_in = w.shape[2];
    if constexpr (is_plain(F{})) {
        for (int half = 0; half < 2; half++)
            multiply_plain<1>(f, panel, half, row_at, n_in, warp, n, sums + half * HALF);
    } else {
        FloatRows<1> rows(row_at, n_in / RECORD, is_aligned(x));
        multiply_panel(f, panel, rows, warp, n, sums);
    }
}

}  // namespace gdn

// Grid: (panels of all matrices, U, T). Dynamic shared memory: warps · 16 floats.
KERNEL_FOR(mul_mat_id, 256, 3) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const int t = blockIdx.z, u = blockIdx.y, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    if (t > 0 && t >= a.rows(a.v[IDS])) return;
    const ExpertPlace at(a);
    const View& w = a.v[MATRIX + at.matrix];
    with_format(w.layout, [&](auto f) {
        multiply_pair(f, a, at, t, u, warp, n_warps, sums + warp * ROWS);
    });
    __syncthreads();
    const int r = threadIdx.x, column = at.panel * ROWS + r;
    if (r >= ROWS || column >= w.shape[1]) return;
    float value = 0.0f;
    for (int i = 0; i < n_warps; i++) value += sums[i * ROWS + r];
    a.v[OUT + at.matrix].row(t, u)[column] = value;
}

// With the weighted sum over a token's experts. Grid: (panels of all matrices, T). Attribute: how
// many warps share an expert. Dynamic shared memory: U · that · 16 floats.
KERNEL_FOR(mul_mat_id_sum, 256, 2) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const int t = blockIdx.y, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const int share = static_cast<int>(a.attr[0]), n_used = a.v[IDS].shape[1];
    if (t > 0 && t >= a.rows(a.v[IDS])) return;
    const ExpertPlace at(a);
    const View &w = a.v[MATRIX + at.matrix], &weights = a.v[WEIGHTS];
    with_format(w.layout, [&](auto f) {
        for (int u = warp / share; u < n_used; u += n_warps / share)
            multiply_pair(f, a, at, t, u, warp % share, share,
                          sums + (u * share + warp % share) * ROWS);
    });
    __syncthreads();
    const int r = threadIdx.x, column = at.panel * ROWS + r;
    if (r >= ROWS || column >= w.shape[1]) return;
    float total = 0.0f;
    for (int u = 0; u < n_used; u++) {
        float value = 0.0f;
        for (int i = 0; i < share; i++) value += sums[(u * share + i) * ROWS + r];
        total += weights.row(t)[u * weights.stride[1]] * value;
    }
    a.v[OUT + at.matrix].row(t)[column] = total;
}
