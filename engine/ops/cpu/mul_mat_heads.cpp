// MUL_MAT_HEADS: each head's rows times a float32 matrix of its own.
//
// A task is a head's product with a few rows, which share one pass over the matrix. Tasks of one
// head follow each other while its matrix is in the cache.

#include "kernels.h"
#include "row_products.h"

namespace gdn {
namespace {

// Attribute: whether the matrix is [in, out] instead of [out, in].
enum { OUT, X, WEIGHT, TAIL };

constexpr int64_t TILE = 16;

struct Task {
    const float* x;
    int64_t x_stride, n_rows;
    const float* const* matrix;  // The rows of the head's matrix.
    int64_t n_in, n_out;
    float* y;
    int64_t y_stride;
};

int64_t n_tiles(const Args& a) { return (a.rows(a.v[X]) + TILE - 1) / TILE; }

void multiply(const Task& t) {
    // Few at a time: they stay in the nearest cache for all rows.
    for (int64_t o = 0; o < t.n_out; o += 4)
        dots(t.x, t.x_stride, t.n_rows, t.matrix + o, t.n_out - o < 4 ? t.n_out - o : 4, t.n_in,
             t.y + o, t.y_stride);
}

void multiply_transposed(const Task& t) {
    for (int64_t i = 0; i < t.n_rows; i++)
        std::memset(t.y + i * t.y_stride, 0, 4 * static_cast<size_t>(t.n_out));
    for (int64_t o = 0; o < t.n_out; o += COLUMNS) {
        const int n = static_cast<int>(t.n_out - o < COLUMNS ? t.n_out - o : COLUMNS);
        add_columns(t.x, t.x_stride, t.n_rows, t.matrix, t.n_in, o, n, t.y + o, t.y_stride);
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View &x = a.v[X], &weight = a.v[WEIGHT], &out = a.v[OUT], &tail = a.v[TAIL];
    const bool transposed = a.attr[0] != 0;
    const int64_t n_out = weight.shape[transposed ? 2 : 1], tiles = n_tiles(a);
    const float** matrix = reinterpret_cast<const float**>(a.scratch);
    for (int64_t task = begin; task < end; task++) {
        const int64_t h = task / tiles, t = task % tiles * TILE;
        const int64_t n_rows = a.rows(x) - t < TILE ? a.rows(x) - t : TILE;
        for (int64_t i = 0; i < weight.shape[1]; i++) matrix[i] = weight.row(h, i);
        (transposed ? multiply_transposed
                    : multiply)({x.row(t, h), x.stride[0], n_rows, matrix, x.shape[2], n_out,
                                 out.row(t, h), out.stride[0]});
        for (int64_t i = t; tail && i < t + n_rows; i++)
            std::memcpy(out.row(i, h) + n_out, tail.row(i, h),
                        4 * static_cast<size_t>(tail.shape[2]));
    }
}

}  // namespace

const Kernel mul_mat_heads = {"MUL_MAT_HEADS",
                              [](const Args& a) { return a.v[X].shape[1] * n_tiles(a); }, run};

}  // namespace gdn
