// What the ways to compute ATTENTION share: remainder rows one by one (attention_rows.cpp), and row
// tiles as matrix products (attention_tiles.cpp).
#pragma once

#include "paged.h"

namespace gdn::attention_op {

// Elements before the sums of a position chunk in PARTIALS.
constexpr int64_t PARTIAL_HEAD = 16;

// Attribute: scale.
enum { OUT, PARTIALS, Q, K_CACHE, V_CACHE, GATE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };

// Tasks of an instruction: first the row tiles', which take longest, then the remainder rows'.
int64_t n_tile_tasks(const Args& a);
int64_t n_row_tasks(const Args& a);
void run_tile_tasks(const Args& a, int64_t begin, int64_t end);
void run_row_tasks(const Args& a, int64_t begin, int64_t end);

// The query heads of each key head, cut into parts of one size but for the last.
struct HeadParts {
    int64_t n_kv, group, n_parts, n_heads;

    HeadParts(const Args& a, int64_t max_heads)
        : n_kv(a.v[K_CACHE].shape[1]), group(a.v[Q].shape[1] / n_kv) {
        cut((group + max_heads - 1) / max_heads);
    }

    void cut(int64_t parts) {
        n_heads = (group + parts - 1) / parts;
        n_parts = (group + n_heads - 1) / n_heads;
    }
    int64_t first(int64_t kv_head, int64_t part) const { return kv_head * group + part * n_heads; }
    int64_t size(int64_t part) const {
        const int64_t rest = group - part * n_heads;
        return rest < n_heads ? rest : n_heads;
    }
};

inline const int32_t* block_table(const Args& a, int64_t seq) {
    const View& tables = a.v[BLOCK_TABLES];
    return tables.as<int32_t>() + seq * tables.stride[0];
}

// Pointers to a key head's rows at some positions of a sequence.
template <typename T>
void find_rows(const View& cache, const int32_t* table, int64_t kv_head, int64_t begin, int64_t end,
               const T** rows) {
    const int64_t block_size = cache.shape[2];
    while (begin < end) {
        const int64_t block = begin / block_size, row = begin % block_size;
        const int64_t n = end - begin < block_size - row ? end - begin : block_size - row;
        const char* p = cache_row(cache, table[block], kv_head, row);
        for (int64_t i = 0; i < n; i++)
            *rows++ = reinterpret_cast<const T*>(p) + i * cache.stride[2];
        begin += n;
    }
}

// Runs f with a value of the type of keys, and one of that of values.
template <typename F>
void for_types(const Args& a, F f) {
    const bool half_values = a.v[V_CACHE].dtype == F16;
    if (a.v[K_CACHE].dtype == F16)
        half_values ? f(uint16_t{}, uint16_t{}) : f(uint16_t{}, float{});
    else
        half_values ? f(float{}, uint16_t{}) : f(float{}, float{});
}

// The result of head h of row t: the weighted sum of values, by the sum of weights, and gated.
void store_result(const Args& a, int64_t t, int64_t h, const float* acc, float total);

}  // namespace gdn::attention_op
