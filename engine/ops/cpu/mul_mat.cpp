// MUL_MAT: an activation times one weight.
//
// Rows of blocks are multiplied as tiles with pairs of panels (32 weight rows), which are expanded to
// bfloat16 for many rows at once. Of other rows, and where x was not rounded, a task is one panel as
// it is stored.

#include <algorithm>

#include "expand.h"
#include "kernels.h"
#include "product.h"

namespace gdn {

namespace {

enum { OUT, X, Q, SCALE, SUM, TILES, WEIGHT, GATE, ADD };

int64_t n_panels(const Args& a) { return (a.v[WEIGHT].shape[0] + ROWS - 1) / ROWS; }

const uint8_t* panel_at(const Args& a, int64_t p) {
    return a.v[WEIGHT].as<uint8_t>() + p * a.v[WEIGHT].stride[0];
}

// Stores a panel's products with row t.
void put(const Args& a, int64_t t, int64_t panel, const float* values) {
    const int64_t first = panel * ROWS;
    const int n = static_cast<int>(std::min<int64_t>(ROWS, a.v[WEIGHT].shape[0] - first));
    float* out = a.v[OUT].row(t) + first;
    if (!a.v[GATE] && !a.v[ADD]) {
        std::memcpy(out, values, 4 * static_cast<size_t>(n));
        return;
    }
    const float gate = a.v[GATE] ? sigmoid(splat(a.v[GATE].row(t)[0]))[0] : 1.0f;
    const float* add = a.v[ADD] ? a.v[ADD].row(t) + first : nullptr;
    for (int r = 0; r < n; r++) out[r] = (add ? add[r] : 0.0f) + gate * values[r];
}

namespace tiles {

// Rows for which a panel is expanded once, columns multiplied at a time, and the most pairs of a
// task: the rows' tiles of these columns and the task's sums stay in the L2 cache, from which the
// tiles come fast enough. From the L3 cache they come at a fifth of that (Xeon, measured).
constexpr int64_t MAX_ROWS = 512, MAX_COLUMNS = 1024, MAX_PAIRS = 4, MIN_TASKS = 16;
constexpr int64_t PAIR = 2 * ROWS;

int64_t n_pairs(const Args& a) { return (n_panels(a) + 1) / 2; }

int64_t task_pairs(const Args& a) {
    return std::clamp<int64_t>(n_pairs(a) / MIN_TASKS, 1, MAX_PAIRS);
}

int64_t n_groups(const Args& a) { return (n_pairs(a) + task_pairs(a) - 1) / task_pairs(a); }

int64_t n_tasks(const Args& a) {
    return a.v[TILES] ? (a.step->n_blocked + MAX_ROWS - 1) / MAX_ROWS * n_groups(a) : 0;
}

struct Scratch {
    float sums[MAX_ROWS * MAX_PAIRS * PAIR];
    bf16 panels[2][MAX_COLUMNS * ROWS];
};
static_assert(sizeof(Scratch) <= SCRATCH_BYTES);

// Rows [first, first + n) of the step's blocks times a pair, over columns from k on.
void multiply_pair(const Args& a, Scratch& s, int64_t first, int64_t n, int64_t pair, int64_t k,
                   float* sums) {
    const View& w = a.v[WEIGHT];
    const int64_t n_in = w.shape[1], p = 2 * pair, n_wide = std::min<int64_t>(2, n_panels(a) - p);
    const int64_t begin = k / DEPTH, end = std::min(n_in, k + MAX_COLUMNS) / DEPTH;
    const bf16* panels[2] = {};
    for (int64_t i = 0; i < n_wide; i++)
        panels[i] = expand(w.layout, panel_at(a, p + i), begin, end, s.panels[i]);
    const Tiles x{a.v[TILES].as<bf16>() + first * n_in + begin * TILE_SIZE, SIDE * n_in, TILE_SIZE};
    const Tiles y{panels[0], n_wide == 2 ? panels[1] - panels[0] : 0, TILE_SIZE};
    multiply_matrices(x, (n + SIDE - 1) / SIDE, y, n_wide, end - begin, sums, MAX_PAIRS * PAIR, k > 0);
}

void run_task(const Args& a, int64_t task) {
    const int64_t first = task / n_groups(a) * MAX_ROWS, n = std::min(MAX_ROWS, a.step->n_blocked - first);
    const int64_t begin = task % n_groups(a) * task_pairs(a);
    const int64_t end = std::min(n_pairs(a), begin + task_pairs(a));
    auto& s = *reinterpret_cast<Scratch*>(a.scratch);
    for (int64_t k = 0; k < a.v[WEIGHT].shape[1]; k += MAX_COLUMNS)
        for (int64_t pair = begin; pair < end; pair++)
            multiply_pair(a, s, first, n, pair, k, s.sums + (pair - begin) * PAIR);
    for (int64_t i = 0; i < n; i++)
        for (int64_t p = 2 * begin; p < std::min(n_panels(a), 2 * end); p++)
            put(a, a.step->blocked[first + i], p, s.sums + i * MAX_PAIRS * PAIR + (p - 2 * begin) * ROWS);
}

}  // namespace tiles

namespace rows {

// Whether rows of blocks are left to `tiles`.
bool only_loose(const Args& a) { return static_cast<bool>(a.v[TILES]); }

int64_t n_rows(const Args& a) { return only_loose(a) ? a.step->n_loose : a.rows(a.v[X]); }

int64_t n_tasks(const Args& a) { return (n_rows(a) + TILE - 1) / TILE * n_panels(a); }

int64_t row_at(const Args& a, int64_t i) { return only_loose(a) ? a.step->loose[i] : i; }

Row row_of(const Args& a, int64_t t) {
    if (!a.v[Q]) return {a.v[X].row(t), nullptr, nullptr, nullptr};
    return {a.v[X].row(t), a.v[Q].as<int8_t>() + t * a.v[Q].stride[0], a.v[SCALE].row(t),
            a.v[SUM].as<int32_t>() + t * a.v[SUM].stride[0]};
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View& w = a.v[WEIGHT];
    const int64_t panels = n_panels(a);
    Row rows[TILE];
    float out[TILE][ROWS];
    int64_t tile = -1, n = 0;
    for (int64_t task = begin; task < end; task++) {
        const int64_t first = task / panels * TILE, p = task % panels;
        if (task / panels != tile) {
            tile = task / panels;
            n = std::min(TILE, n_rows(a) - first);
            for (int64_t i = 0; i < n; i++) rows[i] = row_of(a, row_at(a, first + i));
        }
        multiply(w.layout, panel_at(a, p), w.shape[1], rows, n, out);
        for (int64_t i = 0; i < n; i++) put(a, row_at(a, first + i), p, out[i]);
    }
}

}  // namespace rows

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n = tiles::n_tasks(a);
    for (; begin < std::min(n, end); begin++) tiles::run_task(a, begin);
    if (begin < end) rows::run(a, begin - n, end - n);
}

}  // namespace

const Kernel mul_mat = {
    "MUL_MAT", [](const Args& a) { return tiles::n_tasks(a) + rows::n_tasks(a); }, run};

}  // namespace gdn
