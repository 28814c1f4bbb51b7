// Rows of a paged cache [n_blocks, heads, block_size, size], float32 or float16, to write to.
#pragma once

#include "kernel.cuh"

namespace gdn {

// The blocks of the sequence that row t of the batch belongs to.
DEVICE const int32_t* blocks_of_row(const Args& a, const View& seq_starts, const View& tables,
                                    int32_t t) {
    const int32_t* starts = seq_starts.as<int32_t>();
    const int32_t n_seqs = a.rows(tables);
    // In a decode step row t belongs to sequence t: no search.
    const bool alone = t < n_seqs && starts[t] <= t && t < starts[t + 1];
    const int32_t s = alone ? t : sequence_of(starts, n_seqs, t);
    return tables.as<int32_t>() + static_cast<int64_t>(s) * tables.stride[0];
}

// A head's row at a position.
struct CacheRow {
    char* data;
    bool is_half;

    DEVICE CacheRow(const View& cache, const int32_t* blocks, int32_t position, int32_t head)
        : data(cache.data), is_half(cache.dtype == F16) {
        const int32_t block_size = cache.shape[2];
        const int64_t block = blocks[position / block_size];
        data += (is_half ? 2 : 4) *
                (block * cache.stride[0] + static_cast<int64_t>(head) * cache.stride[1] +
                 static_cast<int64_t>(position % block_size) * cache.stride[2]);
    }
    // Rounds to the cache's type.
    DEVICE void put(int c, float x) const {
        if (is_half)
            reinterpret_cast<uint16_t*>(data)[c] = float_to_half(x);
        else
            reinterpret_cast<float*>(data)[c] = x;
    }
};

}  // namespace gdn
