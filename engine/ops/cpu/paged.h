// Rows of a paged cache [n_blocks, heads, block_size, size], float32 or float16.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace gdn {

// The blocks of the sequence that row t of the batch belongs to.
inline const int32_t* block_table_of(const Args& a, const View& seq_starts, const View& tables,
                                     int64_t t) {
    const int64_t s = sequence_of(seq_starts.as<int32_t>(), a.rows(tables), t);
    return tables.as<int32_t>() + s * tables.stride[0];
}

inline char* cache_row(const View& cache, int64_t block, int64_t head, int64_t row) {
    const int64_t item = cache.dtype == F16 ? 2 : 4;
    return cache.data +
           item * (block * cache.stride[0] + head * cache.stride[1] + row * cache.stride[2]);
}

// Writes a head's row at a position, rounded to the cache's type.
inline void write_cache(const View& cache, const int32_t* table, int64_t position, int64_t head,
                        const float* x) {
    const int64_t block_size = cache.shape[2], size = cache.shape[3];
    char* row = cache_row(cache, table[position / block_size], head, position % block_size);
    if (cache.dtype == F32) {
        std::memcpy(row, x, 4 * static_cast<size_t>(size));
        return;
    }
    for_lanes(size, [&](int64_t i, int n) {
        uint16_t halves[W];
        float_to_half(halves, load_part(x + i, n));
        std::memcpy(row + 2 * i, halves, 2 * static_cast<size_t>(n));
    });
}

}  // namespace gdn
