// QK_NORM_ROPE: RMS norm and rotary embedding of queries and keys, keys and values to the cache. A
// block is eight heads of a row, a warp for each: first the queries', then the keys' and values'.

#include "cache_rows.cuh"
#include "rope.cuh"

namespace gdn {

enum { OUT, Q, K, V, Q_NORM, K_NORM, K_CACHE, V_CACHE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };
// put(c, value) gets every column once. A warp's work.
template <typename Put>
DEVICE void norm_and_turn(const float* x, const float* norm, float scale, int size, int half,
                          const Angles& angles, Put put) {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < half; i += 32) {
        const float first = x[i] * (scale * norm[i]);
        const float second = x[half + i] * (scale * norm[half + i]);
        const float cos = angles.cos[i], sin = angles.sin[i];
        put(i, first * cos - second * sin);
        put(half + i, second * cos + first * sin);
    }
    for (int c = 2 * half + lane; c < size; c += 32) put(c, x[c] * (scale * norm[c]));
}

}  // namespace gdn

// Grid: (rows, (query heads + key heads) / warps).
KERNEL(qk_norm_rope) {
    using namespace gdn;
    __shared__ Angles angles;
    const int t = blockIdx.x, lane = threadIdx.x % 32;
    if (t >= a.rows(a.v[Q])) return;
    const int n_heads = a.v[Q].shape[1], n_kv = a.v[K].shape[1], size = a.v[Q].shape[2];
    const int half = static_cast<int>(a.attr[N_ROT]) / 2;
    const int i = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, h = i - n_heads;
    const int32_t position = a.v[POSITIONS].as<int32_t>()[t];
    // Loads of the head start first; the angles are computed meanwhile.
    const float* x = i < n_heads ? a.v[Q].row(t, i) : a.v[K].row(t, h < n_kv ? h : 0);
    const float* norm = a.v[i < n_heads ? Q_NORM : K_NORM].as<float>();
    float sum = 0.0f;
#pragma unroll 8
    for (int c = lane; c < size; c += 32) sum = fmaf(x[c], x[c], sum);
    for (int pair = threadIdx.x; pair < half; pair += blockDim.x)
        set_angle(angles, a, pair, position);
    const float mean = warp_sum(sum) / static_cast<float>(size);
    const float scale = rsqrt_of(mean + a.attr[EPS]);
    __syncthreads();
    if (h >= n_kv) return;
    if (i < n_heads) {
        float* out = a.v[OUT].row(t, i);
        norm_and_turn(x, norm, scale, size, half, angles, [&](int c, float y) { out[c] = y; });
        return;
    }
    const int32_t* blocks = blocks_of_row(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
    const CacheRow key(a.v[K_CACHE], blocks, position, h), value(a.v[V_CACHE], blocks, position, h);
    norm_and_turn(x, norm, scale, size, half, angles, [&](int c, float y) { key.put(c, y); });
    const float* v = a.v[V].row(t, h);
    for (int c = lane; c < size; c += 32) value.put(c, v[c]);
}
