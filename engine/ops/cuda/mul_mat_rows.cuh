// MUL_MAT of up to 8 or 16 rows that STAGE_ROWS has made integers; see staged.cuh.
#pragma once

#include "product.cuh"
#include "staged.cuh"

namespace gdn {

// PANELS: of a thread block, TEAM_PANELS: of each of its TEAMS. A team's WARPS share the columns;
// teams share rows. SPLITS: into how many parts a single row's launch splits K; where these are not
// thread blocks of their own, each does one part after the other. SLOT_BYTES: of the largest batch.
enum RowsAttribute { PANELS, TEAM_PANELS, TEAMS, WARPS, SPLITS, SLOT_BYTES, FIRST_BLOCKS };

// A thread block's shared memory: a batch of rows for each warp of a team, slots of all warps, sums of
// a team's warps [PANELS, N, 32] and sums of the splits so far.
template <int N>
struct RowsMemory {
    BatchRows* rows;
    char* slots;
    float *sums, *totals;
    int n_warps, warp, team, warp_floats;  // Of a team.

    DEVICE RowsMemory(const Args& a, char* shared)
        : n_warps(static_cast<int>(a.attr[WARPS])),
          team(0),
          warp_floats(static_cast<int>(a.attr[PANELS]) * N * 32 * 4) {
        const int own = warp_index(), slot_bytes = static_cast<int>(a.attr[SLOT_BYTES]);
        const int all = blockDim.x / 32;
        for (warp = own; warp >= n_warps; warp -= n_warps) team++;
        rows = reinterpret_cast<BatchRows*>(shared) + warp * N;
        shared += n_warps * N * sizeof(BatchRows);
        slots = shared + own * slot_bytes;
        sums = reinterpret_cast<float*>(shared + all * slot_bytes);
        totals = sums + n_warps * warp_floats;
    }
};

// The products of part z of K with 8 · N rows from `first` on, to the warps' sums.
template <int N>
DEVICE void multiply_part(const Args& a, const Place& at, const RowsMemory<N>& memory, int first,
                          int z, int splits) {
    const View& w = a.v[WEIGHT + at.weight];
    const int warp = z * memory.n_warps + memory.warp, n_warps = splits * memory.n_warps;
    const int teams = static_cast<int>(a.attr[TEAMS]), panels = static_cast<int>(a.attr[PANELS]);
    const int own = static_cast<int>(a.attr[TEAM_PANELS]), begin_panel = memory.team * own;
    const int all = n_panels(w) - at.panel, left = (all < panels ? all : panels) - begin_panel;
    const PanelRun run{panel_at(w, at.panel + begin_panel), left < own ? left : own};
    Stream<true> stream(w, run, {}, memory.slots, static_cast<int>(a.attr[SLOT_BYTES]), warp,
                        n_warps);
    float* sums = memory.sums + memory.warp * memory.warp_floats;
    if (!is_plain_layout(w.layout) && run.n > 0) stream.start();
    wait_for_inputs();
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            if (memory.team > 0) return;
            const View& x = a.v[FLOATS] ? a.v[FLOATS] : a.v[X];
            for (int t = 0; t < N * 8; t += 8) {
                const float* rows[8];
                for (int i = 0; i < 8; i++) rows[i] = row_of(x, first + t + i);
                const auto value = [&](int i, int k) { return rows[i][k]; };
                multiply_plain<8>(f, panel_at(w, at.panel), at.half, value, w.shape[1], warp,
                                  n_warps, sums + t * PANEL);
            }
        } else {
            const int n = w.shape[1] / K_BLOCK, lane = threadIdx.x % 32,
                      last = a.v[STAGED].shape[0] - 1;
            auto* lanes = reinterpret_cast<LaneSums*>(sums) + begin_panel * N * 32;
            for (int i = 0; i < run.n * N; i++) lanes[i * 32 + lane] = LaneSums{};
            for (int begin = 0; begin < n; begin += n_warps * BATCH) {
                const int batch = begin + warp * BATCH;
                float scale[N][2];
                if (begin > 0) __syncthreads();  // All teams have read the batch before.
                for (int k = 0; k < N && batch < n; k++) {
                    const int t = first + 8 * k + lane / 4;
                    const RowsInMemory x{StagedRow(a.v[STAGED], a.v[HEADS], t < last ? t : last)};
                    share_scale(f, x.fill(f, memory.rows[k], batch, n, memory.team, teams),
                                scale[k]);
                }
                fence_copies();
                wait_copies<0>();
                __syncthreads();
                if (batch < n && run.n > 0) multiply_panels(f, stream, memory.rows, scale, lanes);
            }
        }
    });
    if (!is_plain_layout(w.layout) && run.n > 0) stream.finish();
}

// Grid: (groups of PANELS panels of all weights, rows / (8 · N), SPLITS or 1; with several there
// are at most 8 · N rows).
template <int N>
DEVICE void mul_mat_rows(const Args& a, char* shared) {
    constexpr int ROWS = 8 * N;
    const int panels = static_cast<int>(a.attr[PANELS]), splits = static_cast<int>(a.attr[SPLITS]);
    const int first = blockIdx.y * ROWS;
    // The first rows' weights are fetched before the number of live rows is known.
    if (first > 0 && first >= a.rows(a.v[X])) {
        wait_for_inputs();
        return;
    }
    const Place at(a, FIRST_BLOCKS, panels);
    const RowsMemory<N> memory(a, shared);
    const bool plain = is_plain_layout(a.v[WEIGHT + at.weight].layout);
    int n = 0;  // Of the rows those that are live.
    // Number i of [panels, ROWS, 16].
    const auto value = [&](int i) {
        const int t = i / PANEL % ROWS, column = i / PANEL / ROWS * PANEL + i % PANEL;
        if (t >= n || column >= at.n_rows) return 0.0f;
        const int where = plain ? t * PANEL + column : sum_at<N>(t, column);
        float sum = 0.0f;
        for (int k = 0; k < memory.n_warps; k++) sum += memory.sums[k * memory.warp_floats + where];
        return a.v[FACTORS] ? sum * a.v[FACTORS].row(first + t)[0] : sum;
    };
    for (int z = blockIdx.z; z < splits; z += gridDim.z) {
        multiply_part<N>(a, at, memory, first, z, splits);
        n = a.rows(a.v[X]) - first < ROWS ? a.rows(a.v[X]) - first : ROWS;
        __syncthreads();
        if (static_cast<int>(gridDim.z) == splits) break;
        for (int i = threadIdx.x; i < panels * ROWS * PANEL; i += blockDim.x)
            memory.totals[i] = (z > 0 ? memory.totals[i] : 0.0f) + value(i);
        __syncthreads();
    }
    if (static_cast<int>(gridDim.z) == splits)
        finish_products<ROWS>(a, at, first, n, panels, value);
    else
        store_products<ROWS>(a, at, first, n, panels, [&](int i) { return memory.totals[i]; });
}

}  // namespace gdn
