// MUL_MAT_ID of several tokens: a thread block for each panel and tile of up to EXPERT_TILE_ROWS
// rows of one expert, as SORT_BY_EXPERT lists them. A row's products don't depend on the tile's
// other rows.

#include "mul_mat.cuh"

namespace gdn {

enum { OUT, X, MATRIX, ORDER, TILES };

template <typename F, typename RowAt>
DEVICE void multiply_tile(F f, const View& w, const uint8_t* panel, RowAt row_at, bool aligned,
                          float* sums) {
    const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_in = w.shape[2];
    if constexpr (is_plain(F{})) {
        const float* rows[EXPERT_TILE_ROWS];
        for (int i = 0; i < EXPERT_TILE_ROWS; i++) rows[i] = row_at(i);
        const auto value = [&](int i, int k) { return rows[i][k]; };
        for (int half = 0; half < 2; half++)
            multiply_plain<EXPERT_TILE_ROWS>(f, panel, half, value, n_in, warp, n_warps,
                                             sums + warp * EXPERT_TILE_ROWS * PANEL + half * HALF);
    } else {
        FloatRows<EXPERT_TILE_ROWS> rows(row_at, n_in / K_BLOCK, aligned);
        multiply_panel(f, panel, rows, warp, n_warps, sums + warp * EXPERT_TILE_ROWS * PANEL);
    }
}

}  // namespace gdn

// Grid: (panels, tiles). OUT [T, U, out]. Dynamic shared memory: warps · 8 · 16 floats.
KERNEL_FOR(mul_mat_id_rows, 1) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const View &out = a.v[OUT], &x = a.v[X], &w = a.v[MATRIX];
    const auto* tiles = a.v[TILES].as<int32_t>();
    if (blockIdx.y >= static_cast<uint32_t>(tiles[0])) return;
    const int32_t* tile = tiles + 3 * (blockIdx.y + 1);
    const int32_t* pairs = a.v[ORDER].as<int32_t>() + tile[1];
    const int n = tile[2], n_used = out.shape[1], n_warps = blockDim.x / 32;
    const uint8_t* panel = panel_at(w, blockIdx.x) + static_cast<int64_t>(tile[0]) * w.stride[0];
    const auto row_at = [&](int i) {
        const int pair = pairs[i < n ? i : n - 1], t = pair / n_used;
        return x.rank == 3 ? x.row(t, pair % n_used) : x.row(t);
    };
    const bool aligned = is_aligned(x);
    with_format(w.layout, [&](auto f) { multiply_tile(f, w, panel, row_at, aligned, sums); });
    __syncthreads();
    for (int i = threadIdx.x; i < n * PANEL; i += blockDim.x) {
        const int column = blockIdx.x * PANEL + i % PANEL, pair = pairs[i / PANEL];
        if (column >= w.shape[1]) continue;
        float value = 0.0f;
        for (int k = 0; k < n_warps; k++) value += sums[k * EXPERT_TILE_ROWS * PANEL + i];
        out.row(pair / n_used, pair % n_used)[column] = value;
    }
}
