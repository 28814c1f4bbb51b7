// MUL_MAT's kernels: all weights of a node in one launch.
#pragma once

#include "mul_mat.cuh"

namespace gdn {

// Outputs and weights are MAX_WEIGHTS each; Q, SCALE and SUM: see quantize.cuh, absent where rows
// are quantized on the way. With UP, an activation is SWIGLU's of X and UP (of few rows, and of
// quantized weights).
constexpr int MAX_WEIGHTS = 6;
enum MulMat {
    OUT, X = MAX_WEIGHTS, Q, SCALE, SUM, WEIGHT, GATE = WEIGHT + MAX_WEIGHTS, ADD, UP
};

// Which weight and panel a block has; of plain ones a half.
struct Place {
    int weight, panel, half, n_rows;

    DEVICE explicit Place(const Args& a) : weight(0), panel(blockIdx.x) {
        bool found = false;
#pragma unroll
        for (int i = 0; i + 1 < MAX_WEIGHTS; i++) {
            const int n = n_blocks(a.v[WEIGHT + i]);
            found = found || panel < n;
            if (!found) panel -= n, weight = i + 1;
        }
        const bool is_plain = is_plain_layout(a.v[WEIGHT + weight].layout);
        half = is_plain ? panel % 2 : 0;
        n_rows = is_plain ? HALF : ROWS;
        if (is_plain) panel /= 2;
    }

    DEVICE static int n_blocks(const View& w) {
        return (w.shape[0] + ROWS - 1) / ROWS * (is_plain_layout(w.layout) ? 2 : 1);
    }
};

// Adds up what the warps have, in order, and stores n rows of the block's products.
DEVICE void store_products(const Args& a, const Place& at, const float* sums, int per_warp,
                           int first, int n) {
    const int n_warps = blockDim.x / 32, n_out = a.v[WEIGHT + at.weight].shape[0];
    for (int i = threadIdx.x; i < n * ROWS; i += blockDim.x) {
        const int t = first + i / ROWS, column = at.panel * ROWS + at.half * HALF + i % ROWS;
        if (column >= n_out || i % ROWS >= at.n_rows) continue;
        float value = 0.0f;
        for (int w = 0; w < n_warps; w++) value += sums[w * per_warp + i];
        if (a.v[GATE]) value *= sigmoid(a.v[GATE].row(t)[0]);
        if (a.v[ADD]) value += a.v[ADD].row(t)[column];
        a.v[OUT + at.weight].row(t)[column] = value;
    }
}

// Row t, or the last that there is room for.
DEVICE const float* row_of(const View& x, int t) {
    return x.row(t < x.shape[0] ? t : x.shape[0] - 1);
}

// Grid: (panels of all weights, rows / ROWS_OF_X). Threads: 32 for each warp that shares the
// columns. Dynamic shared memory: warps · ROWS_OF_X · 16 floats.
template <typename Rows, typename MakeRows>
DEVICE void mul_mat(const Args& a, float* sums, MakeRows make_rows) {
    constexpr int N = Rows::ROWS_OF_X, PER_WARP = N * ROWS, AT_ONCE = N < 8 ? N : 8;
    const View& x = a.v[X];
    // Weights are fetched before it is known how many rows are live: those past them are multiplied
    // with whatever they have, and not stored.
    const int n_rows = a.rows(x), first = blockIdx.y * N, n_in = x.shape[1];
    if (first > 0 && first >= n_rows) {
        wait_for_inputs();
        return;
    }
    const Place at(a);
    const View& w = a.v[WEIGHT + at.weight];
    const uint8_t* panel = panel_at(w, at.panel);
    const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    float* own = sums + warp * PER_WARP;
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            for (int t = 0; t < N; t += AT_ONCE) {
                if (t > 0 && first + t >= n_rows) break;
                const auto row_at = [&](int i) { return row_of(x, first + t + i); };
                multiply_plain<AT_ONCE>(f, panel, at.half, row_at, n_in, warp, n_warps,
                                        own + t * ROWS);
            }
        } else {
            auto rows = make_rows(first);
            multiply_panel(f, panel, rows, warp, n_warps, own);
        }
    });
    wait_for_inputs();  // Warps without columns, too.
    __syncthreads();
    store_products(a, at, sums, PER_WARP, first, n_rows - first < N ? n_rows - first : N);
}

template <int R>
DEVICE void mul_mat_floats(const Args& a, float* sums) {
    mul_mat<FloatRows<R>>(a, sums, [&](int first) {
        const View& x = a.v[X];
        const View& up = a.v[UP];
        const auto row_at = [&](int i) { return row_of(x, first + i); };
        const bool aligned = is_aligned(x) && (!up || is_aligned(up));
        FloatRows<R> rows(row_at, x.shape[1] / RECORD, aligned);
        if (up) rows.set_up([&](int i) { return row_of(up, first + i); });
        return rows;
    });
}

template <int N>
DEVICE void mul_mat_quantized(const Args& a, float* sums) {
    mul_mat<QuantizedRows<N>>(a, sums, [&](int first) {
        return QuantizedRows<N>(a, Q, first, a.v[X].shape[0], a.v[X].shape[1] / RECORD);
    });
}

}  // namespace gdn
