// Products of panels with one row (GEMV), which the same launch may compute from an op's inputs.
// Those of more rows (staged.cuh) add the same numbers in the same order.
//
// The row is quantized to integers of 15 bits (quantize.cuh), which loses next to nothing. One row
// would fill one of the eight columns of a product on tensor cores. So each lane multiplies a
// k-block of its own: lane 4g + c has all columns of rows g and g + 8 of k-block c of 4. Operand B
// is block-diagonal: columns 2c and 2c + 1 hold the high and low bytes of that k-block, so a lane's
// accumulators are its own k-block's sums, and it holds that k-block's scales of weights, too.
#pragma once

#include "mul_mat.cuh"

namespace gdn {

// `source` says what the row is, of X and other rows:
//   ROW_SWIGLU          silu(X) · MORE
//   ROW_NORM            ADD_RMS_NORM of X and (if present) MORE, times FACTOR; their sum is TOTAL
//   ROW_GATED_SILU,     RMS_NORM_GATED of X with the gate MORE, times FACTOR
//   ROW_GATED_SIGMOID

// A batch's scale, and sums of its integers, of 16 columns each.
struct alignas(16) BatchHead {
    int32_t sum[BATCH][2];
    float scale;
};
static_assert(sizeof(BatchHead) == BATCH_HEAD_BYTES, "as in kernels.py");

// A batch of the row's k-blocks as integers.
struct alignas(16) RowBatch {
    uint32_t q[BATCH][2][WORDS];  // High bytes, low bytes.
    uint32_t zeros[WORDS];
    BatchHead head;
};
static_assert(sizeof(RowBatch) == ROW_BATCH_BYTES, "as in kernels.py");

// Rounds a batch, of which each lane has 8 columns; every second lane has the sum of 16. Its head is
// written if it is `real`.
DEVICE Integers round_batch(const Eight& x, BatchHead& head, bool real) {
    const int lane = threadIdx.x % 32;
    const float scale = batch_scale(warp_highest(largest_of(x)));
    Integers made = to_integers(x, scale);
    made.sum += shuffle_xor(made.sum, 1);
    if (!real) return made;
    if (lane % 2 == 0) head.sum[lane / 4][lane / 2 % 2] = made.sum;
    if (lane == 0) head.scale = scale;
    return made;
}

struct Row {
    const float *x, *more = nullptr, *factor = nullptr;
    float *total = nullptr, eps = 0.0f, squares = 0.0f;
    int source = ROW_AS_IT_IS, head = 0;  // Of gated rows, the size of heads.
    bool aligned;                         // All of them, to 16 bytes.

    // Sets `aligned` once the rows are there.
    DEVICE void find_alignment() {
        aligned = is_aligned(x) && is_aligned(more) && is_aligned(factor) && is_aligned(total);
    }

    // Columns k … k + 7 (8 neighbouring lanes have 64 columns, and so on); zeros if not `valid`.
    // PUBLISHED: as load_eight's.
    template <bool PUBLISHED = false>
    DEVICE Eight columns(int k, bool valid) {
        Eight v{}, m{}, f{};
        if (valid) {
            v = load_eight<PUBLISHED>(x + k, aligned);
            if (more) m = load_eight<PUBLISHED>(more + k, aligned);
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
    DEVICE float column(int k) const {
        if (source != ROW_NORM) return x[k];
        return (more ? x[k] + more[k] : x[k]) * factor[k];
    }
    // What stage_all adds to `squares`, and TOTAL.
    template <bool PUBLISHED = false>
    DEVICE void add_squares(int n, int warp, int n_warps) {
        for (int first = warp * BATCH; first < n; first += n_warps * BATCH) {
            const int i = first + threadIdx.x % 32 / 4;
            columns<PUBLISHED>(first * K_BLOCK + 8 * (threadIdx.x % 32), i < n);
        }
    }

    // Rounds a batch: k-blocks first … first + 7, of n.
    DEVICE void stage(RowBatch& to, int first, int n) {
        const int lane = threadIdx.x % 32, i = lane / 4, c = lane % 4;
        const Eight x = columns(first * K_BLOCK + 8 * lane, first + i < n);
        const Integers made = round_batch(x, to.head, true);
        for (int k = 0; k < 2; k++) {
            to.q[i][0][2 * c + k] = made.high[k];
            to.q[i][1][2 * c + k] = made.low[k];
        }
        if (lane < WORDS) to.zeros[lane] = 0;
    }
    // All batches of warp `warp` of n_warps, one after the other; see multiply_row.
    DEVICE void stage_all(RowBatch* to, int n, int warp, int n_warps) {
        for (int first = warp * BATCH; first < n; first += n_warps * BATCH) stage(*to++, first, n);
    }
};

// A run of neighbouring panels.
struct PanelRun {
    const uint8_t* first;
    int32_t n;
};

// A ring of slots in shared memory, each for a batch of weights, with Arrivals of its halves at the end.
struct Ring {
    char* slots;
    int32_t slot_bytes, n_slots;

    DEVICE char* slot(int i) const { return slots + i * slot_bytes; }
    DEVICE Arrivals* arrivals(int i) const {
        return reinterpret_cast<Arrivals*>(slot(i + 1) - ARRIVALS_BYTES);
    }
};
static_assert(2 * sizeof(Arrivals) <= ARRIVALS_BYTES, "as in kernels.py");

// A warp's batches of one or two runs of panels, which come to its ring: its first batch of all panels,
// then its next one. ENGINE: the copy engine brings halves of them, which takes fewer instructions, but
// longer to begin; else the lanes bring a whole one.
template <bool ENGINE, int RUNS = 1>
struct Stream {
    PanelRun run, more;
    Ring ring;
    // Bytes of a super-block's head with 4 k-blocks, and of a batch.
    int32_t panel_bytes, n_panels, half_bytes, batch_bytes;
    // Of the next fetch: the batch, its panel and the bytes of the panel from there on; its half and
    // its slot.
    const uint8_t* next;
    int32_t next_panel = 0, left, step, next_half = 0, put = 0;
    // The slot that is read, and how often the ring has been read before.
    int32_t at = 0, round = 0;

    // w: a weight that has the panels' layout.
    DEVICE Stream(const View& w, PanelRun run_, PanelRun more_, const Ring& ring_, int warp,
                  int n_warps)
        : run(run_),
          more(more_),
          ring(ring_),
          panel_bytes(w.stride[w.rank - 2]),
          n_panels(run.n + more.n),
          half_bytes((w.stride[w.rank - 1] + w.head) / 2),
          batch_bytes(w.stride[w.rank - 1]) {
        next = run.first + warp * batch_bytes;
        left = panel_bytes - warp * batch_bytes, step = n_warps * batch_bytes;
    }

    // Starts the copies of the first batches.
    DEVICE void start() {
        if (ENGINE) begin_arrivals(ring.arrivals(0), ring.n_slots, ring.slot_bytes);
#pragma unroll 1
        for (int i = 0; i < ring.n_slots * (ENGINE ? 2 : 1); i++) fetch();
    }
    // Starts the next copy, if there is one left.
    DEVICE void fetch() {
        if (left > 0) fetch_next();
        if (!ENGINE) fence_copies();
    }
    DEVICE void fetch_next() {
        const int begin = ENGINE && next_half ? half_bytes : 0;
        const int end = ENGINE && !next_half ? half_bytes : batch_bytes;
        const int last = left < begin ? begin : left < end ? left : end;
        char* slot = ring.slot(put);
        if (last < end) fill_up(slot, last, end);
        if (ENGINE) {
            copy_piece(slot + begin, next + begin, last - begin, ring.arrivals(put) + next_half);
            next_half ^= 1;
            if (next_half) return;
        } else {
#pragma unroll 1
            for (int i = threadIdx.x % 32 * 16; i < last; i += 32 * 16)
                copy_async(slot + i, next + i);
        }
        put = put + 1 < ring.n_slots ? put + 1 : 0;
        next += panel_bytes, next_panel++;
        if (RUNS == 2 && next_panel == run.n) next = more.first + (panel_bytes - left);
        if (next_panel < n_panels) return;
        next_panel = 0, left -= step;
        next = run.first + (panel_bytes - left);
    }
    // Zeros in place of what a panel's last batch lacks.
    DEVICE static void fill_up(char* slot, int begin, int end) {
#pragma unroll 1
        for (int i = begin + threadIdx.x % 32 * 16; i < end; i += 32 * 16)
            *reinterpret_cast<Words4*>(slot + i) = Words4{};
        sync_warp();
    }
    // Waits for a half of the next batch (without the engine, for all of it); returns the batch.
    DEVICE const uint8_t* wait(int half) const {
        if (ENGINE)
            wait_for_piece(ring.arrivals(at) + half, round);
        else
            wait_for_lanes();
        return reinterpret_cast<const uint8_t*>(ring.slot(at));
    }
    // Each fetch is a group of copies.
    DEVICE void wait_for_lanes() const {
        static_assert(MAX_SLOTS == 4, "as below");
        if (ring.n_slots == 1) wait_copies<0>();
        if (ring.n_slots == 2) wait_copies<1>();
        if (ring.n_slots == 3) wait_copies<2>();
        if (ring.n_slots == 4) wait_copies<3>();
        sync_warp();
    }
    // Called when all lanes have read a half (without the engine, the batch): starts the next copy to
    // its place.
    DEVICE void release(int half) {
        sync_warp();
        fetch();
        if (ENGINE && half == 0) return;
        at++;
        if (at == ring.n_slots) at = 0, round++;
    }
    // Called after the last batch; another stream may have the ring then.
    DEVICE void finish() const {
        if (ENGINE) end_arrivals(ring.arrivals(0), ring.n_slots, ring.slot_bytes);
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
        const int at = 2 * c + i;
        Pair<F> pair;
        if (at < count)
            pair.load(k_blocks + F::SUPER_HEAD + at * F::K_BLOCK_BYTES, g);
        else
            pair.clear();
        const uint32_t* own = g / 2 == c ? x.q[at][g % 2] : x.zeros;
        const auto* from = reinterpret_cast<const Words4*>(own);
        const Words4 b[2] = {from[0], from[1]};
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
            const int32_t (&sum)[2] = x.head.sum[at];
            const auto total = static_cast<float>(F::GROUPS == 2 ? sum[group] : sum[0] + sum[1]);
            for (int r = 0; r < 2; r++) {
                const auto dot = static_cast<float>(d[2 * r] * 128 + d[2 * r + 1]);
                acc[r] = fmaf(dot, scale_of(head, super, group, r), acc[r]);
                if (Piece<F>::OFFSET)
                    acc[r] = fmaf(-offset_of(head, super, group, r), total, acc[r]);
            }
        }
    }
}

// A warp's part of the products of a stream's panels, to sums [panels, 16]: batches[0] are k-blocks
// 8 · warp … 8 · warp + 7 of n, the next ones follow in steps of n_warps batches.
template <typename F, int RUNS>
DEVICE void multiply_row(F, Stream<false, RUNS>& stream, const RowBatch* batches, int n, int warp,
                         int n_warps, float* sums) {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < stream.n_panels * PANEL; i += 32) sums[i] = 0.0f;
    sync_warp();
#pragma unroll 1
    for (int first = warp * BATCH; first < n; first += n_warps * BATCH, batches++) {
        const float scale = batches->head.scale * (1.0f / Piece<F>::UNIT);
#pragma unroll 1
        for (int p = 0; p < stream.n_panels; p++) {
            float acc[2] = {};
            multiply_batch<F>(stream.wait(1), n - first, *batches, acc);
            stream.release(1);
            for (int r = 0; r < 2; r++) {
                for (int mask = 1; mask < 4; mask *= 2) acc[r] += shuffle_xor(acc[r], mask);
                float& sum = sums[p * PANEL + lane / 4 + 8 * r];
                if (lane % 4 == 0) sum = fmaf(acc[r], scale, sum);
            }
        }
    }
}

}  // namespace gdn
