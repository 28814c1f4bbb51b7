// MLA_CACHE: the normalised latent and the rest of its row go to the cache, a block for each row. That
// rest and its part of the queries turn where there is a rope.

#include "cache_rows.cuh"
#include "rope.cuh"

namespace gdn {

enum { Q_OUT, KV, NORM, K_CACHE, Q_PE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };

// Entry c of x, whose first 2 · half entries turn as pairs of neighbours.
DEVICE float turned(const float* x, int c, int half, const Angles& angles) {
    const int i = c / 2;
    if (i >= half) return x[c];
    const float cos = angles.cos[i], sin = angles.sin[i];
    return c % 2 ? x[c] * cos + x[c - 1] * sin : x[c] * cos - x[c + 1] * sin;
}

}  // namespace gdn

// Grid: rows.
KERNEL(mla_cache) {
    using namespace gdn;
    __shared__ float shared[32];
    __shared__ Angles angles;
    const int t = blockIdx.x;
    if (t >= a.rows(a.v[KV])) return;
    const int size = a.v[KV].shape[1], rank = a.v[NORM].shape[0], pe = size - rank;
    const int half = static_cast<int>(a.attr[N_ROT]) / 2;
    const float *kv = a.v[KV].row(t), *norm = a.v[NORM].as<float>();
    const int32_t* blocks = blocks_of_row(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
    const int32_t position = a.v[POSITIONS].as<int32_t>()[t];
    const CacheRow row(a.v[K_CACHE], blocks, position, 0);
    float sum = 0.0f;
    for (int c = threadIdx.x; c < rank; c += blockDim.x) sum = fmaf(kv[c], kv[c], sum);
    for (int i = threadIdx.x; i < half; i += blockDim.x) set_angle(angles, a, i, position);
    // Its barriers let all threads see the angles.
    const float mean = block_sum(sum, shared) / static_cast<float>(rank);
    const float scale = rsqrt_of(mean + a.attr[EPS]);
    for (int c = threadIdx.x; c < size; c += blockDim.x)
        row.put(c,
                c < rank ? kv[c] * (scale * norm[c]) : turned(kv + rank, c - rank, half, angles));
    const View& q = a.v[Q_PE];
    if (!q) return;
    for (int i = threadIdx.x; i < q.shape[1] * pe; i += blockDim.x) {
        const int h = i / pe, c = i % pe;
        a.v[Q_OUT].row(t, h)[c] = turned(q.row(t, h), c, half, angles);
    }
}
