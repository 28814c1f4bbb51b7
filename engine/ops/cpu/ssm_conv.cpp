// SSM_CONV: causal depthwise convolution and SiLU, a task for each sequence and block of channels.
//
// A task copies its channels of the history before it writes, as a sequence may end in the slot
// that it starts from. Consecutive tasks are sequences of one block of channels, whose taps are
// transposed once for all of them.

#include "kernels.h"

namespace gdn {
namespace {

enum { OUT, STATE, SEQ_STARTS, STATE_SRC, STATE_DST, SNAPSHOT_DST, X, WEIGHT };
constexpr int N_PARTS = 3;  // X and WEIGHT are followed by those of the other parts.
constexpr int64_t BLOCK = 256;
// Rows between the request for a row's channels and their use: each row is on a page of its own.
constexpr int64_t AHEAD = 6;

int64_t n_blocks(const View& x) { return x ? (x.shape[1] + BLOCK - 1) / BLOCK : 0; }

int64_t all_blocks(const Args& a) {
    int64_t n = 0;
    for (int part = 0; part < N_PARTS; part++) n += n_blocks(a.v[X + 2 * part]);
    return n;
}

// Channels of one part: `size` of them from `start`, which are `offset` ones in state and output.
struct Channels {
    const View *x, *weight;
    int64_t start, offset, size;
};

Channels find_channels(const Args& a, int64_t block) {
    const View* x = &a.v[X];
    int64_t before = 0;
    for (; block >= n_blocks(*x); x += 2) {
        block -= n_blocks(*x);
        before += x->shape[1];
    }
    const int64_t start = block * BLOCK, left = x->shape[1] - start;
    return {x, x + 1, start, before + start, left < BLOCK ? left : BLOCK};
}

// Weights [size, K] as [K, BLOCK], from channel c on.
void turn_taps(float* taps, const float* weight, int64_t c, int64_t size, int64_t n_taps) {
    for (; c < size; c++)
        for (int64_t j = 0; j < n_taps; j++) taps[j * BLOCK + c] = weight[c * n_taps + j];
}

// The same for 4 taps: squares of four are turned in registers, as this may cost as much as the
// convolution of a single row.
void turn_4_taps(float* taps, const float* weight, int64_t size) {
    int64_t c = 0;
    for (; c + 4 <= size; c += 4) {
        v4 w[4], halves[4], turned[4];
        std::memcpy(w, weight + 4 * c, sizeof(w));
        for (int i = 0; i < 2; i++) {
            halves[i] = __builtin_shufflevector(w[2 * i], w[2 * i + 1], 0, 4, 1, 5);
            halves[i + 2] = __builtin_shufflevector(w[2 * i], w[2 * i + 1], 2, 6, 3, 7);
        }
        for (int i = 0; i < 2; i++) {
            const v4 left = halves[2 * i], right = halves[2 * i + 1];
            turned[2 * i] = __builtin_shufflevector(left, right, 0, 1, 4, 5);
            turned[2 * i + 1] = __builtin_shufflevector(left, right, 2, 3, 6, 7);
        }
        for (int j = 0; j < 4; j++) std::memcpy(taps + j * BLOCK + c, &turned[j], sizeof(v4));
    }
    turn_taps(taps, weight, c, size, 4);
}

// One block of channels in one sequence, whose rows are `n` from `first`. Both arrays are scratch.
struct Window {
    const Args& a;
    const Channels& channels;
    int64_t n_taps, first, n;
    float* history;     // [K - 1, BLOCK]
    const float* taps;  // [K, BLOCK]; with the history 2 KiB for each of up to 512 taps.

    // Row i of the history and the batch's rows after it.
    const float* row(int64_t i) const {
        const int64_t t = i - (n_taps - 1);
        return t < 0 ? history + i * BLOCK : channels.x->row(first + t) + channels.start;
    }

    void load_history(int64_t slot) const {
        const size_t bytes = 4 * static_cast<size_t>(channels.size);
        for (int64_t i = 0; i < n_taps - 1; i++) {
            if (slot < 0)
                std::memset(history + i * BLOCK, 0, bytes);
            else
                std::memcpy(history + i * BLOCK, a.v[STATE].row(slot, i) + channels.offset, bytes);
        }
    }

    // The state after `end` rows.
    void save(int64_t slot, int64_t end) const {
        const size_t bytes = 4 * static_cast<size_t>(channels.size);
        for (int64_t i = 0; i < n_taps - 1; i++)
            std::memcpy(a.v[STATE].row(slot, i) + channels.offset, row(end + i), bytes);
    }

    void save_all(int64_t s) const {
        const View& snapshots = a.v[SNAPSHOT_DST];
        const int64_t n_snapshots = snapshots.shape[1];
        const int32_t* slots = snapshots.as<int32_t>() + s * snapshots.stride[0];
        for (int64_t j = 0; j < n_snapshots; j++) {
            const int64_t end = n - n_snapshots + j + 1;
            if (end > 0 && slots[j] >= 0) save(slots[j], end);
        }
        const int32_t last = a.v[STATE_DST].as<int32_t>()[s];
        if (last >= 0) save(last, n);
    }

    void convolve() const {
        for (int64_t t = 0; t < n; t++) {
            float* out = a.v[OUT].row(first + t) + channels.offset;
            for_lanes(channels.size, [&](int64_t c, int w) {
                vf total{};
                for (int64_t j = 0; j < n_taps; j++)
                    total = fma(load_part(taps + j * BLOCK + c, w), load_part(row(t + j) + c, w),
                                total);
                store_part(out + c, silu(total), w);
            });
        }
    }

    void fetch(int64_t t) const {
        const float* x = channels.x->row(first + t) + channels.start;
        const float* out = a.v[OUT].row(first + t) + channels.offset;
        for (int64_t c = 0; c < channels.size; c += 16) {
            __builtin_prefetch(x + c);
            __builtin_prefetch(out + c, 1);
        }
    }

    void convolve_4() const {
        const float *r0 = row(0), *r1 = row(1), *r2 = row(2);
        for (int64_t t = 0; t < n; t++) {
            const float* r3 = row(t + 3);
            float* out = a.v[OUT].row(first + t) + channels.offset;
            if (t + AHEAD < n) fetch(t + AHEAD);
            for_lanes(channels.size, [&](int64_t c, int w) {
                vf total = load_part(taps + BLOCK + c, w) * load_part(r1 + c, w);
                total = fma(load_part(taps + c, w), load_part(r0 + c, w), total);
                total = fma(load_part(taps + 2 * BLOCK + c, w), load_part(r2 + c, w), total);
                total = fma(load_part(taps + 3 * BLOCK + c, w), load_part(r3 + c, w), total);
                store_part(out + c, silu(total), w);
            });
            r0 = r1, r1 = r2, r2 = r3;
        }
    }
};

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_seqs = a.rows(a.v[STATE_SRC]), n_taps = a.v[WEIGHT].shape[1];
    const int32_t* seq_starts = a.v[SEQ_STARTS].as<int32_t>();
    float *taps = reinterpret_cast<float*>(a.scratch), *history = taps + n_taps * BLOCK;
    Channels channels{};
    for (int64_t task = begin; task < end; task++) {
        const int64_t s = task % n_seqs, first = seq_starts[s], n = seq_starts[s + 1] - first;
        if (task == begin || s == 0) {
            channels = find_channels(a, task / n_seqs);
            const float* weight = channels.weight->row(channels.start);
            if (n_taps == 4)
                turn_4_taps(taps, weight, channels.size);
            else
                turn_taps(taps, weight, 0, channels.size, n_taps);
        }
        if (n <= 0) continue;
        const Window window{a, channels, n_taps, first, n, history, taps};
        window.load_history(a.v[STATE_SRC].as<int32_t>()[s]);
        n_taps == 4 ? window.convolve_4() : window.convolve();
        window.save_all(s);
    }
}

}  // namespace

const Kernel ssm_conv = {"SSM_CONV",
                         [](const Args& a) { return a.rows(a.v[STATE_SRC]) * all_blocks(a); }, run};

}  // namespace gdn
