// SSM_CONV's channels, and a window that moves over the rows of one sequence.
#pragma once

#include "kernel.cuh"

namespace gdn {

enum { OUT, STATE, SEQ_STARTS, STATE_SRC, STATE_DST, SNAPSHOT_DST, X, WEIGHT };
constexpr int N_PARTS = 3;  // X and WEIGHT are followed by those of the other parts.
constexpr int AHEAD = 8;

// One channel: `x` and `weight` are its column and row of a part, `c` its number in state and
// output.
struct Channel {
    const float *x, *weight;
    int64_t stride;
    int c;
};

// False if there is none of this number.
DEVICE bool find_channel(const Args& a, int c, Channel& channel) {
    int within = c;
    for (int part = 0; part < N_PARTS; part++) {
        const View &x = a.v[X + 2 * part], &weight = a.v[WEIGHT + 2 * part];
        if (!x) return false;
        if (within < x.shape[1]) {
            channel = {x.row(0) + within, weight.row(within), x.stride[0], c};
            return true;
        }
        within -= x.shape[1];
    }
    return false;
}

// A channel of one sequence, whose rows are `n` from `first`. N_TAPS 0: known only now.
template <int N_TAPS>
struct Window {
    const Args& a;
    const Channel& channel;
    const float* taps;
    int some_taps, first, n, source, target;

    DEVICE int n_taps() const { return N_TAPS ? N_TAPS : some_taps; }

    DEVICE float x(int t) const { return channel.x[(first + t) * channel.stride]; }
    DEVICE float* state(int slot, int i) const { return a.v[STATE].row(slot, i) + channel.c; }

    // Row t of the sequence, those before the batch included.
    DEVICE float at(int t) const {
        if (t >= 0) return x(t);
        return source < 0 ? 0.0f : *state(source, n_taps() - 1 + t);
    }

    DEVICE void put(int t, const float* window) const {
        float total = 0.0f;
        for (int j = 0; j < n_taps(); j++) total = fmaf(taps[j], window[j], total);
        a.v[OUT].row(first + t)[channel.c] = silu(total);
    }

    // Rows from `t` up to `end`.
    DEVICE void convolve(int t, int end) const {
        float window[N_TAPS ? N_TAPS : CONV_MAX_TAPS];
        for (int j = 0; j + 1 < n_taps(); j++) window[j] = at(t - n_taps() + 1 + j);
        const auto next = [&](float value) {
            window[n_taps() - 1] = value;
            put(t++, window);
            for (int j = 0; j + 1 < n_taps(); j++) window[j] = window[j + 1];
        };
        while (t + AHEAD <= end) {
            float values[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) values[i] = x(t + i);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) next(values[i]);
        }
        while (t < end) next(x(t));
    }

    // Writes the state after `end` rows, in ascending order: in place, reads lie above writes.
    DEVICE void save(int slot, int end) const {
        for (int i = 0; i + 1 < n_taps(); i++) *state(slot, i) = at(end - n_taps() + 1 + i);
    }

    DEVICE void save_all(int s) const {
        const View& snapshots = a.v[SNAPSHOT_DST];
        const int n_snapshots = snapshots.shape[1];
        const int32_t* slots = snapshots.as<int32_t>() + s * snapshots.stride[0];
        for (int j = 0; j < n_snapshots; j++) {
            const int end = n - n_snapshots + j + 1;
            if (end > 0 && slots[j] >= 0) save(slots[j], end);
        }
        if (target >= 0) save(target, n);
    }
};

}  // namespace gdn
