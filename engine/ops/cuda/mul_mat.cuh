// Products of panels of a weight with 2 to 8, or N · 8, rows of an activation; one row: row.cuh.
//
// Tensor cores multiply quantized weights by int8 activations: a k-block of a panel is one
// fragment, whose integer sums are exact; the sums of k-blocks are added in float32. A thread block
// has one panel. Its W warps share the columns: warp w takes k-blocks 8w … 8w+7, then skips those
// of the other warps. So a row's results depend, bit for bit, on neither the number of rows nor its
// index. Plain weights are multiplied by float32 activations in float32.
#pragma once

#include "k_block.cuh"
#include "quantize.cuh"

namespace gdn {

// The bits of MAGIC_VALUE = 2^23 + 2^22: MAGIC + n, as a float, is MAGIC_VALUE + n.
constexpr int32_t MAGIC = 0x4B400000;
constexpr float MAGIC_VALUE = 12582912.0f;

// A lane's part of a k-block of 8 rows of x: its fragment, and the scales and sums (of both groups)
// of columns 2c and 2c + 1 of the product.
struct Columns {
    uint32_t q[2];
    float scale[2];
    int32_t sum[2][2];
};

// R ≤ 8 rows of float32, which each thread block quantizes itself. In a round the lanes of a warp
// hold 8 / R k-blocks of all rows.
template <int R>
struct FloatRows {
    static constexpr int ROWS_OF_X = R, N = 1, PER_ROUND = 8 / R;

    const float* row;  // This lane's.
    int n_k_blocks;
    bool aligned;
    Eight values[R];
    Quantized round;

    // `row_at(i)`: the address of row i < R; where there are fewer rows, that of the last.
    template <typename RowAt>
    DEVICE FloatRows(RowAt row_at, int n_k_blocks_, bool aligned_)
        : row(row_at(threadIdx.x % 32 / 4 % R)), n_k_blocks(n_k_blocks_), aligned(aligned_) {}

    // Fetches a batch's columns.
    DEVICE void fetch(int first) {
        const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        for (int i = 0; i < R; i++) {
            const int k_block = first + i * PER_ROUND + g / R;
            values[i] = Eight{};
            if (k_block < n_k_blocks)
                values[i] = load_eight(row + k_block * K_BLOCK + 8 * c, aligned);
        }
    }

    // K-block i of the batch; called for i = 0, 1, … in this order.
    DEVICE void columns(int, int i, int, Columns& to) {
        const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        if (i % PER_ROUND == 0) round = quantize(values[i / PER_ROUND]);
        const int base = i % PER_ROUND * R;
        const int own = R == 8 ? threadIdx.x % 32 : (base + g % R) * 4 + c;
        for (int k = 0; k < 2; k++) to.q[k] = R == 8 ? round.q[k] : shuffle(round.q[k], own);
        for (int j = 0; j < 2; j++) {
            const int from = (base + (2 * c + j) % R) * 4;
            to.scale[j] = shuffle(round.scale, from);
            for (int k = 0; k < 2; k++) to.sum[k][j] = shuffle(round.sum, from + 2 * k);
        }
    }
};

// 8 · N_ rows that QUANTIZE_ROWS has quantized.
template <int N_>
struct QuantizedRows {
    static constexpr int ROWS_OF_X = 8 * N_, N = N_;

    const Words2* q;
    const float* scale;
    const int32_t* sum;
    int n_k_blocks, n_blocks;

    // `capacity`: the most rows of the activation.
    DEVICE QuantizedRows(const Args& a, int first_view, int first_row, int capacity,
                         int n_k_blocks_)
        : n_k_blocks(n_k_blocks_), n_blocks((capacity - first_row + 7) / 8) {
        const int64_t at = static_cast<int64_t>(first_row / 8) * n_k_blocks;
        q = a.v[first_view].as<Words2>() + at * 32;
        scale = a.v[first_view + 1].as<float>() + at * 8;
        sum = a.v[first_view + 2].as<int32_t>() + at * 16;
    }

    DEVICE void fetch(int) {}

    DEVICE void columns(int k_block, int, int n, Columns& to) {
        to = Columns{};
        if (k_block >= n_k_blocks || n >= n_blocks) return;
        const int lane = threadIdx.x % 32, c = threadIdx.x % 4;
        const int64_t at = static_cast<int64_t>(n) * n_k_blocks + k_block;
        const Words2 words = q[at * 32 + lane];
        for (int k = 0; k < 2; k++) {
            to.q[k] = words.w[k];
            to.scale[k] = scale[at * 8 + 2 * c + k];
            for (int j = 0; j < 2; j++) to.sum[k][j] = sum[at * 16 + 8 * k + 2 * c + j];
        }
    }
};

// acc += one k-block's products.
template <typename F>
DEVICE void multiply_k_block(const Piece<F>& piece, const Super<F>& super,
                             const uint32_t (&words)[4], const Columns& x, float (&acc)[4]) {
    const int c = threadIdx.x % 4;
    for (int group = 0; group < F::GROUPS; group++) {
        int32_t sum[2], d[4];
        for (int j = 0; j < 2; j++) {
            sum[j] = F::GROUPS == 2 ? x.sum[group][j] : x.sum[0][j] + x.sum[1][j];
            d[j] = d[j + 2] = MAGIC - F::ZERO * sum[j];
        }
        uint32_t part[4];
        for (int i = 0; i < 4; i++) part[i] = F::GROUPS == 1 || c / 2 == group ? words[i] : 0;
        multiply_int8(d, part, x.q[0], x.q[1]);
        for (int i = 0; i < 2; i++) {
            const float scale = scale_of(piece, super, group, i);
            const float min = min_of(piece, super, group, i);
            for (int j = 0; j < 2; j++) {
                const float dot = float_of(static_cast<uint32_t>(d[2 * i + j])) - MAGIC_VALUE;
                acc[2 * i + j] += dot * (scale * x.scale[j]);
                if (F::HAS_MIN) acc[2 * i + j] -= min * (x.scale[j] * static_cast<float>(sum[j]));
            }
        }
    }
}

// K-blocks first … first + N - 1 of a panel, as lanes hold them.
template <typename F, int N>
struct Pieces {
    Piece<F> pieces[N];
    uint32_t super[2];

    DEVICE void load(const uint8_t* panel, int first, int n_k_blocks, int lane) {
        super[0] = super[1] = 0;
        if (first < n_k_blocks) Super<F>::fetch(F::super_block(panel, first), lane, super);
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (first + i < n_k_blocks)
                pieces[i].load(F::k_block(panel, first + i), lane);
            else
                pieces[i].clear();
        }
    }
};

// acc += the products of N k-blocks, of which the first is number `at` of its batch.
template <int N, typename F, typename X>
DEVICE void multiply_k_blocks(const Pieces<F, N>& w, X& x, int first, int at,
                              float (&acc)[X::N][4]) {
    const Super<F> super(w.super);
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t words[4];
        w.pieces[i].words(threadIdx.x % 4, words);
#pragma unroll
        for (int n = 0; n < X::N; n++) {
            Columns columns;
            x.columns(first + i, at + i, n, columns);
            multiply_k_block(w.pieces[i], super, words, columns, acc[n]);
        }
    }
}

// The part of a panel's products that warp `warp` of `n_warps` computes, to sums [rows, 16].
template <typename F, typename X>
DEVICE void multiply_panel(F, const uint8_t* panel, X& x, int warp, int n_warps, float* sums) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, n = x.n_k_blocks;
    float acc[X::N][4] = {};
    for (int first = warp * BATCH; first < n; first += n_warps * BATCH) {
        if constexpr (X::N == 1) {
            Pieces<F, BATCH> w;
            w.load(panel, first, n, lane);
            wait_for_inputs();
            x.fetch(first);
            multiply_k_blocks<BATCH>(w, x, first, 0, acc);
        } else {
            // Unrolled for whole batches, the code would be too long.
            constexpr int PART = 2;
            Pieces<F, PART> w, next;
            next.load(panel, first, n, lane);
            wait_for_inputs();
#pragma unroll 1
            for (int at = 0; at < BATCH && first + at < n; at += PART) {
                w = next;
                if (at + PART < BATCH) next.load(panel, first + at + PART, n, lane);
                multiply_k_blocks<PART>(w, x, first + at, at, acc);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < X::N; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int column = 8 * i + 2 * c + k % 2;
            if (column < X::ROWS_OF_X) sums[column * PANEL + g + k / 2 * 8] = acc[i][k];
        }
}

// A thread block has half of a plain panel, 8 rows: plain weights have few rows and many columns
// (routers, gates), so whole panels would leave most of a GPU idle.
constexpr int HALF = PANEL / 2;

DEVICE bool is_plain_layout(int32_t layout) { return layout <= L_BF16; }

// A lane's part of 16 · PER columns of half a plain panel: column (or pair of columns) lane / 2 of
// rows 4q … 4q+3 of the half, for q = lane % 2.
template <Layout L>
struct PlainColumns {
    static constexpr int PER = L == L_BF16 ? 2 : 1;
    uint32_t w[4];

    DEVICE void load(const uint8_t* panel, int half, int k, int lane) {
        const int64_t at = static_cast<int64_t>(k) / PER * PANEL + half * HALF + 4 * (lane % 2);
        if (L == L_F16) {
            const Words2 v = load_words<Words2>(panel + at * 2);
            for (int i = 0; i < 2; i++) w[i] = v.w[i];
        } else {
            const Words4 v = load_words<Words4>(panel + at * 4);
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

// R rows of x (`value(i, k)`) times half a plain panel: the part of warp `warp`, to sums [R, 16],
// of which 8 are written.
template <int R, Layout L, typename Value>
DEVICE void multiply_plain(Plain<L>, const uint8_t* panel, int half, Value value, int n_in,
                           int warp, int n_warps, float* sums) {
    using Loaded = PlainColumns<L>;
    constexpr int PER = Loaded::PER, AT_ONCE = 8, STEP = 16 * PER;
    const int lane = threadIdx.x % 32;
    float acc[R][4] = {};
    for (int first = warp * AT_ONCE * STEP; first < n_in; first += n_warps * AT_ONCE * STEP) {
        Loaded w[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int k = first + u * STEP + lane / 2 * PER;
            w[u] = Loaded{};
            if (k < n_in) w[u].load(panel, half, k, lane);
        }
        wait_for_inputs();
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int k = first + u * STEP + lane / 2 * PER;
#pragma unroll
            for (int t = 0; t < R; t++)
                for (int j = 0; j < PER; j++) {
                    const float x = k + j < n_in ? value(t, k + j) : 0.0f;
                    for (int i = 0; i < 4; i++) acc[t][i] += w[u].value(i, j) * x;
                }
        }
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
