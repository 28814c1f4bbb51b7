// MUL_MAT_ID of experts' gate and up projections with the SWIGLU of both, for up to 64 tokens whose
// rows are staged: a thread block for PANELS panels of each and a tile.

#include "experts.cuh"

namespace gdn {

// OUT: the hidden rows [T, U, n]. X: the rows as floats.
enum { OUT, X, STAGED, HEADS, GATE, UP, ORDER, TILES };
// UP_PANEL: up's first panel, where both are one matrix.
enum { PANELS, SLOT_BYTES, BATCH_BYTES, UP_PANEL };

}  // namespace gdn

// Grid: (groups of gate's panels, tiles).
KERNEL_FOR(experts_hidden, 1) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    const auto attribute = [&](int i) { return static_cast<int>(a.attr[i]); };
    const int panels = attribute(PANELS), first = blockIdx.x * panels;
    const ExpertMemory memory(shared, 2 * panels, attribute(SLOT_BYTES), attribute(BATCH_BYTES));
    const ExpertTile tile(a.v[ORDER], a.v[TILES], blockIdx.y);
    if (tile.n == 0) return;
    const View &out = a.v[OUT], &gate = a.v[GATE], &up = a.v[UP];
    const int n_used = out.shape[1], left = out.shape[2] / PANEL - first;
    const int n = left < panels ? left : panels;
    const auto run = [&](const View& w, int panel) {
        return PanelRun{tile.matrix(w) + static_cast<int64_t>(panel) * w.stride[1], n};
    };
    const RowsInMemory rows{
        StagedRow(a.v[STAGED], a.v[HEADS], tile.pair(threadIdx.x % 32 / 4) / n_used)};
    const auto row_at = [&](int i) { return a.v[X].row(tile.pair(i) / n_used); };
    multiply_tile<2>(gate, run(gate, first), run(up, attribute(UP_PANEL) + first), tile.n, rows,
                     row_at, are_rows_aligned(a.v[X]), attribute(SLOT_BYTES), memory);
    __syncthreads();
    for (int i = threadIdx.x; i < n * EXPERT_TILE_ROWS * PANEL; i += blockDim.x) {
        const int row = i / PANEL % EXPERT_TILE_ROWS;
        const int own = i / PANEL / EXPERT_TILE_ROWS * PANEL + i % PANEL;
        if (row >= tile.n) continue;
        const auto total = [&](int column) {
            return memory.total(tile.n > 1 ? sum_at<1>(row, column) : column);
        };
        const int pair = tile.pairs[row];
        out.row(pair / n_used, pair % n_used)[first * PANEL + own] =
            total(n * PANEL + own) * silu(total(own));
    }
}
