// The kernels of ATTENTION share operands, the search for a thread block's rows, and sums of
// chunks.
//
// Sequences with at least `min_rows` rows in the batch are computed in tiles of rows. The rows of
// the others are loose: the positions that such a row attends to are cut into at most
// MAX_POSITION_CHUNKS chunks, by its own position alone. A chunk's result is (m, l, acc): the
// largest score, the sum of weights exp(score - m), and the weighted sum of values.
#pragma once

#include "sequences.cuh"

namespace gdn::attention_op {

// Attributes: scale, min_rows.
enum { OUT, PARTIALS, Q, K_CACHE, V_CACHE, GATE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };

// A chunk's result in memory is acc, m, l: a row of PARTIALS [rows, heads, MAX_POSITION_CHUNKS, Dv
// + PARTIAL_EXTRA].
constexpr int CHUNK_UNIT = 64;
DEVICE float infinity() { return bf16_to_float(0x7f80); }

// Positions of a chunk of a row that sees n; a multiple of CHUNK_UNIT.
DEVICE int chunk_size(int n) {
    const int least = n <= 1024 ? CHUNK_UNIT : n <= 4096 ? 2 * CHUNK_UNIT : 4 * CHUNK_UNIT;
    const int even = (n + MAX_POSITION_CHUNKS * CHUNK_UNIT - 1) /
                     (MAX_POSITION_CHUNKS * CHUNK_UNIT) * CHUNK_UNIT;
    return even > least ? even : least;
}

// The batch's row of loose row number `index`; -1 if there are fewer.
struct Loose {
    int32_t seq, row;

    DEVICE Loose(const Args& a, int32_t index) {
        const int32_t min_rows = static_cast<int32_t>(a.attr[1]);
        const Found f = find(a.v[SEQ_STARTS], a.live + N_SEQS, index,
                             [&](int32_t n) { return n < min_rows ? n : 0; });
        seq = f.seq;
        row = f.seq < 0 ? -1 : f.begin + f.index;
    }
};

DEVICE const int32_t* block_table(const Args& a, int32_t seq) {
    const View& tables = a.v[BLOCK_TABLES];
    return tables.as<int32_t>() + static_cast<int64_t>(seq) * tables.stride[0];
}

// Joins a running sum (m, l, acc) with a chunk's: each is multiplied by its factor. All kernels
// join chunks in this way and in their order, so results are bitwise reproducible.
struct Factors {
    float sum, chunk;

    DEVICE Factors(float m, float chunk_m) {
        const float most = fmaxf(m, chunk_m);
        sum = exp_fast(m - most), chunk = exp_fast(chunk_m - most);
    }
    DEVICE Factors(float sum_, float chunk_, int) : sum(sum_), chunk(chunk_) {}
    DEVICE float join(float x, float chunk_x) const { return fmaf(chunk_x, chunk, x * sum); }
};

// Element d of head h of row t: the weighted sum of values by the sum of weights, gated.
DEVICE void store_result(const Args& a, int64_t t, int h, int d, float acc, float l) {
    const View& gate = a.v[GATE];
    float y = acc / l;
    if (gate) y *= sigmoid(gate.rank == 2 ? gate.row(t)[h] : gate.row(t, h)[d]);
    a.v[OUT].row(t, h)[d] = y;
}

}  // namespace gdn::attention_op
