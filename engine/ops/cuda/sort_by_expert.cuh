// Sorts pairs (token, choice) by expert, and lists tiles of them.
#pragma once

#include "kernel.cuh"

namespace gdn {

// The sum of x over the threads before this one; called by all threads of the block.
DEVICE int32_t sum_before(int32_t x, int32_t* shared) {
    const int lane = threadIdx.x % 32;
    int32_t sum = x;
    for (int by = 1; by < 32; by *= 2) {
        const int32_t other = shuffle_up(sum, by);
        if (lane >= by) sum += other;
    }
    __syncthreads();
    if (lane == 31) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 0; w < static_cast<int>(threadIdx.x / 32); w++) sum += shared[w];
    return sum - x;
}

// Called by all threads of a block. ids [T, U], of which n_tokens are live. order [T · U]; tiles
// [1 + n, 3]: first their number, then (expert, first place in `order`, rows). next: shared memory,
// [n_experts]. A thread has `n_experts / threads` neighbouring experts.
DEVICE void sort_by_expert(const View& ids, int n_tokens, int n_experts, int tile_rows,
                           const View& order, const View& tiles, int32_t* next) {
    __shared__ int32_t scratch[32];
    const int n_used = ids.shape[1], n_pairs = n_tokens * n_used, n_threads = blockDim.x;
    const auto id_of = [&](int pair) {
        return load_published(ids.as<int32_t>() +
                              static_cast<int64_t>(pair / n_used) * ids.stride[0] +
                              pair % n_used * ids.stride[1]);
    };
    for (int i = threadIdx.x; i < n_experts; i += n_threads) next[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_pairs; i += n_threads) add_atomic(&next[id_of(i)], 1);
    __syncthreads();
    const int own = (n_experts + n_threads - 1) / n_threads, begin = threadIdx.x * own;
    const int end = begin + own < n_experts ? begin + own : n_experts;
    int32_t n_own = 0, n_own_tiles = 0;
    for (int i = begin; i < end; i++) {
        n_own += next[i];
        n_own_tiles += (next[i] + tile_rows - 1) / tile_rows;
    }
    int32_t start = sum_before(n_own, scratch), at = sum_before(n_own_tiles, scratch);
    auto* to = tiles.as<int32_t>();
    if (static_cast<int>(threadIdx.x) == n_threads - 1) to[0] = at + n_own_tiles;
    for (int expert = begin; expert < end; expert++) {
        const int32_t count = next[expert];
        next[expert] = start;
        for (int i = 0; i < count; i += tile_rows) {
            int32_t* tile = to + 3 * ++at;
            tile[0] = expert, tile[1] = start + i;
            tile[2] = count - i < tile_rows ? count - i : tile_rows;
        }
        start += count;
    }
    __syncthreads();
    // The order of an expert's pairs varies from run to run, but changes no result.
    for (int i = threadIdx.x; i < n_pairs; i += n_threads)
        order.as<int32_t>()[add_atomic(&next[id_of(i)], 1)] = i;
}

// The same for one token, whose experts are all different.
DEVICE void list_experts(const View& ids, const View& order, const View& tiles) {
    const int i = threadIdx.x, n_used = ids.shape[1];
    auto* to = tiles.as<int32_t>();
    if (i == 0) to[0] = n_used;
    if (i >= n_used) return;
    order.as<int32_t>()[i] = i;
    to[3 * (i + 1)] = load_published(ids.as<int32_t>() + i * ids.stride[1]);
    to[3 * (i + 1) + 1] = i, to[3 * (i + 1) + 2] = 1;
}

}  // namespace gdn
