// MUL_MAT of several rows that STAGE_ROWS has made integers: N groups of R rows; see staged.cuh.
#pragma once

#include "product.cuh"
#include "staged.cuh"

namespace gdn {

// PANELS: of a thread block, TEAM_PANELS: of each of its TEAMS. A team's WARPS share the columns;
// teams share rows. SPLITS: into how many parts a single row's launch splits K; where these are not
// thread blocks of their own, each does one part after the other. SLOT_BYTES: of the largest batch.
// REHEARSES: whether the launch does.
enum RowsAttribute {
    PANELS,
    TEAM_PANELS,
    TEAMS,
    WARPS,
    SPLITS,
    SLOT_BYTES,
    REHEARSES,
    FIRST_BLOCKS
};

// A thread block's shared memory: a batch of rows for each warp of a team, slots of all warps, sums of
// a team's warps [PANELS, N, 32] and sums of the splits so far.
template <int R, int N>
struct RowsMemory {
    BatchRows<R>* rows;
    Ring ring;
    float *sums, *totals;
    int n_warps, warp, team, warp_floats;  // Of a team.

    DEVICE RowsMemory(const Args& a, char* shared)
        : n_warps(static_cast<int>(a.attr[WARPS])),
          team(0),
          warp_floats(static_cast<int>(a.attr[PANELS]) * N * R * PANEL) {
        const int own = warp_index(), all = blockDim.x / 32;
        for (warp = own; warp >= n_warps; warp -= n_warps) team++;
        rows = reinterpret_cast<BatchRows<R>*>(shared) + warp * N;
        shared += n_warps * N * sizeof(BatchRows<R>);
        const auto slot_bytes = static_cast<int>(a.attr[SLOT_BYTES]);
        ring = {shared + own * slot_bytes, slot_bytes, 1};
        sums = reinterpret_cast<float*>(shared + all * slot_bytes);
        totals = sums + n_warps * warp_floats;
    }
};

// The products of part z of K with N · R rows from `first` on, to the warps' sums; in a rehearsal those
// of a warp's first batch of one panel.
template <int R, int N>
DEVICE void multiply_part(const Args& a, const Place& at, const RowsMemory<R, N>& memory, int first,
                          int z, int splits, bool real) {
    const View& w = a.v[WEIGHT + at.weight];
    const bool plain = is_plain_layout(w.layout);
    const int n = w.shape[1] / K_BLOCK, warp = z * memory.n_warps + memory.warp;
    const int n_warps = real || plain ? splits * memory.n_warps : n;
    const int teams = static_cast<int>(a.attr[TEAMS]), panels = static_cast<int>(a.attr[PANELS]);
    const int own = static_cast<int>(a.attr[TEAM_PANELS]), begin_panel = memory.team * own;
    const int all = n_panels(w) - at.panel, left = (all < panels ? all : panels) - begin_panel;
    const int most = real || left < 1 ? own : 1;
    const PanelRun run{panel_at(w, at.panel + begin_panel), left < most ? left : most};
    Stream<true> stream(w, run, {}, memory.ring, warp, n_warps);
    float* sums = memory.sums + memory.warp * memory.warp_floats;
    if (!plain && run.n > 0) stream.start();
    if (!plain && real) wait_for_inputs();
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            if (memory.team > 0) return;
            const View& x = a.v[FLOATS] ? a.v[FLOATS] : a.v[X];
            const int t = at.group * PLAIN_ROWS;
            // A rehearsal reads no row that a kernel before may still write.
            const auto row_at = [&](int i) {
                return real ? row_of(x, first + t + i) : w.as<const float>();
            };
            auto* buffer = reinterpret_cast<char*>(memory.rows);
            const auto rows = rows_of_floats<PLAIN_ROWS>(buffer, are_rows_aligned(x), row_at);
            multiply_plain<PLAIN_ROWS>(f, panel_at(w, at.panel), at.half, rows, w.shape[1], warp,
                                       n_warps, sums + t * PANEL, real);
        } else {
            const int lane = threadIdx.x % 32, last = a.v[STAGED].shape[0] - 1;
            auto* lanes = reinterpret_cast<LaneSums<R>*>(sums) + begin_panel * N * 32;
            for (int i = 0; i < run.n * N; i++) lanes[i * 32 + lane] = LaneSums<R>{};
            for (int begin = 0; begin < n; begin += n_warps * BATCH) {
                const int batch = begin + warp * BATCH;
                float scale[N][R / 4];
                if (begin > 0) __syncthreads();  // All teams have read the batch before.
                for (int k = 0; k < N && batch < n; k++) {
                    const int t = first + R * k + own_row<R>();
                    const RowsInMemory x{StagedRow(a.v[STAGED], a.v[HEADS], t < last ? t : last)};
                    share_scale<R>(f, x.fill(f, memory.rows[k], batch, n, memory.team, teams),
                                   scale[k]);
                }
                fence_copies();
                wait_copies<0>();
                __syncthreads();
                if (batch < n && run.n > 0) multiply_panels(f, stream, memory.rows, scale, lanes);
            }
            if (run.n > 0) stream.finish();
        }
    });
    if (real) wait_for_inputs();  // For warps without columns.
}

// Grid: (groups of PANELS panels of all weights, and of plain ones half panels with PLAIN_ROWS rows;
// rows / (N · R); SPLITS or 1, with several there are at most N · R rows).
template <int R, int N>
DEVICE void mul_mat_rows(const Args& a, char* shared, bool real) {
    if (!real && a.attr[REHEARSES] == 0.0f) return;
    constexpr int ROWS = N * R;
    const int panels = static_cast<int>(a.attr[PANELS]), first = blockIdx.y * ROWS;
    const int all_splits = static_cast<int>(a.attr[SPLITS]), own_splits = gridDim.z;
    // The first rows' weights are fetched before the number of live rows is known.
    if (first > 0 && first >= a.rows(a.v[X])) {
        if (real) wait_for_inputs();
        return;
    }
    const Place at(a, FIRST_BLOCKS, panels, ROWS / PLAIN_ROWS);
    const RowsMemory<R, N> memory(a, shared);
    const bool plain = is_plain_layout(a.v[WEIGHT + at.weight].layout);
    // The thread block has rows begin … end - 1, of which those before n are live.
    const int begin = at.group * PLAIN_ROWS, end = plain ? begin + PLAIN_ROWS : ROWS;
    int n = 0;
    // Number i of [panels, ROWS, 16].
    const auto value = [&](int i) {
        const int t = i / PANEL % ROWS, column = i / PANEL / ROWS * PANEL + i % PANEL;
        if (t >= n || column >= at.n_rows) return 0.0f;
        const int where = plain ? t * PANEL + column : sum_at<R, N>(t, column);
        float sum = 0.0f;
        for (int k = 0; k < memory.n_warps; k++) sum += memory.sums[k * memory.warp_floats + where];
        return a.v[FACTORS] ? sum * load_published(a.v[FACTORS].row(first + t)) : sum;
    };
    for (int z = blockIdx.z; z < all_splits; z += own_splits) {
        multiply_part<R, N>(a, at, memory, first, z, all_splits, real);
        n = a.rows(a.v[X]) - first < end ? a.rows(a.v[X]) - first : end;
        __syncthreads();
        if (own_splits == all_splits) break;
        for (int i = threadIdx.x; i < panels * ROWS * PANEL; i += blockDim.x)
            memory.totals[i] = (z > 0 ? memory.totals[i] : 0.0f) + value(i);
        __syncthreads();
    }
    if (own_splits == all_splits)
        finish_products<ROWS>(a, at, first, begin, n, panels, value, real);
    else
        store_products<ROWS>(
            a, at, first, begin, n, panels, [&](int i) { return memory.totals[i]; }, real);
}

}  // namespace gdn
