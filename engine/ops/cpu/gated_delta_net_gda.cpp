// Operands of a row tile with one decay per head. e^(G_i - G_j) is the same for all key rows:
// products of queries and keys are made without it, and weighed by it afterwards.

#include <initializer_list>

#include "gated_delta_net_chunk.h"
#include "kernels.h"

namespace gdn {
namespace {

// Cumulated decays: G = high + low, as differences of one float32 lose the weak decays behind
// strong ones; left: e^(G_last - G). Each [MAX_TILE_ROWS].
struct Sums {
    float *high, *low, *left;
};

// G_i - G_j for lanes i on, or minus that.
GDN_INLINE vf since(const Sums& s, int64_t i, int64_t j) {
    return (load(s.high + i) - s.high[j]) + (load(s.low + i) - s.low[j]);
}

void cumulate_decays(Work& w, const Sums& s) {
    double sum = 0;
    for (int64_t i = 0; i < w.n; i++) {
        sum += static_cast<double>(*w.row(w.h.g, w.h.g_step, i));
        s.high[i] = static_cast<float>(sum);
        s.low[i] = static_cast<float>(sum - static_cast<double>(s.high[i]));
    }
    for (int64_t i = 0; i < w.n; i += W) {
        store(w.grown + i, exp(load(s.high + i) + load(s.low + i)));
        store(s.left + i, exp(-since(s, i, w.n - 1)));
    }
    for (int64_t d = 0; d < w.h.dk; d += W) store(w.decay + d, splat(w.grown[w.n - 1]));
}

// Rows i and i + 16 of x: what its A tiles have of both, and `pairs` of their elements.
template <typename F>
GDN_INLINE void pack_two_rows(const Work& w, const float* x, int64_t step, int64_t i, bf16* to,
                              F pairs) {
    const float *upper = w.row(x, step, i), *lower = w.row(x, step, i + SIDE);
    bf16* tile = to + i / SIDE * w.h.dk * SIDE + i % SIDE * DEPTH;
    for (int64_t d = 0; d < w.h.dk; d += DEPTH, tile += TILE_SIZE)
        for (int c = 0; c < SIDE; c += W) {
            const vf u0 = load(upper + d + c), u1 = load(upper + d + SIDE + c);
            const vf l0 = load(lower + d + c), l1 = load(lower + d + SIDE + c);
            put(tile + 2 * c, bf16_row(u0, u1));
            put(tile + w.h.dk * SIDE + 2 * c, bf16_row(l0, l1));
            pairs(d + c, u0, l0), pairs(d + SIDE + c, u1, l1);
        }
}

void pack_keys_and_queries(const Work& w, const float* left) {
    for (int64_t sub = 0; sub < w.subs; sub++)
        for (int64_t r = 0; r < SIDE; r++) {
            const float upper = left[sub * SUB + r], lower = left[sub * SUB + SIDE + r];
            const auto pair = [&](int64_t d, vf a, vf b) __attribute__((always_inline)) {
                put_key_rows(w, sub, r, d, a * upper, b * lower);
            };
            pack_two_rows(w, w.h.k, w.h.k_step, sub * SUB + r, w.k, pair);
            pack_two_rows(w, w.h.q, w.h.q_step, sub * SUB + r, w.q, [](int64_t, vf, vf) {});
        }
}

void multiply_by_keys(Work& w, const bf16* k_columns) {
    const Tiles columns = tiles(k_columns, w.k_depth());
    for (int64_t sub = 0; sub < w.subs; sub++) {
        const int64_t at = sub * SUB * w.h.dk, row = sub * SUB * MAX_TILE_ROWS;
        product(w, tiles(w.k + at, w.k_depth()), 2, columns, 2 * sub + 2, w.k_depth(), w.kk + row,
                MAX_TILE_ROWS);
        product(w, tiles(w.q + at, w.k_depth()), 2, columns, 2 * sub + 2, w.k_depth(), w.qk + row,
                MAX_TILE_ROWS);
    }
}

// W entries of row i from column j on, for which d decays: of -A, and of the scores.
GDN_INLINE void weigh(const Work& w, int64_t i, int64_t j, vf d) {
    float *kk = w.kk + i * MAX_TILE_ROWS + j, *qk = w.qk + i * MAX_TILE_ROWS + j;
    store(kk, load(kk) * (d * -w.beta[i]));
    store(qk, load(qk) * (d * w.h.scale));
}

// Turns the products of 16 rows from `first` on into -A and scores.
void weigh_rows(const Work& w, const Sums& s, int64_t first) {
    // Decays over rows before these, as products: from row j to the last of those, and from there.
    alignas(64) float until[MAX_TILE_ROWS], from[SIDE];
    for (int64_t j = 0; j < first; j += W) store(until + j, exp(-since(s, j, first - 1)));
    for (int64_t i = 0; first > 0 && i < SIDE; i += W)
        store(from + i, exp(since(s, first + i, first - 1)));
    const int64_t end = (first / SUB + 1) * SUB;
    for (int64_t i = first; i < first + SIDE; i++) {
        for (int64_t j = 0; j < first; j += W) weigh(w, i, j, load(until + j) * from[i - first]);
        for (int64_t j = first; j < first + SIDE; j += W) {
            vi row;
            for (int l = 0; l < W; l++) row[l] = static_cast<int32_t>(j) + l;
            const vi seen = row <= splat(static_cast<int32_t>(i));
            const vf x = select(seen, -since(s, j, i), splat(-__builtin_inff()));
            weigh(w, i, j, exp(x));
        }
        for (int64_t j = first + SIDE; j < end; j += W) store(w.qk + i * MAX_TILE_ROWS + j, vf{});
    }
}

}  // namespace

void make_operands_gda(Work& w, char* room) {
    bf16* k_columns = take<bf16>(room, w.n * w.h.dk);  // B [Dk, n].
    Sums s;
    for (float** p : {&s.high, &s.low, &s.left}) *p = take<float>(room, MAX_TILE_ROWS);
    cumulate_decays(w, s);
    pack_keys_and_queries(w, s.left);
    transpose_tiles(w.k, w.n * w.h.dk, k_columns);
    multiply_by_keys(w, k_columns);
    for (int64_t i = 0; i < w.n; i += SIDE) weigh_rows(w, s, i);
}

}  // namespace gdn
