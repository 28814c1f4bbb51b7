// MUL_MAT of two weights and SWIGLU of the products, which never leave the cache. Tiled
// rows become tiles of the next product at once where that is all that reads them.

#include "../kernels.h"
#include "../mul_mat.h"

namespace gdn {
namespace {

enum { OUT, OUT_TILES, X, GATE = X + 5, UP };

// Columns [column, column + n ≤ PANEL) of row t.
void put(const Args& a, int64_t t, int64_t column, int n, const float* gate, const float* up) {
    float* out = a.v[OUT].row(t) + column;
    for (int c = 0; c < n; c += W) {
        const vf h = silu(load(gate + c)) * load(up + c);
        store_part(out + c, h, n - c < W ? n - c : W);
    }
}

// Columns of a pair of panels for tiled row i, into its tile.
void put_tile(const Args& a, int64_t i, int64_t pair, const float* gate, const float* up) {
    static_assert(PAIR == DEPTH);
    bf16* row = a.v[OUT_TILES].as<bf16>() + i / SIDE * SIDE * a.v[GATE].shape[0] + pair * TILE_SIZE;
    for (int c = 0; c < DEPTH; c += W)
        store_bf16(row + i % SIDE * DEPTH + c, silu(load(gate + c)) * load(up + c), W);
}

int columns_of(const Args& a, int64_t panel) {
    return static_cast<int>(std::min<int64_t>(PANEL, a.v[GATE].shape[0] - panel * PANEL));
}

// The columns of a pair of panels for tiled row i.
void put_pair(const Args& a, int64_t i, int64_t pair, const float* gate, const float* up) {
    if (a.v[OUT_TILES]) return put_tile(a, i, pair, gate, up);
    for (int64_t p = 2 * pair; p < std::min(n_panels(a.v[GATE]), 2 * pair + 2); p++) {
        put(a, a.step->tiled[i], p * PANEL, columns_of(a, p), gate, up);
        gate += PANEL, up += PANEL;
    }
}

void multiply_tiles(const Args& a, const Activation& x, const TileTasks& tasks, int64_t task) {
    constexpr int64_t UP_SUMS = SUMS / 2;
    const int64_t first = tasks.first_row(task);
    const int64_t begin = tasks.begin(task), end = tasks.end(task);
    auto& s = *reinterpret_cast<TileScratch*>(a.scratch);
    Pair pairs[MAX_PAIRS] = {};
    int64_t n_pairs = 0;
    for (int64_t pair = begin; pair < end; pair++) {
        pairs[n_pairs++] = {&a.v[GATE], pair, (pair - begin) * PAIR};
        pairs[n_pairs++] = {&a.v[UP], pair, (pair - begin) * PAIR + UP_SUMS};
    }
    const auto done = [&](int64_t row, int64_t n_rows, float* sums) {
        for (int64_t i = first + row; i < first + row + n_rows; i++, sums += SUMS)
            for (int64_t pair = begin; pair < end; pair++) {
                const float* gate = sums + (pair - begin) * PAIR;
                put_pair(a, i, pair, gate, gate + UP_SUMS);
            }
    };
    multiply_pairs(x.tiled(first), tasks.n_rows(task), pairs, n_pairs, s, nowhere, done);
}

int64_t n_tasks(const Args& a) {
    const Activation x(a, X);
    const int64_t n_single = n_single_tasks(x.n_single(a.rows(x.x)), n_panels(a.v[GATE]));
    return TileTasks(x, a.v[GATE], MAX_PAIRS / 2).count() + n_single;
}

void run(const Args& a, int64_t begin, int64_t end) {
    const Activation x(a, X);
    const View &g = a.v[GATE], &u = a.v[UP];
    const TileTasks tasks(x, g, MAX_PAIRS / 2);
    for (; begin < std::min(tasks.count(), end); begin++) multiply_tiles(a, x, tasks, begin);
    float gate[TILE][PANEL], up[TILE][PANEL];
    const auto multiply = [&](int64_t p, const PreparedRows& rows, auto numbers, int64_t n) {
        rows.multiply(g.layout, panel_at(g, p), gate);
        rows.multiply(u.layout, panel_at(u, p), up);
        for (int64_t i = 0; i < n; i++)
            put(a, numbers[i], p * PANEL, columns_of(a, p), gate[i], up[i]);
    };
    for_single_rows(a, x, g, begin - tasks.count(), end - tasks.count(), multiply);
}

}  // namespace

const Kernel mul_mat_swiglu = {"MUL_MAT_SWIGLU", n_tasks, run};

}  // namespace gdn
