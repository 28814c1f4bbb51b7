// MUL_MAT: an activation times one weight.
//
// Row tiles are multiplied as bfloat16 tiles with pairs of panels (32 weight rows), which are
// expanded to bfloat16 for many rows at once. For remainder rows, and where x was not rounded, a
// task is one panel as it is stored.

#include "mul_mat.h"

#include "kernels.h"

namespace gdn {
namespace {

enum { OUT, X, WEIGHT = X + 5, GATE, ADD };

// Stores a panel's products with row t.
void put(const Args& a, int64_t t, int64_t panel, const float* values) {
    const int64_t first = panel * PANEL;
    const int n = static_cast<int>(std::min<int64_t>(PANEL, a.v[WEIGHT].shape[0] - first));
    float* out = a.v[OUT].row(t) + first;
    if (!a.v[GATE] && !a.v[ADD]) {
        std::memcpy(out, values, 4 * static_cast<size_t>(n));
        return;
    }
    const float gate = a.v[GATE] ? sigmoid(splat(a.v[GATE].row(t)[0]))[0] : 1.0f;
    const float* add = a.v[ADD] ? a.v[ADD].row(t) + first : nullptr;
    for (int r = 0; r < n; r++) out[r] = fma(gate, values[r], add ? add[r] : 0.0f);
}

void multiply_tiles(const Args& a, const Activation& x, const TileTasks& tasks, int64_t task) {
    const View& w = a.v[WEIGHT];
    const int64_t first = tasks.first_row(task);
    const int64_t begin = tasks.begin(task), end = tasks.end(task);
    auto& s = *reinterpret_cast<TileScratch*>(a.scratch);
    Pair pairs[MAX_PAIRS] = {};
    for (int64_t pair = begin; pair < end; pair++)
        pairs[pair - begin] = {&w, pair, (pair - begin) * PAIR};
    // Whole tiles of neighbouring rows need nothing between.
    const bool is_whole = !a.v[GATE] && !a.v[ADD] && w.shape[0] % PANEL == 0;
    const auto direct = [&](int64_t row, int64_t n_rows) -> TileSums {
        const int32_t* rows = x.step.tiled + first + row;
        if (!is_whole || n_rows % SIDE != 0 || rows[n_rows - 1] - rows[0] != n_rows - 1) return {};
        return {a.v[OUT].row(rows[0]) + begin * PAIR, a.v[OUT].stride[0]};
    };
    const auto done = [&](int64_t row, int64_t n_rows, float* sums) {
        for (int64_t i = 0; i < n_rows; i++, sums += SUMS)
            for (int64_t p = 2 * begin; p < std::min(n_panels(w), 2 * end); p++)
                put(a, x.step.tiled[first + row + i], p, sums + (p - 2 * begin) * PANEL);
    };
    multiply_pairs(x.tiled(first), tasks.n_rows(task), pairs, end - begin, s, direct, done);
}

int64_t n_tasks(const Args& a) {
    const Activation x(a, X);
    const int64_t n_single = n_single_tasks(x.n_single(a.rows(x.x)), n_panels(a.v[WEIGHT]));
    return TileTasks(x, a.v[WEIGHT], MAX_PAIRS).count() + n_single;
}

void run(const Args& a, int64_t begin, int64_t end) {
    const Activation x(a, X);
    const View& w = a.v[WEIGHT];
    const TileTasks tasks(x, w, MAX_PAIRS);
    for (; begin < std::min(tasks.count(), end); begin++) multiply_tiles(a, x, tasks, begin);
    float out[TILE][PANEL];
    const auto multiply = [&](int64_t p, const PreparedRows& rows, auto numbers, int64_t n) {
        rows.multiply(w.layout, panel_at(w, p), out);
        for (int64_t i = 0; i < n; i++) put(a, numbers[i], p, out[i]);
    };
    for_single_rows(a, x, w, begin - tasks.count(), end - tasks.count(), multiply);
}

}  // namespace

const Kernel mul_mat = {"MUL_MAT", n_tasks, run};

}  // namespace gdn
