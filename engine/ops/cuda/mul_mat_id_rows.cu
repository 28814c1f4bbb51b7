// MUL_MAT_ID of up to 64 tokens: a thread block for PANELS panels of a matrix and a tile, whose rows
// it rounds for itself.

#include "experts.cuh"

namespace gdn {

enum { OUT, X = MAX_MATRICES, MATRIX, ORDER = MATRIX + MAX_MATRICES, TILES };
enum { PANELS, SLOT_BYTES, BATCH_BYTES };

// The matrix of a thread block, and its first panel.
struct ExpertPlace {
    int matrix, panel;

    DEVICE ExpertPlace(const Args& a, int panels) : matrix(0), panel(blockIdx.x * panels) {
        bool found = false;
#pragma unroll
        for (int i = 0; i + 1 < MAX_MATRICES; i++) {
            const int n = (a.v[MATRIX + i].shape[1] + PANEL - 1) / PANEL;
            const int padded = (n + panels - 1) / panels * panels;
            found = found || panel < padded;
            if (!found) panel -= padded, matrix = i + 1;
        }
    }
};

// The row of x [T, in] or [T, U, in] that a tile's row i has.
DEVICE const float* row_of(const View& x, const ExpertTile& tile, int i, int n_used) {
    const int pair = tile.pair(i);
    return x.rank == 3 ? x.row(pair / n_used, pair % n_used) : x.row(pair / n_used);
}

// The products of plain weights: a panel, in two halves.
template <int R, typename F, typename RowAt>
DEVICE void multiply_plain_tile(F f, RowAt row_at, const uint8_t* panel, int n_in, float* sums) {
    const float* rows[R];
    for (int i = 0; i < R; i++) rows[i] = row_at(i);
    const auto value = [&](int i, int k) { return rows[i][k]; };
    for (int half = 0; half < 2; half++)
        multiply_plain<R>(f, panel, half, value, n_in, threadIdx.x / 32, blockDim.x / 32,
                          sums + half * HALF);
}

}  // namespace gdn

// Grid: (groups of panels of all matrices, tiles). OUT [T, U, out].
KERNEL_FOR(mul_mat_id_rows, 1) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    const auto attribute = [&](int i) { return static_cast<int>(a.attr[i]); };
    const int panels = attribute(PANELS);
    const ExpertMemory memory(shared, panels, attribute(SLOT_BYTES), attribute(BATCH_BYTES));
    const ExpertTile tile(a.v[ORDER], a.v[TILES], blockIdx.y);
    if (tile.n == 0) return;
    const ExpertPlace at(a, panels);
    const View &w = a.v[MATRIX + at.matrix], &out = a.v[OUT + at.matrix];
    const int left = n_panels(w) - at.panel, n = left < panels ? left : panels;
    const uint8_t* panel = tile.matrix(w) + static_cast<int64_t>(at.panel) * w.stride[1];
    const View& x = a.v[X];
    const bool plain = is_plain_layout(w.layout);
    const int n_used = out.shape[1], n_in = w.shape[2];
    const auto row_at = [&](int i) { return row_of(x, tile, i, n_used); };
    if (plain) {
        with_plain(w.layout, [&](auto f) {
            if (tile.n == 1)
                multiply_plain_tile<1>(f, row_at, panel, n_in, memory.own);
            else
                multiply_plain_tile<EXPERT_TILE_ROWS>(f, row_at, panel, n_in, memory.own);
        });
    } else {
        const bool aligned = are_rows_aligned(x);
        multiply_tile<1>(w, {panel, n}, {}, tile.n,
                         FloatRows{row_at(threadIdx.x % 32 / 4), aligned}, row_at, aligned,
                         attribute(SLOT_BYTES), memory);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * EXPERT_TILE_ROWS * PANEL; i += blockDim.x) {
        const int row = i / PANEL % EXPERT_TILE_ROWS;
        const int own = i / PANEL / EXPERT_TILE_ROWS * PANEL + i % PANEL;
        const int column = at.panel * PANEL + own;
        if (row >= tile.n || column >= w.shape[1]) continue;
        const bool is_lanes = !plain && tile.n > 1;
        const int pair = tile.pairs[row];
        out.row(pair / n_used, pair % n_used)[column] =
            memory.total(is_lanes ? sum_at<1>(row, own) : row * PANEL + own);
    }
}
