// MUL_MAT_ID of many rows: tiles of rows of one expert, as SORT_BY_EXPERT lists them; see gemm.cuh.

#include "gemm.cuh"

namespace gdn {

enum { OUT, X, MATRIX, ORDER, TILES };

// Grid: (tiles, columns / TILE_N). X: bfloat16 rows, [T, in] or [T, U, in]. OUT [T, U, out].
template <int BM>
DEVICE void gemm_experts(const Args& a, char* shared) {
    const View &out = a.v[OUT], &w = a.v[MATRIX];
    const auto* tiles = a.v[TILES].as<int32_t>();
    if (blockIdx.x >= static_cast<uint32_t>(tiles[0])) return;
    const int32_t* at = tiles + 3 * (blockIdx.x + 1);
    const int expert = at[0], n_rows = at[2], first_column = blockIdx.y * TILE_N;
    const int32_t* pairs = a.v[ORDER].as<int32_t>() + at[1];
    const int n_in = w.shape[2], n_out = w.shape[1], per_row = a.v[X].rank == 2 ? out.shape[1] : 1;
    const auto* x = a.v[X].as<uint16_t>();
    const auto row_at = [&](int i) -> const uint16_t* {
        if (i >= n_rows) return nullptr;
        return x + static_cast<int64_t>(pairs[i] / per_row) * n_in;
    };
    const uint8_t* matrix = w.as<uint8_t>() + static_cast<int64_t>(expert) * w.stride[0];
    Gemm<BM> tile(w, matrix, first_column, shared, row_at);
    tile.run();
    tile.store([&](int i, int j, float value) {
        if (i >= n_rows || first_column + j >= n_out) return;
        out.as<float>()[static_cast<int64_t>(pairs[i]) * n_out + first_column + j] = value;
    });
}

}  // namespace gdn

KERNEL_FOR(gemm_experts_32, 3) {
    KERNEL_SHARED(gemm_experts_32, shared, gdn::Gemm<32>::SHARED);
    gdn::gemm_experts<32>(a, shared);
}

KERNEL_FOR(gemm_experts_64, 2) {
    KERNEL_SHARED(gemm_experts_64, shared, gdn::Gemm<64>::SHARED);
    gdn::gemm_experts<64>(a, shared);
}
