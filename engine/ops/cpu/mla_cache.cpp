// MLA_CACHE: the normalised latent and the rest of its row go to the cache, a task for each row.

#include "kernels.h"
#include "paged.h"

namespace gdn {
namespace {

// Attribute: eps.
enum { KV, NORM, K_CACHE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t size = a.v[KV].shape[1], rank = a.v[NORM].shape[0];
    const float* norm = a.v[NORM].as<float>();
    float* row = reinterpret_cast<float*>(a.scratch);
    for (int64_t t = begin; t < end; t++) {
        const float* kv = a.v[KV].row(t);
        rms_norm(kv, norm, rank, a.attr[0], row);
        std::memcpy(row + rank, kv + rank, 4 * static_cast<size_t>(size - rank));
        const int32_t* table = block_table_of(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
        write_cache(a.v[K_CACHE], table, a.v[POSITIONS].as<int32_t>()[t], 0, row);
    }
}

}  // namespace

const Kernel mla_cache = {"MLA_CACHE", [](const Args& a) { return a.rows(a.v[KV]); }, run};

}  // namespace gdn
