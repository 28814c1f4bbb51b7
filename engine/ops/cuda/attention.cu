// ATTENTION with float16 caches on tensor cores (see attention_tiles.cuh): tiles of a sequence's
// rows, loose (remainder) rows by chunks of their positions, and the join of chunks.

#include "attention_tiles.cuh"

namespace gdn::attention_op {

DEVICE bool queries_aligned(const View& q) {
    return reinterpret_cast<uint64_t>(q.data) % 16 == 0 && q.stride[0] % 4 == 0 &&
           q.stride[1] % 4 == 0;
}

// A tile has ROWS of a sequence's pairs (token, head of a key head's group), heads varying fastest.
template <typename S>
DEVICE void run_tile(const Args& a, char* memory) {
    __shared__ float largest[S::ROWS * S::N_WARPS], sums[S::ROWS * S::N_WARPS];
    const int group = a.v[Q].shape[1] / a.v[K_CACHE].shape[1], kv_head = blockIdx.y;
    const int min_rows = static_cast<int>(a.attr[1]);
    // The last tiles of a sequence attend to the most positions, so they start first.
    const Found f =
        find(a.v[SEQ_STARTS], a.live + N_SEQS, gridDim.x - 1 - blockIdx.x,
             [&](int32_t n) { return n < min_rows ? 0 : (n * group + S::ROWS - 1) / S::ROWS; });
    if (f.seq < 0) return;
    const int32_t begin = f.begin, n_rows = f.n_rows * group;
    const int32_t* positions = a.v[POSITIONS].as<int32_t>() + begin;
    const int base = f.index * S::ROWS;
    const int last = (base + S::ROWS < n_rows ? base + S::ROWS : n_rows) - 1;
    const int row = threadIdx.x / 32 / S::N_WARPS * 16 + threadIdx.x % 32 / 4;
    int limits[2];
    for (int i = 0; i < 2; i++) {
        const int r = base + row + 8 * i;
        limits[i] = positions[(r < last ? r : last) / group];
    }
    Tiles<S> tiles(a, f.seq, kv_head, memory, largest, sums);
    const View& q = a.v[Q];
    auto query = [&](int i) -> const float* {
        const int r = base + i;
        return r > last ? nullptr : q.row(begin + r / group, kv_head * group + r % group);
    };
    tiles.load_queries(query, a.attr[0], queries_aligned(q));
    Sums<S> result;
    tiles.attend(result, 0, positions[last / group] + 1, limits);
    result.for_each([&](int i, int column, float x, int which) {
        const int r = base + i;
        if (r > last) return;
        store_result(a, begin + r / group, kv_head * group + r % group, column, x, result.l[which]);
    });
}

// Chunks x, x + gridDim.x, … of a loose row, for up to 16 heads of a key head's group. Their
// results go to PARTIALS; without PARTIALS one thread block takes all chunks and joins them in
// their order.
template <typename S>
DEVICE void run_loose(const Args& a, char* memory) {
    __shared__ float largest[S::ROWS * S::N_WARPS], sums[S::ROWS * S::N_WARPS];
    const int group = a.v[Q].shape[1] / a.v[K_CACHE].shape[1];
    const int parts = (group + S::ROWS - 1) / S::ROWS, part = blockIdx.y % parts * S::ROWS;
    const int kv_head = blockIdx.y / parts, first_head = kv_head * group + part;
    const int n_heads = group - part < S::ROWS ? group - part : S::ROWS;
    const Loose loose(a, blockIdx.z);
    if (loose.row < 0) return;
    const int n = a.v[POSITIONS].as<int32_t>()[loose.row] + 1;
    const int size = chunk_size(n), n_chunks = (n + size - 1) / size;
    if (static_cast<int>(blockIdx.x) >= n_chunks) return;

    Tiles<S> tiles(a, loose.seq, kv_head, memory, largest, sums);
    const View &q = a.v[Q], &partials = a.v[PARTIALS];
    auto query = [&](int i) { return i < n_heads ? q.row(loose.row, first_head + i) : nullptr; };
    tiles.load_queries(query, a.attr[0], queries_aligned(q));
    const int limits[2] = {n - 1, n - 1};
    Sums<S> all, chunk;
    all.clear();
    for (int c = blockIdx.x; c < n_chunks; c += gridDim.x) {
        tiles.attend(chunk, c * size, n < (c + 1) * size ? n : (c + 1) * size, limits);
        if (!partials) {
            all.join(chunk);
            continue;
        }
        chunk.for_each([&](int i, int column, float x, int which) {
            if (i >= n_heads) return;
            float* to = partials.row(blockIdx.z, first_head + i) + c * partials.stride[2];
            to[column] = x;
            if (column == 0) to[S::DV] = chunk.m[which], to[S::DV + 1] = chunk.l[which];
        });
    }
    if (partials) return;
    all.for_each([&](int i, int column, float x, int which) {
        if (i < n_heads) store_result(a, loose.row, first_head + i, column, x, all.l[which]);
    });
}

}  // namespace gdn::attention_op

// Grid: (blocks for a row's chunks, key heads · parts of 16 heads of their groups, loose rows).
#define LOOSE(NAME, ...)                                                      \
    KERNEL(attention_loose_##NAME) {                                          \
        using namespace gdn::attention_op;                                    \
        using S = Shape<__VA_ARGS__>;                                         \
        static_assert(S::THREADS == gdn::THREADS_attention_loose_##NAME, ""); \
        static_assert(S::ROWS == gdn::ATTENTION_LOOSE_ROWS, "");              \
        KERNEL_SHARED(attention_loose_##NAME, memory, S::SHARED);             \
        run_loose<S>(a, memory);                                              \
    }
// Grid: (tiles, key heads).
#define TILES(NAME, ...)                                                      \
    KERNEL(attention_tiles_##NAME) {                                          \
        using namespace gdn::attention_op;                                    \
        using S = Shape<__VA_ARGS__>;                                         \
        static_assert(S::THREADS == gdn::THREADS_attention_tiles_##NAME, ""); \
        static_assert(S::ROWS == gdn::ATTENTION_TILE_ROWS_##NAME, "");        \
        KERNEL_SHARED(attention_tiles_##NAME, memory, S::SHARED);             \
        run_tile<S>(a, memory);                                               \
    }

LOOSE(64, 64, 64, 1, 4, 32)
LOOSE(128, 128, 128, 1, 4, 32)
LOOSE(256, 256, 256, 1, 4, 32)
LOOSE(latent, 576, 512, 1, 4, 32, true)
TILES(64, 64, 64, 4, 1, 64)
TILES(128, 128, 128, 4, 1, 64)
TILES(256, 256, 256, 4, 2, 32)
TILES(latent, 576, 512, 2, 4, 32, true)

// Joins the chunks of a loose row's head. Grid: (heads, loose rows).
KERNEL(attention_join) {
    using namespace gdn;
    using namespace gdn::attention_op;
    __shared__ float sum_factors[MAX_POSITION_CHUNKS], chunk_factors[MAX_POSITION_CHUNKS],
        chunk_l[MAX_POSITION_CHUNKS];
    const int h = blockIdx.x, lane = threadIdx.x % 32, size = a.v[OUT].shape[2];
    const Loose loose(a, blockIdx.y);
    if (loose.row < 0) return;
    const int n = a.v[POSITIONS].as<int32_t>()[loose.row] + 1;
    const int n_chunks = (n + chunk_size(n) - 1) / chunk_size(n);
    const View& partials = a.v[PARTIALS];
    const float* from = partials.row(blockIdx.y, h);
    if (threadIdx.x < 32) {
        // Largest scores before each chunk, by a scan.
        float before = -infinity();
        for (int base = 0; base < n_chunks; base += 32) {
            const int c = base + lane;
            const bool live = c < n_chunks;
            const float* of = from + static_cast<int64_t>(live ? c : 0) * partials.stride[2] + size;
            const float m = live ? of[0] : -infinity(), l = of[1];
            float most = m;
            for (int by = 1; by < 32; by *= 2) {
                const float below = shuffle_up(most, by);
                if (lane >= by) most = fmaxf(most, below);
            }
            const float previous = shuffle_up(most, 1);
            const float sum_m = lane ? fmaxf(before, previous) : before;
            if (live) {
                const Factors f(sum_m, m);
                sum_factors[c] = f.sum, chunk_factors[c] = f.chunk, chunk_l[c] = l;
            }
            before = fmaxf(before, shuffle(most, 31));
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < size; d += blockDim.x) {
        float acc = 0.0f, l = 0.0f;
#pragma unroll 8
        for (int c = 0; c < n_chunks; c++) {
            const Factors f(sum_factors[c], chunk_factors[c], 0);
            acc = f.join(acc, from[static_cast<int64_t>(c) * partials.stride[2] + d]);
            l = f.join(l, chunk_l[c]);
        }
        store_result(a, loose.row, h, d, acc, l);
    }
}
