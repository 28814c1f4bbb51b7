// Products of panels with several rows, rounded to integers of 15 bits.
//
// Tensor cores multiply a k-block of a panel by the high and the low bytes of rows, a group of 4 or 8;
// the sums are exact integers. They are scaled and added in the order of a single row (row.cuh): k-blocks 2c and
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

    // Writes a batch, if it is `real`, of which each lane has 8 columns: k-blocks first … first + 7.
    DEVICE void put(const Eight& x, int first, bool real) const {
        const Integers made = round_batch(x, heads[first / BATCH], real);
        if (!real) return;
        reinterpret_cast<Words4*>(q)[first * 4 + threadIdx.x % 32] = {
            {made.high[0], made.high[1], made.low[0], made.low[1]}};
    }
};

// The row of a group of R that a lane fetches, and how many k-blocks of R rows a warp fetches at once.
template <int R>
DEVICE int own_row() {
    return threadIdx.x % (4 * R) / 4;
}
template <int R>
constexpr int AT_ONCE = 32 / (4 * R);

// A batch of R = 4 or 8 rows in shared memory: the operands of tensor cores.
template <int R>
struct alignas(16) BatchRows {
    // Of k-block i and row r, columns 8c … 8c+7 at 4r + c: high bytes, then low ones.
    Words4 q[BATCH][4 * R];
    // Of k-block i and row r, at r / (R / 4), each group of columns, r % (R / 4); of OFFSET formats
    // alone.
    float sums[BATCH][4][2][R / 4];

    template <typename F>
    DEVICE void set_sums(F, int i, const int32_t (&sum)[2]) {
        const int row = own_row<R>();
        for (int group = 0; group < F::GROUPS; group++)
            sums[i][row / (R / 4)][group][row % (R / 4)] =
                static_cast<float>(F::GROUPS == 2 ? sum[group] : sum[0] + sum[1]);
    }
};
static_assert(sizeof(BatchRows<4>) == 4 * BATCH_ROW_BYTES &&
                  sizeof(BatchRows<8>) == 8 * BATCH_ROW_BYTES,
              "as in kernels.py");

// What fills in R rows: those that STAGE_ROWS has left. row: this lane's own.
struct RowsInMemory {
    StagedRow row;

    // K-blocks first … first + 7 of a batch; of these one in n_parts, from `part` on. Returns the own
    // row's scale.
    template <typename F, int R>
    DEVICE float fill(F f, BatchRows<R>& to, int first, int, int part, int n_parts) const {
        constexpr int N = AT_ONCE<R>;
        const int lane = threadIdx.x % 32, c = lane % 4, own = lane / (4 * R);
        const BatchHead& head = row.heads[first / BATCH];
        const auto* from = reinterpret_cast<const Words4*>(row.q) + first * 4 + c;
        for (int i = part * N + own; i < BATCH; i += n_parts * N)
            copy_async(&to.q[i][lane % (4 * R)], from + i * 4);
        if (Piece<F>::OFFSET && part == 0)
            for (int i = own * 4 + c; i < BATCH; i += 4 * N)
                to.set_sums(f, i, {load_published(head.sum[i]), load_published(head.sum[i] + 1)});
        return load_published(&head.scale);
    }
};

// Rows of floats, which each warp rounds for itself.
struct FloatRows {
    const float* row;  // This lane's own.
    bool aligned;

    template <typename F, int R>
    DEVICE float fill(F f, BatchRows<R>& to, int first, int n, int, int) const {
        constexpr int N = AT_ONCE<R>;
        const int lane = threadIdx.x % 32, c = lane % 4, own = lane / (4 * R);
        const float* from = row + first * K_BLOCK + 8 * c;
        uint32_t largest = 0;
        for (int i = own; i < BATCH && first + i < n; i += N) {
            const uint32_t size = largest_of(load_eight(from + i * K_BLOCK, aligned));
            largest = size > largest ? size : largest;
        }
        const auto join = [&](int mask) {
            const uint32_t other = shuffle_xor(largest, mask);
            largest = other > largest ? other : largest;
        };
        join(1), join(2);
        if (N > 1) join(16);
        const float scale = batch_scale(largest);
#pragma unroll 2
        for (int i = own; i < BATCH; i += N) {
            Eight x{};
            if (first + i < n) x = load_eight(from + i * K_BLOCK, aligned);
            const Integers made = to_integers(x, scale);
            to.q[i][lane % (4 * R)] = {{made.high[0], made.high[1], made.low[0], made.low[1]}};
            if (!Piece<F>::OFFSET) continue;
            const int32_t half = made.sum + shuffle_xor(made.sum, 1), other = shuffle_xor(half, 2);
            if (c == 0) to.set_sums(f, i, {half, other});
        }
        return scale;
    }
};

// The products of k-block i of 8 rows: of rows g and g + 8 of a panel with rows 2c and 2c + 1.
DEVICE void dots(const uint32_t (&words)[4], const BatchRows<8>& x, int i, float (&dot)[4]) {
    const Words4 q = x.q[i][threadIdx.x % 32];
    int32_t high[4], low[4];
    multiply_int8_to(high, words, q.w[0], q.w[1], MAGIC);
    multiply_int8_to(low, words, q.w[2], q.w[3], MAGIC);
    for (int k = 0; k < 4; k++) {
        // 128 · high - MAGIC_VALUE, which is exact.
        const float above =
            fmaf(float_of(static_cast<uint32_t>(high[k])), 128.0f, -129.0f * MAGIC_VALUE);
        dot[k] = above + float_of(static_cast<uint32_t>(low[k]));
    }
}
// Of 4 rows: with row c. One product has high and low bytes, as neighbouring columns.
DEVICE void dots(const uint32_t (&words)[4], const BatchRows<4>& x, int i, float (&dot)[2]) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const auto* own = reinterpret_cast<const Words2*>(&x.q[i][g / 2 * 4 + lane % 4]);
    const Words2 q = own[g % 2];
    int32_t d[4] = {};
    multiply_int8(d, words, q.w[0], q.w[1]);
    for (int r = 0; r < 2; r++) dot[r] = static_cast<float>(d[2 * r] * 128 + d[2 * r + 1]);
}

// acc += the products of k-block i with R rows, but for these rows' scales: of row g + 8r of a panel
// with row (R / 4) · c + j at r · R / 4 + j. words: this lane's weights.
template <typename F, int R>
DEVICE void multiply_k_block(const uint32_t (&words)[4], const BatchRows<R>& x, int i,
                             const float (&scale)[2][2], const float (&offset)[2][2],
                             float (&acc)[R / 2]) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < F::GROUPS; group++) {
        uint32_t part[4];
        for (int k = 0; k < 4; k++) part[k] = F::GROUPS == 1 || c / 2 == group ? words[k] : 0;
        float dot[R / 2];
        dots(part, x, i, dot);
        for (int k = 0; k < R / 2; k++) {
            const int r = k / (R / 4);
            acc[k] = fmaf(dot[k], scale[group][r], acc[k]);
            if (Piece<F>::OFFSET)
                acc[k] = fmaf(-offset[group][r], x.sums[i][c][group][k % (R / 4)], acc[k]);
        }
    }
}

// total += this lane's sums over half a batch, for each of N groups of R rows.
template <typename F, int R, int N>
DEVICE void multiply_half(const uint8_t* k_blocks, int half, const Super<F>& super,
                          const BatchRows<R>* x, float (&total)[N][R / 2]) {
    const int lane = threadIdx.x % 32, c = lane % 4;
    float acc[2][N][R / 2] = {};
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
            multiply_k_block<F, R>(words, x[k], i, scale, offset, acc[at / 2][k]);
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        for (int j = 0; j < R / 2; j++) total[k][j] += acc[0][k][j] + acc[1][k][j];
}

// A lane's sums in shared memory, of a warp: [panels, N, 32] of these.
template <int R>
struct alignas(2 * R) LaneSums {
    float v[R / 2];
};
// Where the sum of row t and output `column` of a thread block's panels is, among a warp's floats.
template <int R, int N>
DEVICE int sum_at(int t, int column) {
    constexpr int PER_LANE = R / 4;
    const int panel = column / PANEL, r = column % PANEL;
    const int lane = r % 8 * 4 + t % R / PER_LANE;
    return ((panel * N + t / R) * 32 + lane) * (R / 2) + r / 8 * PER_LANE + t % PER_LANE;
}

// The products of a stream's panels with a batch of N groups of R rows, added to `sums`. scale: of
// rows (R / 4) · c + j of each group.
template <typename F, int R, int N, int RUNS>
DEVICE void multiply_panels(F, Stream<true, RUNS>& stream, const BatchRows<R>* x,
                            const float (&scale)[N][R / 4], LaneSums<R>* sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int p = 0; p < stream.n_panels; p++) {
        const uint8_t* k_blocks = stream.wait(0);
        uint32_t raw[2] = {};
        Super<F>::fetch(k_blocks, lane, raw);
        const Super<F> super(raw);
        float total[N][R / 2] = {};
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            if (half > 0) stream.wait(1);
            multiply_half<F, R, N>(k_blocks + F::SUPER_HEAD, half, super, x, total);
            stream.release(half);
        }
#pragma unroll
        for (int k = 0; k < N; k++) {
            LaneSums<R> to = sums[(p * N + k) * 32 + lane];
            for (int j = 0; j < R / 2; j++)
                to.v[j] = fmaf(total[k][j], scale[k][j % (R / 4)], to.v[j]);
            sums[(p * N + k) * 32 + lane] = to;
        }
    }
}

// The scales of a group's rows as products need them; own: that of this lane's own row.
template <int R, typename F>
DEVICE void share_scale(F, float own, float (&scale)[R / 4]) {
    for (int j = 0; j < R / 4; j++)
        scale[j] = shuffle(own, (threadIdx.x % 4 * (R / 4) + j) * 4) * (1.0f / Piece<F>::UNIT);
}

}  // namespace gdn
