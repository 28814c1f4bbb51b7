// What MUL_MAT is made of: one activation, as rows and as tiles, times panels of a weight.
#pragma once

#include <algorithm>

#include "expand.h"
#include "kernel.h"
#include "product.h"

namespace gdn {

// An activation's views, one after another among a kernel's operands: float32 rows; int8 rows with
// scales and sums (absent where the weights are plain); and the rows of blocks as bfloat16 tiles
// (absent where there are none: then blocks' rows are multiplied like all others).
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

    int64_t n_blocked() const { return tiles ? step.n_blocked : 0; }
    // Rows that are multiplied one by one: how many of n, and which.
    int64_t n_single(int64_t n) const { return tiles ? step.n_loose : n; }
    int64_t single(int64_t i) const { return tiles ? step.loose[i] : i; }

    Row row(int64_t t) const {
        if (!q) return {x.row(t), nullptr, nullptr, nullptr};
        return {x.row(t), q.as<int8_t>() + t * q.stride[0], scale.row(t),
                sum.as<int32_t>() + t * sum.stride[0]};
    }
};

inline int64_t n_panels(const View& weight) { return (weight.shape[0] + ROWS - 1) / ROWS; }
inline int64_t n_pairs(const View& weight) { return (n_panels(weight) + 1) / 2; }

inline const uint8_t* panel_at(const View& weight, int64_t p) {
    return weight.as<uint8_t>() + p * weight.stride[0];
}

// Rows of blocks for which a panel is expanded once, columns multiplied at a time, and the most
// pairs of panels of a task: the rows' tiles of these columns and the task's sums stay in the L2
// cache, from which tiles come fast enough. From L3 they come at a fifth of that (Xeon, measured).
constexpr int64_t MAX_ROWS = 512, MAX_COLUMNS = 1024, MAX_PAIRS = 4, MIN_TASKS = 16;
constexpr int64_t PAIR = 2 * ROWS, SUMS = MAX_PAIRS * PAIR;

struct TileScratch {
    float sums[MAX_ROWS][SUMS];
    bf16 panels[2][MAX_COLUMNS * ROWS];
};
static_assert(sizeof(TileScratch) <= SCRATCH_BYTES);

// sums [n, 32] (+)= n rows of blocks, from the first on, times a pair of panels (or the last one),
// over MAX_COLUMNS columns from k on.
inline void multiply_pair(const Activation& x, const View& weight, int64_t first, int64_t n,
                          int64_t pair, int64_t k, TileScratch& s, float* sums) {
    const int64_t n_in = weight.shape[1], p = 2 * pair;
    const int64_t n_wide = std::min<int64_t>(2, n_panels(weight) - p);
    const int64_t begin = k / DEPTH, end = std::min(n_in, k + MAX_COLUMNS) / DEPTH;
    const bf16* panels[2] = {};
    for (int64_t i = 0; i < n_wide; i++)
        panels[i] = expand(weight.layout, panel_at(weight, p + i), begin, end, s.panels[i]);
    const Tiles a{x.tiles.as<bf16>() + first * n_in + begin * TILE_SIZE, SIDE * n_in, TILE_SIZE};
    const Tiles b{panels[0], n_wide == 2 ? panels[1] - panels[0] : 0, TILE_SIZE};
    multiply_matrices(a, (n + SIDE - 1) / SIDE, b, n_wide, end - begin, sums, SUMS, k > 0);
}

// How the products of blocks with pairs of panels are cut into tasks.
struct TileTasks {
    int64_t n_blocked, n_pairs, pairs;

    // `most`: pairs of a task at most.
    TileTasks(const Activation& x, const View& weight, int64_t most)
        : n_blocked(x.n_blocked()),
          n_pairs(gdn::n_pairs(weight)),
          pairs(std::clamp<int64_t>(n_pairs / MIN_TASKS, 1, most)) {}

    int64_t per_rows() const { return (n_pairs + pairs - 1) / pairs; }
    int64_t count() const { return (n_blocked + MAX_ROWS - 1) / MAX_ROWS * per_rows(); }
    // A task's rows, and its pairs.
    int64_t first_row(int64_t task) const { return task / per_rows() * MAX_ROWS; }
    int64_t n_rows(int64_t task) const { return std::min(MAX_ROWS, n_blocked - first_row(task)); }
    int64_t begin(int64_t task) const { return task % per_rows() * pairs; }
    int64_t end(int64_t task) const { return std::min(n_pairs, begin(task) + pairs); }
};

// Calls f(panel, rows, their numbers, n ≤ TILE) for tasks begin … end - 1 of single rows: one panel
// times up to TILE of n_rows rows each.
template <typename F>
void for_single_rows(const Activation& x, int64_t n_rows, int64_t panels, int64_t begin, int64_t end,
                     F f) {
    Row rows[TILE];
    int64_t numbers[TILE], tile = -1, n = 0;
    for (int64_t task = begin; task < end; task++) {
        if (task / panels != tile) {
            tile = task / panels;
            n = std::min(TILE, n_rows - tile * TILE);
            for (int64_t i = 0; i < n; i++) {
                numbers[i] = x.single(tile * TILE + i);
                rows[i] = x.row(numbers[i]);
            }
        }
        f(task % panels, rows, numbers, n);
    }
}

inline int64_t n_single_tasks(int64_t n_rows, int64_t panels) {
    return (n_rows + TILE - 1) / TILE * panels;
}

}  // namespace gdn
