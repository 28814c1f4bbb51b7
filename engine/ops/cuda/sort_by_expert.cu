// SORT_BY_EXPERT: the pairs (token, choice) by expert, and tiles of them.

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

}  // namespace gdn

// One block. ORDER [T · U]; TILES [1 + n, 3]: first their number, then (expert, first place in
// ORDER, rows). Attributes: experts (as many as threads at most), rows of a tile.
KERNEL(sort_by_expert) {
    using namespace gdn;
    enum { ORDER, TILES, IDS };
    __shared__ int32_t next[1024], scratch[32];
    const View& ids = a.v[IDS];
    const int n_used = ids.shape[1], n_pairs = a.rows(ids) * n_used;
    const int n_experts = static_cast<int>(a.attr[0]), tile_rows = static_cast<int>(a.attr[1]);
    const int expert = threadIdx.x;
    const auto id_of = [&](int pair) {
        return ids.as<int32_t>()[static_cast<int64_t>(pair / n_used) * ids.stride[0] +
                                 pair % n_used * ids.stride[1]];
    };
    next[expert] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_pairs; i += blockDim.x) add_atomic(&next[id_of(i)], 1);
    __syncthreads();
    const int32_t count = expert < n_experts ? next[expert] : 0;
    const int32_t n_tiles = (count + tile_rows - 1) / tile_rows;
    const int32_t start = sum_before(count, scratch), first = sum_before(n_tiles, scratch);
    auto* tiles = a.v[TILES].as<int32_t>();
    for (int i = 0; i < n_tiles; i++) {
        int32_t* to = tiles + 3 * (1 + first + i);
        to[0] = expert, to[1] = start + i * tile_rows;
        to[2] = count - i * tile_rows < tile_rows ? count - i * tile_rows : tile_rows;
    }
    if (threadIdx.x == blockDim.x - 1) tiles[0] = first + n_tiles;
    next[expert] = start;
    __syncthreads();
    // The order of an expert's pairs varies from run to run, but changes no result.
    for (int i = threadIdx.x; i < n_pairs; i += blockDim.x)
        a.v[ORDER].as<int32_t>()[add_atomic(&next[id_of(i)], 1)] = i;
}
