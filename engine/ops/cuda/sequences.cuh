// Finds the part of a batch of ragged sequences that a thread block works on.
#pragma once

#include "kernel.cuh"

namespace gdn {

// Item `index` of sequence `seq`, and the sequence's first row and number of rows; seq -1: none.
struct Found {
    int32_t seq, index, begin, n_rows;
};

// Finds item number `index` where each sequence has count(its rows) items. Called by whole warps.
template <typename F>
DEVICE Found find(const View& seq_starts, const int32_t* live_seqs, int32_t index, F count) {
    const int32_t* starts = seq_starts.as<int32_t>();
    const int32_t last = seq_starts.shape[0] - 2, n_seqs = *live_seqs;
    const int lane = threadIdx.x % 32;
    int32_t base = 0;
    do {
        // Read without waiting for the count of sequences: index `at` is always in bounds.
        const int32_t s = base + lane, at = s < last ? s : last;
        const int32_t begin = starts[at], n_rows = starts[at + 1] - begin;
        const int32_t n = s < n_seqs ? count(n_rows) : 0;
        int32_t sum = n;
        for (int by = 1; by < 32; by *= 2) {
            const int32_t below = shuffle_up(sum, by);
            if (lane >= by) sum += below;
        }
        const int first = 32 - count_bits(ballot(sum > index));
        if (first < 32)
            return {base + first, index - shuffle(sum - n, first), shuffle(begin, first),
                    shuffle(n_rows, first)};
        index -= shuffle(sum, 31);
        base += 32;
    } while (base < n_seqs);
    return {-1, 0, 0, 0};
}

}  // namespace gdn
