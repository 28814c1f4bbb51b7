// MUL_MAT of many rows with one packed weight; see gemm.cuh.

#include "gemm.cuh"

namespace gdn {

enum { OUT, X, WEIGHT, GATE, ADD };

// Grid: (rows / BM, columns / TILE_N). X: bfloat16 rows, as ROUND_ROWS makes them.
template <int BM>
DEVICE void gemm(const Args& a, char* shared) {
    const View &out = a.v[OUT], &w = a.v[WEIGHT];
    const int n_rows = a.rows(out), first = blockIdx.x * BM, first_column = blockIdx.y * TILE_N;
    if (first >= n_rows) return;
    const auto* x = a.v[X].as<uint16_t>();
    const auto row_at = [&](int i) -> const uint16_t* {
        const int64_t row = first + i;
        return row < n_rows ? x + row * w.shape[1] : nullptr;
    };
    Gemm<BM> tile(w, w.as<uint8_t>(), first_column, shared, row_at);
    tile.run();
    tile.store([&](int i, int j, float value) {
        const int t = first + i, column = first_column + j;
        if (t >= n_rows || column >= w.shape[0]) return;
        if (a.v[GATE]) value *= sigmoid(a.v[GATE].row(t)[0]);
        if (a.v[ADD]) value += a.v[ADD].row(t)[column];
        out.row(t)[column] = value;
    });
}

}  // namespace gdn

KERNEL_FOR(gemm_64, 2) {
    KERNEL_SHARED(gemm_64, shared, gdn::Gemm<64>::SHARED);
    gdn::gemm<64>(a, shared);
}

KERNEL_FOR(gemm_128, 2) {
    KERNEL_SHARED(gemm_128, shared, gdn::Gemm<128>::SHARED);
    gdn::gemm<128>(a, shared);
}
