// Products of panels with one row (GEMV), which the same launch may compute from an op's inputs.
//
// The row is quantized to integers of 15 bits (quantize.cuh), which loses next to nothing. One row
// would fill one of the eight columns of a product on tensor cores. So each lane multiplies a
// k-block of its own: lane 4g + c has all columns of rows g and g + 8 of k-block c of 4. Operand B
// is block-diagonal: columns 2c and 2c + 1 hold the high and low bytes of k-block c, so a lane's
// accumulators are its own k-block's sums, and it holds the scales of that k-block, too.
#pragma once

#include "mul_mat.cuh"

namespace gdn {

// `source` says what the row is, of X and other rows:
//   ROW_SWIGLU          silu(X) · MORE
//   ROW_NORM            ADD_RMS_NORM of X and (if present) MORE, times FACTOR; their sum is TOTAL
//   ROW_GATED_SILU,     RMS_NORM_GATED of X with the gate MORE, times FACTOR
//   ROW_GATED_SIGMOID

// A batch of the row's k-blocks as integers.
struct alignas(16) RowBatch {
    struct alignas(16) KBlock {
        float scale;
        int32_t sum[2];  // Of 16 columns each.
    };

    uint32_t q[BATCH][2][WORDS];  // High bytes, low bytes.
    uint32_t zeros[WORDS];
    KBlock k_blocks[BATCH];
};
static_assert(sizeof(RowBatch) == ROW_BATCH_BYTES, "as in kernels.py");

struct Row {
    const float *x, *more = nullptr, *factor = nullptr;
    float *total = nullptr, eps = 0.0f, squares = 0.0f;
    int source = ROW_AS_IT_IS, head = 0;  // Of gated rows, the size of heads.
    bool aligned;                         // All of them, to 16 bytes.

    // Columns k … k + 7 (8 neighbouring lanes have 64 columns, and so on); zeros if not `valid`.
    DEVICE Eight columns(int k, bool valid) {
        Eight v{}, m{}, f{};
        if (valid) {
            v = load_eight(x + k, aligned);
            if (more) m = load_eight(more + k, aligned);
            if (factor) f = load_eight(factor + (source == ROW_NORM ? k : k & (head - 1)), aligned);
        }
        if (source == ROW_AS_IT_IS) return v;
        float sum = 0.0f;
        for (int i = 0; i < 8; i++) {
            if (source == ROW_SWIGLU) v.v[i] = m.v[i] * silu(v.v[i]);
            if (source == ROW_NORM) v.v[i] += m.v[i];
            sum = fmaf(v.v[i], v.v[i], sum);
        }
        if (source == ROW_SWIGLU) return v;
        if (source == ROW_NORM) {
            squares += sum;
            if (total && valid) store_eight(total + k, v, aligned);
            for (int i = 0; i < 8; i++) v.v[i] *= f.v[i];
            return v;
        }
        for (int mask = 1; mask < head / 8; mask *= 2) sum += shuffle_xor(sum, mask);
        const float scale = rsqrt_of(sum / static_cast<float>(head) + eps);
        for (int i = 0; i < 8; i++)
            v.v[i] *= scale * f.v[i] * (source == ROW_GATED_SILU ? silu(m.v[i]) : sigmoid(m.v[i]));
        return v;
    }

    // Column k, for plain weights; gated rows are never multiplied by plain weights.
    DEVICE float column(int k, bool counts) {
        float v = x[k];
        if (source != ROW_NORM) return v;
        if (more) v += more[k];
        if (counts) {
            squares = fmaf(v, v, squares);
            if (total) total[k] = v;
        }
        return v * factor[k];
    }

    // Quantizes a batch: k-blocks first … first + 7, of n.
    DEVICE void stage(RowBatch& to, int first, int n) {
        const int lane = threadIdx.x % 32, i = lane / 4, c = lane % 4;
        const Integers made = to_integers(columns(first * K_BLOCK + 8 * lane, first + i < n));
        for (int k = 0; k < 2; k++) {
            to.q[i][0][2 * c + k] = made.high[k];
            to.q[i][1][2 * c + k] = made.low[k];
        }
        if (c == 0) to.k_blocks[i].scale = made.scale;
        if (c % 2 == 0) to.k_blocks[i].sum[c / 2] = made.sum;
        if (lane < WORDS) to.zeros[lane] = 0;
    }
    // All batches of warp `warp` of n_warps, one after the other; see multiply_row.
    DEVICE void stage_all(RowBatch* to, int n, int warp, int n_warps) {
        for (int first = warp * BATCH; first < n; first += n_warps * BATCH) stage(*to++, first, n);
    }
};

// A warp's batches of neighbouring panels, which come one at a time through its slot of shared
// memory: its first batch of all panels, then its next one. While a warp waits, others compute.
struct Stream {
    const uint8_t* panel;
    uint8_t* slot;
    int32_t panel_bytes, n_panels, batch_bytes = 0;
    int32_t offset, step, next_panel = 0;  // Of the next fetch; bytes to the warp's next batch.

    DEVICE Stream(const View& w, int first_panel, int n_panels_, char* slot_, int warp, int n_warps)
        : panel(panel_at(w, first_panel)),
          slot(reinterpret_cast<uint8_t*>(slot_)),
          panel_bytes(w.stride[w.rank - 2]),
          n_panels(n_panels_) {
        with_format(w.layout, [&](auto f) {
            if constexpr (!is_plain(decltype(f){})) batch_bytes = decltype(f)::SUPER_BYTES;
        });
        offset = warp * batch_bytes, step = n_warps * batch_bytes;
    }

    // Starts the copy of a batch, if there is one left.
    DEVICE void fetch() {
        const int left = panel_bytes - offset, bytes = left < batch_bytes ? left : batch_bytes;
        const uint8_t* from = panel + static_cast<int64_t>(next_panel) * panel_bytes + offset;
#pragma unroll 1
        for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) copy_async(slot + i, from + i);
        fence_copies();
        if (++next_panel == n_panels) next_panel = 0, offset += step;
    }
    // Waits for the batch; returns its address.
    DEVICE const uint8_t* wait() const {
        wait_copies<0>();
        sync_warp();
        return slot;
    }
    // Called when all lanes have read the batch: starts the next copy.
    DEVICE void release() {
        sync_warp();
        fetch();
    }
};

// This lane's sums of rows g and g + 8 over a batch of `count` k-blocks.
template <typename F>
DEVICE void multiply_batch(const uint8_t* k_blocks, int count, const RowBatch& x, float (&acc)[2]) {
    constexpr int PIECES = 4 / F::GROUPS;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    uint32_t raw[2] = {};
    Super<F>::fetch(k_blocks, lane, raw);
    const Super<F> super(raw);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = 4 * i + c;
        Pair<F> pair;
        if (at < count)
            pair.load(k_blocks + F::SUPER_HEAD + at * F::K_BLOCK_BYTES, g);
        else
            pair.clear();
        const uint32_t* own = g / 2 == c ? x.q[at][g % 2] : x.zeros;
        const auto* from = reinterpret_cast<const Words4*>(own);
        const Words4 b[2] = {from[0], from[1]};
        const RowBatch::KBlock k_block = x.k_blocks[at];
        const Piece<F> head = pair.piece(0);
#pragma unroll
        for (int group = 0; group < F::GROUPS; group++) {
            int32_t d[4] = {};
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
                const int piece = group * PIECES + k, word = piece % 2 * 2;
#pragma unroll
                for (int part = 0; part < Piece<F>::PARTS; part++) {
                    uint32_t words[4];
                    pair.piece(piece).part(part, piece, words);
                    multiply_int8(d, words, b[piece / 2].w[word], b[piece / 2].w[word + 1]);
                }
            }
            const int32_t sum =
                F::GROUPS == 2 ? k_block.sum[group] : k_block.sum[0] + k_block.sum[1];
            for (int r = 0; r < 2; r++) {
                const int32_t dot = d[2 * r] * 128 + d[2 * r + 1] - F::ZERO * sum;
                const float scale = k_block.scale * scale_of(head, super, group, r);
                acc[r] = fmaf(static_cast<float>(dot), scale, acc[r]);
                if (F::HAS_MIN)
                    acc[r] -=
                        min_of(head, super, group, r) * (k_block.scale * static_cast<float>(sum));
            }
        }
    }
}

// A warp's part of the products of a stream's panels, to sums [panels, 16]: batches[0] are k-blocks
// 8 · warp … 8 · warp + 7 of n, the next ones follow in steps of n_warps batches.
template <typename F>
DEVICE void multiply_row(F, Stream& stream, const RowBatch* batches, int n, int warp, int n_warps,
                         float* sums) {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < stream.n_panels * PANEL; i += 32) sums[i] = 0.0f;
    sync_warp();
#pragma unroll 1
    for (int first = warp * BATCH; first < n; first += n_warps * BATCH, batches++) {
#pragma unroll 1
        for (int p = 0; p < stream.n_panels; p++) {
            float acc[2] = {};
            multiply_batch<F>(stream.wait(), n - first, *batches, acc);
            stream.release();
            for (int r = 0; r < 2; r++) {
                for (int mask = 1; mask < 4; mask *= 2) acc[r] += shuffle_xor(acc[r], mask);
                if (lane % 4 == 0) sums[p * PANEL + lane / 4 + 8 * r] += acc[r];
            }
        }
    }
}

}  // namespace gdn
