// MUL_MAT: an activation times one weight; a task is a panel of 16 of its rows, for some tokens.

#include <algorithm>

#include "kernels.h"
#include "product.h"

namespace gdn {

namespace {

enum { OUT, X, Q, SCALE, SUM, WEIGHT, GATE, ADD };

int64_t n_panels(const Args& a) { return (a.v[WEIGHT].shape[0] + ROWS - 1) / ROWS; }

int64_t n_tasks(const Args& a) { return (a.rows(a.v[X]) + TILE - 1) / TILE * n_panels(a); }

Row row_of(const Args& a, int64_t t) {
    if (!a.v[Q]) return {a.v[X].row(t), nullptr, nullptr, nullptr};
    return {a.v[X].row(t), a.v[Q].as<int8_t>() + t * a.v[Q].stride[0], a.v[SCALE].row(t),
            a.v[SUM].as<int32_t>() + t * a.v[SUM].stride[0]};
}

void put(const Args& a, int64_t t, int64_t first, int n, const float* values) {
    float* out = a.v[OUT].row(t) + first;
    if (!a.v[GATE] && !a.v[ADD]) {
        std::memcpy(out, values, 4 * static_cast<size_t>(n));
        return;
    }
    const float gate = a.v[GATE] ? sigmoid(splat(a.v[GATE].row(t)[0]))[0] : 1.0f;
    const float* add = a.v[ADD] ? a.v[ADD].row(t) + first : nullptr;
    for (int r = 0; r < n; r++) out[r] = (add ? add[r] : 0.0f) + gate * values[r];
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View& w = a.v[WEIGHT];
    const int64_t n_tokens = a.rows(a.v[X]), panels = n_panels(a);
    Row rows[TILE];
    float out[TILE][ROWS];
    int64_t tile = -1, n = 0;
    for (int64_t task = begin; task < end; task++) {
        const int64_t first = task / panels * TILE, p = task % panels;
        if (task / panels != tile) {
            tile = task / panels;
            n = std::min(TILE, n_tokens - first);
            for (int64_t i = 0; i < n; i++) rows[i] = row_of(a, first + i);
        }
        multiply(w.layout, w.as<uint8_t>() + p * w.stride[0], w.shape[1], rows, n, out);
        const int n_rows = static_cast<int>(std::min<int64_t>(ROWS, w.shape[0] - p * ROWS));
        for (int64_t i = 0; i < n; i++) put(a, first + i, p * ROWS, n_rows, out[i]);
    }
}

}  // namespace

const Kernel mul_mat = {"MUL_MAT", n_tasks, run};

}  // namespace gdn
