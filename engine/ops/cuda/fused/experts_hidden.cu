// MUL_MAT_ID of experts' gate and up projections with the SWIGLU of both, for up to 64 tokens whose
// rows are staged: a thread block for PANELS panels of each and a tile.

#include "experts.cuh"

namespace gdn {

// OUT: the hidden rows [T, U, n]. X: the rows as floats.
enum { OUT, X, STAGED, HEADS, GATE, UP, ORDER, TILES };
// UP_PANEL: up's first panel, where both are one matrix.
enum { UP_PANEL = OWN_ATTRIBUTES };

}  // namespace gdn

// Grid: (groups of gate's panels, tiles).
REHEARSED_KERNEL(experts_hidden, 1, 2) {
    using namespace gdn;
    if (!rehearsal) wait_for_inputs();
    DYNAMIC_SHARED(shared);
    const auto attribute = [&](int i) { return static_cast<int>(a.attr[i]); };
    const int panels = attribute(PANELS), first = blockIdx.x * panels;
    const ExpertMemory memory(a, shared, 2 * panels);
    const ExpertTile tile(a.v[ORDER], a.v[TILES], blockIdx.y, rehearsal);
    if (tile.n == 0) return;
    const View &out = a.v[OUT], &gate = a.v[GATE], &up = a.v[UP];
    const int n_used = out.shape[1], left = out.shape[2] / PANEL - first;
    const int n = rehearsal ? 1 : left < panels ? left : panels;
    const auto run = [&](const View& w, int panel) {
        return PanelRun{tile.matrix(w) + static_cast<int64_t>(panel) * w.stride[1], n};
    };
    const RowsInMemory rows{
        StagedRow(a.v[STAGED], a.v[HEADS], tile.pair(own_row<EXPERT_TILE_ROWS>()) / n_used)};
    const auto row_at = [&](int i) {
        return rehearsal ? gate.as<const float>() : a.v[X].row(tile.pair(i) / n_used);
    };
    multiply_tile<2>(gate, run(gate, first), run(up, attribute(UP_PANEL) + first), tile.n, rows,
                     row_at, are_rows_aligned(a.v[X]), memory);
    __syncthreads();
    for (int i = threadIdx.x; i < tile.n * n * PANEL; i += blockDim.x) {
        const int row = i / (n * PANEL), own = i % (n * PANEL);
        const auto total = [&](int column) {
            return memory.total(tile.n > 1 ? sum_at<EXPERT_TILE_ROWS, 1>(row, column) : column);
        };
        const int pair = tile.pair(row);
        const float value = total(n * PANEL + own) * silu(total(own));
        if (!rehearsal) out.row(pair / n_used, pair % n_used)[first * PANEL + own] = value;
    }
}
