// What the two algorithms of GATED_DELTA_NET share: scan (row by row) and chunk (by row tiles).
#pragma once

#include "kernel.h"
#include "matrix.h"

namespace gdn {

// n rows of one head of one sequence; steps are the floats from one row to the next. A row has dg
// decays: one, or with KDA dk, one for each key row.
struct Head {
    const float *q, *k, *v, *g, *beta;
    float* out;
    int64_t q_step, k_step, v_step, g_step, beta_step, out_step, n, dk, dv, dg;
    float scale;

    // Its rows t … t + count - 1.
    Head part(int64_t t, int64_t count) const {
        Head h = *this;
        h.q += t * q_step, h.k += t * k_step, h.v += t * v_step, h.g += t * g_step;
        h.beta += t * beta_step, h.out += t * out_step, h.n = count;
        return h;
    }
};

// The largest head size.
constexpr int64_t MAX_HEAD = 256;

// Whether heads of these sizes have a chunk form: whole tiles.
inline bool has_chunk_form(int64_t dk, int64_t dv) { return dk % DEPTH == 0 && dv % DEPTH == 0; }

// One row tile of at most MAX_TILE_ROWS rows, from the state at `from` to that at `to` (they may be
// the same), in gated_delta_net_chunk.cpp. It fetches the `n_ahead` rows after it into the cache.
void chunk(const Head& h, const float* from, float* to, int64_t n_ahead, char* scratch);

// Fewest rows of a row tile for which chunk form is faster than a scan, with one decay per key row.
// With one per head it is faster for every row tile.
constexpr int64_t LEAST_ROWS_KDA = 16;

// Bytes of scratch that `chunk` uses at most.
constexpr int64_t CHUNK_BYTES = 640 << 10;

}  // namespace gdn
