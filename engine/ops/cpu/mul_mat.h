// The parts of MUL_MAT: one activation, as rows and as tiles, times panels of a weight.
#pragma once

#include <algorithm>

#include "byte_tiles.h"
#include "expand.h"
#include "kernel.h"
#include "product.h"

namespace gdn {

// An activation's views, one after another among a kernel's operands: float32 rows; integer rows
// with scales and sums (absent where the weights are plain); and the rows of row tiles as bfloat16 tiles
// (absent where there are none: then those rows are multiplied one by one like all others).
struct Activation {
    const View &x, &q, &scale, &sum, &tiles;
    const Rows& step;

    Activation(const Args& a, int first)
        : x(a.v[first]),
          q(a.v[first + 1]),
          scale(a.v[first + 2]),
          sum(a.v[first + 3]),
          tiles(a.v[first + 4]),
          step(*a.step) {}

    int64_t n_tiled() const { return tiles ? step.n_tiled : 0; }
    // Rows of row tiles, from the first on, as bfloat16 tiles.
    const bf16* tiled(int64_t first) const { return tiles.as<bf16>() + first * x.shape[1]; }
    // Rows that are multiplied one by one: how many of n, and which.
    int64_t n_single(int64_t n) const { return tiles ? step.n_remainder : n; }
    int64_t single(int64_t i) const {
        return tiles ? step.remainder[i] : x.dim == N_TOKENS ? step.by_kind[i] : i;
    }

    Row row(int64_t t) const {
        if (!q) return {x.row(t), nullptr, nullptr, nullptr, false};
        return {x.row(t), q.as<int8_t>() + t * q.stride[0], scale.row(t),
                sum.as<int32_t>() + t * sum.stride[0], step.is_fine(x, t)};
    }
};

inline int64_t n_panels(const View& weight) { return (weight.shape[0] + PANEL - 1) / PANEL; }
inline int64_t n_pairs(const View& weight) { return (n_panels(weight) + 1) / 2; }

inline const uint8_t* panel_at(const View& weight, int64_t p) {
    return weight.as<uint8_t>() + p * weight.stride[0];
}

// Tiled rows for which a panel is expanded once, columns expanded at a time, and the most pairs of
// panels of a task. The expanded panels stay in the L2 cache and meet 32 rows after 32, which are
// fetched ahead: from L3, tiles come at a fifth of the speed (Xeon, measured).
constexpr int64_t MAX_ROWS = 512, MAX_COLUMNS = 1024, MAX_PAIRS = 8, MIN_TASKS = 8;
constexpr int64_t PAIR = 2 * PANEL, SUMS = MAX_PAIRS * PAIR;

struct TileScratch {
    float sums[MAX_ROWS][SUMS];
    bf16 panels[MAX_PAIRS][2][MAX_COLUMNS * PANEL];
};
static_assert(sizeof(TileScratch) <= SCRATCH_BYTES);

// Panels 2 · number and the next one (if there is one) of a weight; their products go to `column`.
struct Pair {
    const View* weight;
    int64_t number, column;

    int64_t n_wide() const { return std::min<int64_t>(2, n_panels(*weight) - 2 * number); }

    // As tiles, over k-blocks begin … end - 1.
    Tiles expand_into(bf16 (*room)[MAX_COLUMNS * PANEL], int64_t begin, int64_t end) const {
        const bf16* at[2] = {};
        for (int64_t i = 0; i < n_wide(); i++)
            at[i] = expand(weight->layout, panel_at(*weight, 2 * number + i), begin, end, room[i]);
        return {at[0], n_wide() == 2 ? at[1] - at[0] : 0, TILE_SIZE};
    }
};

// The part of the next 32 rows' tiles (from tile i on, `depth` deep) that pair p prefetches: all
// pairs fetch as much, the first half of them of the first 16 rows.
inline Soon next_strip(Tiles rows, int64_t i, int64_t depth, int64_t p, int64_t n_pairs) {
    constexpr int64_t TILE_BYTES = 2 * TILE_SIZE;
    if (n_pairs == 1) return {reinterpret_cast<const char*>(rows.tile(i, 0)), TILE_BYTES};
    const int64_t half = n_pairs / 2, bytes = TILE_BYTES / half;
    const auto* at = reinterpret_cast<const char*>(rows.tile(i + p / half, 0));
    return {at + p % half * depth * bytes, bytes};
}

// n rows as tiles times pairs of weights of the same width, 32 rows at a time. Complete sums go
// where direct(row, n rows) says; where that is nowhere, done(row, n, sums [n, SUMS]) gets them.
template <typename Direct, typename Done>
void multiply_pairs(const bf16* x, int64_t n, const Pair* pairs, int64_t n_pairs, TileScratch& s,
                    Direct direct, Done done) {
    const int64_t n_in = pairs[0].weight->shape[1], n_tiles = (n + SIDE - 1) / SIDE;
    for (int64_t k = 0; k < n_in; k += MAX_COLUMNS) {
        const int64_t begin = k / DEPTH, end = std::min(n_in, k + MAX_COLUMNS) / DEPTH;
        const bool is_last = end * DEPTH == n_in;
        Tiles b[MAX_PAIRS];
        for (int64_t p = 0; p < n_pairs; p++) b[p] = pairs[p].expand_into(s.panels[p], begin, end);
        const Tiles rows{x + begin * TILE_SIZE, SIDE * n_in, TILE_SIZE};
        for (int64_t i = 0; i < n_tiles; i += 2) {
            const int64_t row = i * SIDE, n_rows = std::min<int64_t>(2 * SIDE, n - row);
            // Sums that are complete after one pass need no memory for all rows.
            const TileSums sums{s.sums[n_in <= MAX_COLUMNS ? 0 : row], SUMS};
            const TileSums out = is_last ? direct(row, n_rows) : TileSums{};
            for (int64_t p = 0; p < n_pairs; p++) {
                const TileSums part{sums.at + pairs[p].column, SUMS};
                multiply_some(std::min<int64_t>(2, n_tiles - i), pairs[p].n_wide(),
                              {rows.tile(i, 0), rows.side, rows.depth}, b[p], end - begin,
                              k > 0 ? part : TileSums{},
                              out.at ? TileSums{out.at + pairs[p].column, out.stride} : part,
                              next_strip(rows, i + 2, end - begin, p, n_pairs));
            }
            if (is_last && !out.at) done(row, n_rows, sums.at);
        }
    }
}

// For sums that `done` processes.
inline TileSums nowhere(int64_t, int64_t) { return {}; }

// How the products of row tiles with pairs of panels are cut into tasks.
struct TileTasks {
    int64_t n_tiled, n_pairs, pairs;

    // `most`: pairs of a task at most.
    TileTasks(const Activation& x, const View& weight, int64_t most)
        : n_tiled(x.n_tiled()),
          n_pairs(gdn::n_pairs(weight)),
          pairs(std::clamp<int64_t>(n_pairs / MIN_TASKS, 1, most)) {}

    int64_t per_rows() const { return (n_pairs + pairs - 1) / pairs; }
    int64_t count() const { return (n_tiled + MAX_ROWS - 1) / MAX_ROWS * per_rows(); }
    // A task's rows, and its pairs.
    int64_t first_row(int64_t task) const { return task / per_rows() * MAX_ROWS; }
    int64_t n_rows(int64_t task) const { return std::min(MAX_ROWS, n_tiled - first_row(task)); }
    int64_t begin(int64_t task) const { return task % per_rows() * pairs; }
    int64_t end(int64_t task) const { return std::min(n_pairs, begin(task) + pairs); }
};

// Calls f(panel, rows, their numbers, n ≤ TILE) for tasks begin … end - 1 of single rows: a panel
// times up to TILE rows each. Rows are prepared for the weight; others may share its tasks.
// Attribute: whether there are tiles of int8.
template <typename F>
void for_single_rows(const Args& a, const Activation& x, const View& weight, int64_t begin,
                     int64_t end, F f) {
    const int64_t n_rows = x.n_single(a.rows(x.x)), panels = n_panels(weight);
    Row rows[TILE];
    int64_t numbers[TILE];
    for (int64_t task = begin; task < end;) {
        const int64_t tile = task / panels, n = std::min(TILE, n_rows - tile * TILE);
        for (int64_t i = 0; i < n; i++) {
            numbers[i] = x.single(tile * TILE + i);
            rows[i] = x.row(numbers[i]);
        }
        const PreparedRows prepared(weight.layout, weight.shape[1], rows, n, a.attr[0] != 0,
                                    a.scratch);
        for (; task < std::min(end, (tile + 1) * panels); task++)
            f(task - tile * panels, prepared, numbers, n);
    }
}

inline int64_t n_single_tasks(int64_t n_rows, int64_t panels) {
    return (n_rows + TILE - 1) / TILE * panels;
}

}  // namespace gdn
