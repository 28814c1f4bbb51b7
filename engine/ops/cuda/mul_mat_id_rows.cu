// MUL_MAT_ID of up to 64 tokens: a thread block for PANELS panels of a matrix and a tile, whose rows
// it rounds for itself.

#include "experts.cuh"

namespace gdn {

enum { OUT, X = MAX_MATRICES, MATRIX, ORDER = MATRIX + MAX_MATRICES, TILES };

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
template <int R, typename F, typename Rows>
DEVICE void multiply_plain_tile(F f, const Rows& rows, const uint8_t* panel, int n_in, float* sums,
                                bool real) {
    for (int half = 0; half < 2; half++)
        multiply_plain<R>(f, panel, half, rows, n_in, threadIdx.x / 32, blockDim.x / 32,
                          sums + half * HALF, real);
}

}  // namespace gdn

// Grid: (groups of panels of all matrices, tiles). OUT [T, U, out].
REHEARSED_KERNEL(mul_mat_id_rows, 1, 2) {
    using namespace gdn;
    if (!rehearsal) wait_for_inputs();
    DYNAMIC_SHARED(shared);
    const int panels = static_cast<int>(a.attr[PANELS]);
    const ExpertMemory memory(a, shared, panels);
    const ExpertTile tile(a.v[ORDER], a.v[TILES], blockIdx.y, rehearsal);
    if (tile.n == 0) return;
    const ExpertPlace at(a, panels);
    const View &w = a.v[MATRIX + at.matrix], &out = a.v[OUT + at.matrix];
    const int left = n_panels(w) - at.panel;
    const int n = rehearsal ? 1 : left < panels ? left : panels;
    const uint8_t* panel = tile.matrix(w) + static_cast<int64_t>(at.panel) * w.stride[1];
    const View& x = a.v[X];
    const bool plain = is_plain_layout(w.layout);
    const int n_used = out.shape[1], n_in = w.shape[2];
    const auto row_at = [&](int i) {
        return rehearsal ? w.as<const float>() : row_of(x, tile, i, n_used);
    };
    const bool aligned = are_rows_aligned(x);
    if (plain) {
        with_plain(w.layout, [&](auto f) {
            const auto multiply = [&](auto rows) {
                multiply_plain_tile<decltype(rows)::N_ROWS>(f, rows, panel, n_in, memory.own,
                                                            rehearsal == 0);
            };
            if (tile.n == 1)
                multiply(rows_of_floats<1>(memory.batches, aligned, row_at));
            else
                multiply(rows_of_floats<EXPERT_TILE_ROWS>(memory.batches, aligned, row_at));
        });
    } else {
        multiply_tile<1>(w, {panel, n}, {}, tile.n,
                         FloatRows{row_at(own_row<EXPERT_TILE_ROWS>()), aligned}, row_at, aligned,
                         memory);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.n * n * PANEL; i += blockDim.x) {
        const int row = i / (n * PANEL), own = i % (n * PANEL), column = at.panel * PANEL + own;
        if (column >= w.shape[1]) continue;
        const bool is_lanes = !plain && tile.n > 1;
        const int pair = tile.pair(row);
        const float value =
            memory.total(is_lanes ? sum_at<EXPERT_TILE_ROWS, 1>(row, own) : row * PANEL + own);
        if (!rehearsal) out.row(pair / n_used, pair % n_used)[column] = value;
    }
}
