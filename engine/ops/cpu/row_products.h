// Products of a few rows x with many rows of a cache or a weight, which may be float16.
//
// Attention's scores and MUL_MAT_HEADS are `dots`; attention's output and the transposed product
// are weighted sums of rows, `add_columns`. Up to four rows x share each load. An element of the
// result has the same bits whatever else is computed beside it.
#pragma once

#include "simd.h"

namespace gdn {

// Loads of either type of a cache or a weight, as float32.
GDN_INLINE vf load(const uint16_t* p) { return half_to_float(p); }
GDN_INLINE vf load_part(const uint16_t* p, int n) {
    if (n == W) return load(p);
    uint16_t lanes[W] = {};
    std::memcpy(lanes, p, 2 * static_cast<size_t>(n));
    return load(lanes);
}

// y[i][j] = x[i] · rows[j] for NX rows x and NR others: an accumulator for each product.
template <int NX, int NR, typename T>
GDN_INLINE void dot_block(const float* x, int64_t x_stride, const T* const* rows, int64_t size,
                          float* y, int64_t y_stride) {
    static_assert(NX <= 4, "sums are taken of four accumulators");
    vf acc[NR][4] = {};
    for_lanes(size, [&](int64_t d, int n) {
        vf r[NR];
        for (int j = 0; j < NR; j++) r[j] = load_part(rows[j] + d, n);
        for (int i = 0; i < NX; i++) {
            const vf xi = load_part(x + i * x_stride + d, n);
            for (int j = 0; j < NR; j++) acc[j][i] = fma(xi, r[j], acc[j][i]);
        }
    });
    for (int j = 0; j < NR; j++) {
        const v4 s = sums(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
        for (int i = 0; i < NX; i++) y[i * y_stride + j] = s[i];
    }
}

template <int NX, typename T>
void dot_rows(const float* x, int64_t x_stride, const T* const* rows, int64_t n_rows, int64_t size,
              float* y, int64_t y_stride) {
    constexpr int NR = NX > 2 ? 2 : 4;
    int64_t j = 0;
    for (; j + NR <= n_rows; j += NR)
        dot_block<NX, NR>(x, x_stride, rows + j, size, y + j, y_stride);
    for (; j < n_rows; j++) dot_block<NX, 1>(x, x_stride, rows + j, size, y + j, y_stride);
}

// y[i][j] = x[i] · rows[j] for n_x rows x and n_rows others of float32 or float16.
template <typename T>
void dots(const float* x, int64_t x_stride, int64_t n_x, const T* const* rows, int64_t n_rows,
          int64_t size, float* y, int64_t y_stride) {
    for (; n_x > 0; n_x -= 4, x += 4 * x_stride, y += 4 * y_stride) {
        const auto f = n_x >= 4   ? dot_rows<4, T>
                       : n_x == 3 ? dot_rows<3, T>
                       : n_x == 2 ? dot_rows<2, T>
                                  : dot_rows<1, T>;
        f(x, x_stride, rows, n_rows, size, y, y_stride);
    }
}

// y[i] += sum over j of w[i][j] · rows[j], one after another, in NV vectors of n lanes each.
template <int NX, int NV, typename T>
GDN_INLINE void add_block(const float* w, int64_t w_stride, const T* const* rows, int64_t n_rows,
                          int64_t column, int n, float* y, int64_t y_stride) {
    vf acc[NX][NV];
    for (int i = 0; i < NX; i++)
        for (int v = 0; v < NV; v++) acc[i][v] = load_part(y + i * y_stride + v * W, n);
    for (int64_t j = 0; j < n_rows; j++) {
        vf r[NV];
        for (int v = 0; v < NV; v++) r[v] = load_part(rows[j] + column + v * W, n);
        for (int i = 0; i < NX; i++)
            for (int v = 0; v < NV; v++)
                acc[i][v] = fma(splat(w[i * w_stride + j]), r[v], acc[i][v]);
    }
    for (int i = 0; i < NX; i++)
        for (int v = 0; v < NV; v++) store_part(y + i * y_stride + v * W, acc[i][v], n);
}

// Columns that `add_columns` works on at once.
constexpr int COLUMNS = 2 * W;

template <int NX, typename T>
void add_rows(const float* w, int64_t w_stride, const T* const* rows, int64_t n_rows,
              int64_t column, int n, float* y, int64_t y_stride) {
    if (n == COLUMNS) return add_block<NX, 2>(w, w_stride, rows, n_rows, column, W, y, y_stride);
    for (int d = 0; d < n; d += W)
        add_block<NX, 1>(w, w_stride, rows, n_rows, column + d, n - d < W ? n - d : W, y + d,
                         y_stride);
}

// y[i][c] += sum over j of w[i][j] · rows[j][column + c] for n_x rows y and c < n ≤ COLUMNS.
template <typename T>
void add_columns(const float* w, int64_t w_stride, int64_t n_x, const T* const* rows,
                 int64_t n_rows, int64_t column, int n, float* y, int64_t y_stride) {
    for (; n_x > 0; n_x -= 4, w += 4 * w_stride, y += 4 * y_stride) {
        const auto f = n_x >= 4   ? add_rows<4, T>
                       : n_x == 3 ? add_rows<3, T>
                       : n_x == 2 ? add_rows<2, T>
                                  : add_rows<1, T>;
        f(w, w_stride, rows, n_rows, column, n, y, y_stride);
    }
}

}  // namespace gdn
