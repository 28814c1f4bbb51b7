// Products of plain panels with rows of float32. A thread block's W warps share the columns: warp w
// takes runs of them, then skips those of the other warps. So a row's results depend, bit for bit,
// on neither the number of rows nor its index.
#pragma once

#include "k_block.cuh"
#include "quantize.cuh"

namespace gdn {

// A thread block has half of a plain panel, 8 rows: plain weights have few rows and many columns
// (routers, gates), so whole panels would leave most of a GPU idle.
constexpr int HALF = PANEL / 2;

DEVICE bool is_plain_layout(int32_t layout) { return layout <= L_BF16; }

// Calls f with the format of a plain layout.
template <typename F>
DEVICE void with_plain(int32_t layout, F f) {
    if (layout == L_F16) return f(Plain<L_F16>{});
    if (layout == L_BF16) return f(Plain<L_BF16>{});
    f(Plain<L_F32>{});
}

// A lane's part of 16 · PER columns of half a plain panel: column (or pair of columns) lane / 2 of
// rows 4q … 4q+3 of the half, for q = lane % 2.
template <Layout L>
struct PlainColumns {
    static constexpr int PER = L == L_BF16 ? 2 : 1;
    uint32_t w[4];

    DEVICE void load(const uint8_t* panel, int half, int k, int lane) {
        const int64_t at = static_cast<int64_t>(k) / PER * PANEL + half * HALF + 4 * (lane % 2);
        if (L == L_F16) {
            const Words2 v = FromGlobal::words<Words2>(panel + at * 2);
            for (int i = 0; i < 2; i++) w[i] = v.w[i];
        } else {
            const Words4 v = FromGlobal::words<Words4>(panel + at * 4);
            for (int i = 0; i < 4; i++) w[i] = v.w[i];
        }
    }

    // Row i's column j.
    DEVICE float value(int i, int j) const {
        if (L == L_F16) return half_to_float(static_cast<uint16_t>(w[i / 2] >> 16 * (i % 2)));
        if (L == L_F32) return float_of(w[i]);
        return float_of(j == 0 ? w[i] << 16 : w[i] & 0xffff0000);
    }
};

// Rows are fetched PLAIN_COLUMNS at a time; then a lane asks for columns of any lane.

// A row whose columns a function computes.
template <typename Column>
struct ComputedRow {
    Column column;

    DEVICE void fetch(int, int) const {}
    DEVICE float operator()(int, int k) const { return column(k); }
};

// Rows in memory (row_at(i): row i), brought to shared memory: `buffer` is of R · PLAIN_COLUMNS
// floats, for each warp.
template <int R, typename RowAt>
struct RowsOfFloats {
    static constexpr int N_ROWS = R;
    float* buffer;
    bool aligned;
    RowAt row_at;
    int first = 0;

    // Fetches columns k … k + 127, of n_in.
    DEVICE void fetch(int k, int n_in) {
        const int own = threadIdx.x % 32 * 4, at = k + own;
        first = k;
        sync_warp();  // All lanes have read the columns before.
#pragma unroll 4
        for (int t = 0; t < R; t++) {
            Floats4 x{};
            if (at + 4 <= n_in)
                x = load_four(row_at(t) + at, aligned);
            else
                for (int i = 0; i < 4; i++)
                    if (at + i < n_in) x.v[i] = row_at(t)[at + i];
            *reinterpret_cast<Floats4*>(buffer + t * PLAIN_COLUMNS + own) = x;
        }
        sync_warp();
    }
    DEVICE float operator()(int t, int k) const { return buffer[t * PLAIN_COLUMNS + k - first]; }
};

template <int R, typename RowAt>
DEVICE RowsOfFloats<R, RowAt> rows_of_floats(char* buffer, bool aligned, RowAt row_at) {
    return {reinterpret_cast<float*>(buffer), aligned, row_at};
}

// R rows of x (`values`, as above) times half a plain panel: the part of warp `warp`, to sums [R, 16],
// of which 8 are written. It waits for inputs, if these are `real`, behind the first fetch; else it ends
// after that.
template <int R, Layout L, typename Values>
DEVICE void multiply_plain(Plain<L>, const uint8_t* panel, int half, Values values, int n_in,
                           int warp, int n_warps, float* sums, bool real) {
    using Loaded = PlainColumns<L>;
    constexpr int PER = Loaded::PER, STEP = 16 * PER, RUN = 8 * STEP;
    constexpr int AT_ONCE = R > 2 ? 4 : 8;  // More would take too many registers.
    const int lane = threadIdx.x % 32;
    float acc[R][4] = {};
#pragma unroll 1
    for (int first = warp * RUN; first < n_in;) {
        Loaded w[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int k = first + u * STEP + lane / 2 * PER;
            w[u] = Loaded{};
            if (k < n_in) w[u].load(panel, half, k, lane);
        }
        if (real) wait_for_inputs();
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int begin = first + u * STEP, k = begin + lane / 2 * PER;
            if (begin % PLAIN_COLUMNS == 0 && begin < n_in) values.fetch(begin, n_in);
#pragma unroll
            for (int t = 0; t < R; t++)
                for (int j = 0; j < PER; j++) {
                    const float x = k + j < n_in ? values(t, k + j) : 0.0f;
                    for (int i = 0; i < 4; i++) acc[t][i] += w[u].value(i, j) * x;
                }
        }
        if (!real) break;
        first += AT_ONCE * STEP;
        if (first % RUN == 0) first += (n_warps - 1) * RUN;
    }
#pragma unroll
    for (int t = 0; t < R; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            for (int mask = 2; mask < 32; mask *= 2) acc[t][i] += shuffle_xor(acc[t][i], mask);
            if (lane < 2) sums[t * PANEL + 4 * lane + i] = acc[t][i];
        }
}

}  // namespace gdn
