// MLA_CACHE: the normalised latent and the rest of its row go to the cache, a task for each row. That
// rest and its part of the queries turn where there is a rope.

#include "kernels.h"
#include "paged.h"
#include "rope.h"

namespace gdn {
namespace {

// Attributes: eps, and those of Rotation.
enum { Q_OUT, KV, NORM, K_CACHE, Q_PE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };
enum { EPS, N_ROT };

// y = x [size] with its pairs of neighbours turned.
void turn(const float* x, int64_t size, const Rotation& r, float* y) {
    for (int64_t i = 0; i < r.half; i++) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        y[2 * i] = even * r.cos[i] - odd * r.sin[i];
        y[2 * i + 1] = odd * r.cos[i] + even * r.sin[i];
    }
    const int64_t turned = 2 * r.half;
    std::memcpy(y + turned, x + turned, 4 * static_cast<size_t>(size - turned));
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View &q_pe = a.v[Q_PE], &q_out = a.v[Q_OUT];
    const int64_t size = a.v[KV].shape[1], rank = a.v[NORM].shape[0];
    const float* norm = a.v[NORM].as<float>();
    const Rotation r(a.attr + N_ROT, a.scratch);
    float* row = r.rest();
    for (int64_t t = begin; t < end; t++) {
        const float* kv = a.v[KV].row(t);
        const int32_t position = a.v[POSITIONS].as<int32_t>()[t];
        r.set_position(position);
        rms_norm(kv, norm, rank, a.attr[EPS], row);
        turn(kv + rank, size - rank, r, row + rank);
        const int32_t* table = block_table_of(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
        write_cache(a.v[K_CACHE], table, position, 0, row);
        for (int64_t h = 0; q_pe && h < q_pe.shape[1]; h++)
            turn(q_pe.row(t, h), size - rank, r, q_out.row(t, h));
    }
}

}  // namespace

const Kernel mla_cache = {"MLA_CACHE", [](const Args& a) { return a.rows(a.v[KV]); }, run};

}  // namespace gdn
