// MLA_CACHE: the normalised latent and the rest of its row go to the cache, a block for each row.

#include "cache_rows.cuh"

namespace gdn {

// Attribute: eps.
enum { KV, NORM, K_CACHE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };

}  // namespace gdn

// Grid: rows.
KERNEL(mla_cache) {
    using namespace gdn;
    __shared__ float shared[32];
    const int t = blockIdx.x;
    if (t >= a.rows(a.v[KV])) return;
    const int size = a.v[KV].shape[1], rank = a.v[NORM].shape[0];
    const float *kv = a.v[KV].row(t), *norm = a.v[NORM].as<float>();
    const int32_t* blocks = blocks_of_row(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
    const CacheRow row(a.v[K_CACHE], blocks, a.v[POSITIONS].as<int32_t>()[t], 0);
    float sum = 0.0f;
    for (int c = threadIdx.x; c < rank; c += blockDim.x) sum = fmaf(kv[c], kv[c], sum);
    const float mean = block_sum(sum, shared) / static_cast<float>(rank);
    const float scale = rsqrt_of(mean + a.attr[0]);
    for (int c = threadIdx.x; c < size; c += blockDim.x)
        row.put(c, c < rank ? kv[c] * (scale * norm[c]) : kv[c]);
}
