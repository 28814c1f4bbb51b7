// Sorts pairs (token, choice) by expert, and lists tiles of them.
#pragma once

#include "kernel.cuh"

namespace gdn {

// The sum of x over the threads before this one; called by all threads of the block.
DEVICE int64_t sum_before(int64_t x) {
    __shared__ int64_t sums[32];
    const int lane = threadIdx.x % 32;
    int64_t sum = x;
    for (int by = 1; by < 32; by *= 2) {
        const int64_t other = shuffle_up(sum, by);
        if (lane >= by) sum += other;
    }
    if (lane == 31) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 0; w < static_cast<int>(threadIdx.x / 32); w++) sum += sums[w];
    return sum - x;
}

// Called by all threads of a block. id_of(token, choice), of n_used choices. order [pairs]; tiles
// [1 + n, 3]: first their number, then (expert, first place in `order`, rows). next: shared memory,
// [n_experts]. A thread has `n_experts / threads` neighbouring experts. If it is not `real`, nothing
// is stored.
template <typename IdOf>
DEVICE void sort_by_expert(IdOf id_of, int n_used, int n_tokens, int n_experts, int tile_rows,
                           const View& order, const View& tiles, int32_t* next, bool real) {
    const int n_pairs = n_tokens * n_used, n_threads = blockDim.x;
    const auto expert_of = [&](int pair) { return id_of(pair / n_used, pair % n_used); };
    for (int i = threadIdx.x; i < n_experts; i += n_threads) next[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_pairs; i += n_threads) add_atomic(&next[expert_of(i)], 1);
    __syncthreads();
    const int own = (n_experts + n_threads - 1) / n_threads, begin = threadIdx.x * own;
    const int end = begin + own < n_experts ? begin + own : n_experts;
    // Pairs and, in the upper half, tiles.
    int64_t n_own = 0;
    for (int i = begin; i < end; i++) {
        const int64_t n_tiles = (next[i] + tile_rows - 1) / tile_rows;
        n_own += next[i] + (n_tiles << 32);
    }
    const int64_t before = sum_before(n_own);
    auto start = static_cast<int32_t>(before), at = static_cast<int32_t>(before >> 32);
    auto* to = tiles.as<int32_t>();
    if (real && static_cast<int>(threadIdx.x) == n_threads - 1)
        to[0] = static_cast<int32_t>((before + n_own) >> 32);
    for (int expert = begin; expert < end; expert++) {
        const int32_t count = next[expert];
        next[expert] = start;
        for (int i = 0; i < count; i += tile_rows) {
            int32_t* tile = to + 3 * ++at;
            const int32_t n = count - i < tile_rows ? count - i : tile_rows;
            if (real) tile[0] = expert, tile[1] = start + i, tile[2] = n;
        }
        start += count;
    }
    __syncthreads();
    // The order of an expert's pairs varies from run to run, but changes no result.
    for (int i = threadIdx.x; i < n_pairs; i += n_threads) {
        const int32_t place = add_atomic(&next[expert_of(i)], 1);
        if (real) order.as<int32_t>()[place] = i;
    }
}

// The same for one token, whose experts are all different.
template <typename IdOf>
DEVICE void list_experts(IdOf id_of, int n_used, const View& order, const View& tiles, bool real) {
    const int i = threadIdx.x;
    auto* to = tiles.as<int32_t>();
    if (!real) return;
    if (i == 0) to[0] = n_used;
    if (i >= n_used) return;
    order.as<int32_t>()[i] = i;
    to[3 * (i + 1)] = id_of(0, i), to[3 * (i + 1) + 1] = i, to[3 * (i + 1) + 2] = 1;
}

}  // namespace gdn
