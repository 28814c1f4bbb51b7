// Which part of a batch of ragged sequences a block works on.
#pragma once

#include "kernel.cuh"

namespace gdn {

struct Found {
    int32_t seq, index;
};

// Each sequence has count(its rows) items: the sequence that has the item of a number, and its number
// there; seq -1 if there are fewer items. By whole warps.
template <typename F>
DEVICE Found find(const View& seq_starts, int32_t n_seqs, int32_t index, F count) {
    const int32_t* starts = seq_starts.as<int32_t>();
    const int lane = threadIdx.x % 32;
    for (int32_t base = 0; base < n_seqs; base += 32) {
        const int32_t s = base + lane;
        const int32_t n = s < n_seqs ? count(starts[s + 1] - starts[s]) : 0;
        int32_t sum = n;
        for (int by = 1; by < 32; by *= 2) {
            const int32_t below = shuffle_up(sum, by);
            if (lane >= by) sum += below;
        }
        const int first = 32 - count_bits(ballot(sum > index));
        if (first < 32) return {base + first, index - shuffle(sum - n, first)};
        index -= shuffle(sum, 31);
    }
    return {-1, 0};
}

}  // namespace gdn
