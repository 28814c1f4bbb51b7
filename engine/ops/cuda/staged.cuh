// Products of panels with several rows, rounded to integers of 15 bits.
//
// Tensor cores multiply a k-block of a panel by the high and the low bytes of 8 rows; the sums are
// exact integers. They are scaled and added in the order of a single row (row.cuh): k-blocks 2c and
// 2c + 1 of a batch, then over c as four lanes add there, then batches and warps. So a row's results
// are, bit for bit, the same alone and among others.
//
// STAGE_ROWS leaves a row in whole batches. K-blocks have 64 bytes, of which lane c of 4 has 16: the
// high bytes of columns 8c … 8c+7, then the low ones; those past the last are zeros. Each batch has a
// BatchHead.
#pragma once

#include "row.cuh"

namespace gdn {

// The bits of MAGIC_VALUE = 2^23 + 2^22: MAGIC + n, as a float, is MAGIC_VALUE + n.
constexpr int32_t MAGIC = 0x4B400000;
constexpr float MAGIC_VALUE = 12582912.0f;

// Row i of views [T, batches · 512] and [T, batches · 20].
struct StagedRow {
    uint8_t* q;
    BatchHead* heads;

    DEVICE StagedRow() {}
    DEVICE StagedRow(const View& staged, const View& heads_, int64_t i)
        : q(staged.as<uint8_t>() + i * staged.stride[0]),
          heads(reinterpret_cast<BatchHead*>(heads_.row(i))) {}

    // Writes a batch, of which each lane has 8 columns: k-blocks first … first + 7.
    DEVICE void put(const Eight& x, int first) const {
        const Integers made = round_batch(x, heads[first / BATCH]);
        reinterpret_cast<Words4*>(q)[first * 4 + threadIdx.x % 32] = {
            {made.high[0], made.high[1], made.low[0], made.low[1]}};
    }
};

// A batch of 8 rows in shared memory. Lane 4g + c has columns 8c … 8c+7 of each k-block of row g: the
// operands of tensor cores.
struct alignas(16) BatchRows {
    Words4 q[BATCH][32];
    // Of k-block i and rows 2c and 2c + 1, of each group of columns; of OFFSET formats alone.
    float sums[BATCH][4][2][2];

    template <typename F>
    DEVICE void set_sums(F, int i, const int32_t (&sum)[2]) {
        const int g = threadIdx.x % 32 / 4;
        for (int group = 0; group < F::GROUPS; group++)
            sums[i][g / 2][group][g % 2] =
                static_cast<float>(F::GROUPS == 2 ? sum[group] : sum[0] + sum[1]);
    }
};
static_assert(sizeof(BatchRows) == BATCH_ROWS_BYTES, "as in kernels.py");

// What fills in 8 rows: those that STAGE_ROWS has left. row: row g.
struct RowsInMemory {
    StagedRow row;

    // K-blocks first … first + 7 of a batch; of these one in n_parts, from `part` on. Returns row g's
    // scale.
    template <typename F>
    DEVICE float fill(F f, BatchRows& to, int first, int, int part, int n_parts) const {
        const int lane = threadIdx.x % 32, c = lane % 4;
        const BatchHead& head = row.heads[first / BATCH];
        const auto* from = reinterpret_cast<const Words4*>(row.q) + first * 4 + c;
        for (int i = part; i < BATCH; i += n_parts) copy_async(&to.q[i][lane], from + i * 4);
        if (Piece<F>::OFFSET && part == 0)
            for (int i = c; i < BATCH; i += 4) to.set_sums(f, i, head.sum[i]);
        return head.scale;
    }
};

// Rows of floats, which each warp rounds for itself.
struct FloatRows {
    const float* row;  // Row g.
    bool aligned;

    template <typename F>
    DEVICE float fill(F f, BatchRows& to, int first, int n, int, int) const {
        const int lane = threadIdx.x % 32, c = lane % 4;
        const float* from = row + first * K_BLOCK + 8 * c;
        uint32_t largest = 0;
        for (int i = 0; i < BATCH && first + i < n; i++) {
            const uint32_t size = largest_of(load_eight(from + i * K_BLOCK, aligned));
            largest = size > largest ? size : largest;
        }
        for (int mask = 1; mask < 4; mask *= 2) {
            const uint32_t other = shuffle_xor(largest, mask);
            largest = other > largest ? other : largest;
        }
        const float scale = batch_scale(largest);
#pragma unroll 2
        for (int i = 0; i < BATCH; i++) {
            Eight x{};
            if (first + i < n) x = load_eight(from + i * K_BLOCK, aligned);
            const Integers made = to_integers(x, scale);
            to.q[i][lane] = {{made.high[0], made.high[1], made.low[0], made.low[1]}};
            if (!Piece<F>::OFFSET) continue;
            const int32_t half = made.sum + shuffle_xor(made.sum, 1), other = shuffle_xor(half, 2);
            if (c == 0) to.set_sums(f, i, {half, other});
        }
        return scale;
    }
};

// acc += the products of a k-block with 8 rows, but for these rows' scales: of rows g and g + 8 of a
// panel with rows 2c and 2c + 1. words: this lane's weights.
template <typename F>
DEVICE void multiply_k_block(const uint32_t (&words)[4], const Words4& q,
                             const float (&scale)[2][2], const float (&offset)[2][2],
                             const float (&sums)[2][2], float (&acc)[4]) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < F::GROUPS; group++) {
        uint32_t part[4];
        for (int i = 0; i < 4; i++) part[i] = F::GROUPS == 1 || c / 2 == group ? words[i] : 0;
        int32_t high[4], low[4];
        multiply_int8_to(high, part, q.w[0], q.w[1], MAGIC);
        multiply_int8_to(low, part, q.w[2], q.w[3], MAGIC);
        for (int i = 0; i < 4; i++) {
            // 128 · high - MAGIC_VALUE, which is exact.
            const float above =
                fmaf(float_of(static_cast<uint32_t>(high[i])), 128.0f, -129.0f * MAGIC_VALUE);
            const float dot = above + float_of(static_cast<uint32_t>(low[i]));
            acc[i] = fmaf(dot, scale[group][i / 2], acc[i]);
            if (Piece<F>::OFFSET) acc[i] = fmaf(-offset[group][i / 2], sums[group][i % 2], acc[i]);
        }
    }
}

// total += this lane's sums over half a batch, for each of N groups of 8 rows.
template <typename F, int N>
DEVICE void multiply_half(const uint8_t* k_blocks, int half, const Super<F>& super,
                          const BatchRows* x, float (&total)[N][4]) {
    const int lane = threadIdx.x % 32, c = lane % 4;
    float acc[2][N][4] = {};
#pragma unroll
    for (int at = 0; at < 4; at++) {
        const int i = 4 * half + at;
        Piece<F> piece;
        piece.load(k_blocks + i * F::K_BLOCK_BYTES, lane, FromShared{});
        uint32_t words[4];
        piece.words(c, words);
        float scale[2][2], offset[2][2] = {};
        for (int j = 0; j < 2 * F::GROUPS; j++) {
            scale[j / 2][j % 2] = scale_of(piece, super, j / 2, j % 2);
            if (Piece<F>::OFFSET) offset[j / 2][j % 2] = offset_of(piece, super, j / 2, j % 2);
        }
#pragma unroll
        for (int k = 0; k < N; k++)
            multiply_k_block<F>(words, x[k].q[i][lane], scale, offset, x[k].sums[i][c],
                                acc[at / 2][k]);
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        for (int j = 0; j < 4; j++) total[k][j] += acc[0][k][j] + acc[1][k][j];
}

// A lane's sums in shared memory, of a warp: [panels, N, 32] of these.
struct alignas(16) LaneSums {
    float v[4];
};
// Where the sum of row t and output `column` of a thread block's panels is, among a warp's floats.
template <int N>
DEVICE int sum_at(int t, int column) {
    const int panel = column / PANEL, r = column % PANEL;
    const int lane = r % 8 * 4 + t % 8 / 2;
    return ((panel * N + t / 8) * 32 + lane) * 4 + r / 8 * 2 + t % 2;
}

// The products of a stream's panels with a batch of N groups of 8 rows, added to `sums`. scale: of
// rows 2c and 2c + 1 of each group.
template <typename F, int N, int RUNS>
DEVICE void multiply_panels(F, Stream<true, RUNS>& stream, const BatchRows* x,
                            const float (&scale)[N][2], LaneSums* sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int p = 0; p < stream.n_panels; p++) {
        const uint8_t* k_blocks = stream.wait(0);
        uint32_t raw[2] = {};
        Super<F>::fetch(k_blocks, lane, raw);
        const Super<F> super(raw);
        float total[N][4] = {};
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            if (half > 0) stream.wait(1);
            multiply_half<F, N>(k_blocks + F::SUPER_HEAD, half, super, x, total);
            stream.release(half);
        }
#pragma unroll
        for (int k = 0; k < N; k++) {
            LaneSums to = sums[(p * N + k) * 32 + lane];
            for (int j = 0; j < 4; j++) to.v[j] = fmaf(total[k][j], scale[k][j % 2], to.v[j]);
            sums[(p * N + k) * 32 + lane] = to;
        }
    }
}

// The scales of rows 2c and 2c + 1 as products need them; own: that of row g.
template <typename F>
DEVICE void share_scale(F, float own, float (&scale)[2]) {
    for (int j = 0; j < 2; j++)
        scale[j] = shuffle(own, (threadIdx.x % 4 * 2 + j) * 4) * (1.0f / Piece<F>::UNIT);
}

}  // namespace gdn
