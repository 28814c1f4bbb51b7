// Operands of a row tile with one decay per key row. They can't be taken out of sums over key rows:
//
//     A_ij = beta_i Σ_d k_i[d] k_j[d] e^(G_i[d] - G_j[d]).
//
// For rows i behind a boundary m and j before it, e^(G_i - G_m) and e^(G_m - G_j) are at most 1 and
// go into the operands of a product of tiles. So a row tile is halved, and halves into bands of
// 16 rows. Within a band keys are let decay from row to row, in float32.
//
// All decays are products of the rows' own e^g, not differences of sums: no strength of decay
// overflows or hides weaker ones, and what underflows is zero in the sum, too.

#include <initializer_list>

#include "gated_delta_net_chunk.h"
#include "kernels.h"

namespace gdn {
namespace {

constexpr int64_t BANDS = SUB / SIDE;  // Of a half.

struct Decays {
    float* step;    // [n, Dk]: of a row, e^g.
    float* since;   // [n, Dk]: of the rows of its band up to it.
    float* until;   // [n, Dk]: of the rows of its band after it.
    float* across;  // [Dk]: of some bands.
    float* keys;    // [SIDE, Dk]: a band's keys, decayed to some row.
    // At a boundary between bands:
    bf16 *k, *q;             // A [SUB, Dk]: rows behind it.
    bf16 *before, *columns;  // A [SUB, Dk], B [Dk, SUB]: keys before it.
};

Decays make_decays(const Work& w, char* room) {
    Decays z;
    const int64_t dk = w.h.dk;
    for (bf16** p : {&z.k, &z.q, &z.before, &z.columns}) *p = take<bf16>(room, SUB * dk);
    for (float** p : {&z.step, &z.since, &z.until}) *p = take<float>(room, w.n * dk);
    z.keys = take<float>(room, SIDE * dk);
    z.across = take<float>(room, dk);
    return z;
}

void multiply_decays(const Work& w, const Decays& z, int64_t band) {
    const int64_t dk = w.h.dk, first = band * SIDE, last = first + SIDE - 1;
    for (int64_t i = first; i <= last; i++) {
        const float* g = w.row(w.h.g, w.h.g_step, i);
        for (int64_t d = 0, at = i * dk; d < dk; d += W, at += W) {
            const vf step = exp(load(g + d));
            store(z.step + at, step);
            store(z.since + at, i == first ? step : load(z.since + at - dk) * step);
        }
    }
    for (int64_t i = last; i >= first; i--)
        for (int64_t at = i * dk; at < (i + 1) * dk; at += W)
            store(z.until + at,
                  i == last ? splat(1.0f) : load(z.until + at + dk) * load(z.step + at + dk));
}

// The decay over bands `first` … `end` - 1.
void multiply_bands(const Work& w, const Decays& z, int64_t first, int64_t end, float* to) {
    for (int64_t d = 0; d < w.h.dk; d += W) {
        vf decay = splat(1.0f);
        for (int64_t b = first; b < end; b++)
            decay *= load(z.since + (b * SIDE + SIDE - 1) * w.h.dk + d);
        store(to + d, decay);
    }
}

// Rows of a band of x with their decays within the band and across others, as A tiles: `to`, and
// `rest` for what rounding takes, if that is wanted.
template <bool REST = false>
void pack_band(const Work& w, const Decays& z, const float* x, int64_t step, int64_t band,
               const float* within, bf16* to, bf16* rest = nullptr) {
    const int64_t dk = w.h.dk;
    for (int64_t r = 0; r < SIDE; r++) {
        const int64_t i = band * SIDE + r;
        const float *row = w.row(x, step, i), *decay = within + i * dk;
        const auto part = [&](int64_t d) __attribute__((always_inline)) {
            return load(row + d) * (load(decay + d) * load(z.across + d));
        };
        for (int64_t d = 0; d < dk; d += DEPTH)
            for (int c = 0; c < SIDE; c += W) {
                const int64_t at = (d / DEPTH * SIDE + r) * DEPTH + 2 * c;
                const vf a = part(d + c), b = part(d + SIDE + c);
                put(to + at, bf16_row(a, b));
                if constexpr (REST) put(rest + at, bf16_row(bf16_rest(a), bf16_rest(b)));
            }
    }
}

// What K and Q of a band read from the state before the row tile.
void pack_reads(const Work& w, const Decays& z, int64_t band) {
    const int64_t at = band * SIDE * w.h.dk;
    multiply_bands(w, z, 0, band, z.across);
    pack_band<true>(w, z, w.h.k, w.h.k_step, band, z.since, w.k + at, w.k_rest + at);
    pack_band<true>(w, z, w.h.q, w.h.q_step, band, z.since, w.q + at, w.q_rest + at);
}

// What the keys of half `sub` bring to the state after the row tile.
void pack_key_rows(const Work& w, const Decays& z, int64_t sub) {
    const int64_t dk = w.h.dk;
    const float *upper = z.until + sub * SUB * dk, *lower = upper + SIDE * dk;
    const float* over_lower = z.since + (sub * SUB + SUB - 1) * dk;
    multiply_bands(w, z, (sub + 1) * BANDS, w.subs * BANDS, z.across);
    for (int64_t r = 0; r < SIDE; r++, upper += dk, lower += dk) {
        const float* k = w.row(w.h.k, w.h.k_step, sub * SUB + r);
        const float* next = w.row(w.h.k, w.h.k_step, sub * SUB + SIDE + r);
        for (int64_t d = 0; d < dk; d += W) {
            const vf after = load(z.across + d);
            const vf a = load(upper + d) * (load(over_lower + d) * after);
            const vf b = load(lower + d) * after;
            put_key_rows(w, sub, r, d, load(k + d) * a, load(next + d) * b);
        }
    }
}

// Pairs of rows in `bands` bands on each side of the boundary before band `m`.
void multiply_across(Work& w, const Decays& z, int64_t m, int64_t bands) {
    const int64_t dk = w.h.dk;
    for (int64_t b = 0; b < bands; b++) {
        const int64_t at = b * SIDE * dk;
        multiply_bands(w, z, m, m + b, z.across);
        pack_band(w, z, w.h.k, w.h.k_step, m + b, z.since, z.k + at);
        pack_band(w, z, w.h.q, w.h.q_step, m + b, z.since, z.q + at);
        const int64_t earlier = m - bands + b;
        multiply_bands(w, z, earlier + 1, m, z.across);
        pack_band(w, z, w.h.k, w.h.k_step, earlier, z.until, z.before + at);
    }
    transpose_tiles(z.before, bands * SIDE * dk, z.columns);
    const int64_t depth = w.k_depth(), to = m * SIDE * MAX_TILE_ROWS + (m - bands) * SIDE;
    const Tiles columns = tiles(z.columns, depth);
    product(w, tiles(z.k, depth), bands, columns, bands, depth, w.kk + to, MAX_TILE_ROWS);
    product(w, tiles(z.q, depth), bands, columns, bands, depth, w.qk + to, MAX_TILE_ROWS);
    for (int64_t r = 0; r < bands * SIDE; r++)
        for (int64_t j = 0; j < bands * SIDE; j += W) {
            float *kk = w.kk + to + r * MAX_TILE_ROWS + j, *qk = w.qk + to + r * MAX_TILE_ROWS + j;
            store(kk, load(kk) * -w.beta[m * SIDE + r]), store(qk, load(qk) * w.h.scale);
        }
}

// Pairs of rows in a band: keys decay from row to row, four of them at a time.
void multiply_within(Work& w, const Decays& z, int64_t band) {
    constexpr int GROUP = 4;
    const int64_t dk = w.h.dk;
    std::memset(z.keys, 0, static_cast<size_t>(SIDE * dk) * sizeof(float));
    for (int64_t r = 0; r < SIDE; r++) {
        fetch_ahead(w);
        const int64_t i = band * SIDE + r, at = i * MAX_TILE_ROWS + band * SIDE;
        const float *k = w.row(w.h.k, w.h.k_step, i), *q = w.row(w.h.q, w.h.q_step, i);
        const float* step = z.step + i * dk;
        for (int64_t j = 0; j < r; j += GROUP) {
            vf kk[GROUP]{}, qk[GROUP]{};
            for (int64_t d = 0; d < dk; d += W) {
                const vf decay = load(step + d), kd = load(k + d), qd = load(q + d);
                float* key = z.keys + j * dk + d;
                for (int c = 0; c < GROUP; c++, key += dk) {
                    const vf x = load(key) * decay;
                    store(key, x);
                    kk[c] = fma(x, kd, kk[c]), qk[c] = fma(x, qd, qk[c]);
                }
            }
            const v4 a = sums(kk[0], kk[1], kk[2], kk[3]) * -w.beta[i];
            const v4 s = sums(qk[0], qk[1], qk[2], qk[3]) * w.h.scale;
            std::memcpy(w.kk + at + j, &a, sizeof(a));
            std::memcpy(w.qk + at + j, &s, sizeof(s));
        }
        std::memcpy(z.keys + r * dk, k, static_cast<size_t>(dk) * sizeof(float));
    }
}

}  // namespace

void make_operands_kda(Work& w, char* room) {
    for (bf16** p : {&w.k_rest, &w.q_rest}) *p = take<bf16>(room, w.n * w.h.dk);
    const Decays z = make_decays(w, room);
    const int64_t bands = w.subs * BANDS, live = (w.h.n + SIDE - 1) / SIDE;
    for (int64_t i = 0; i < w.n; i++) w.grown[i] = 1.0f;
    for (float* p : {w.kk, w.qk})
        std::memset(p, 0, static_cast<size_t>(w.n * MAX_TILE_ROWS) * sizeof(float));
    for (int64_t b = 0; b < bands; b++) multiply_decays(w, z, b);
    for (int64_t b = 0; b < bands; b++) pack_reads(w, z, b);
    for (int64_t sub = 0; sub < w.subs; sub++) pack_key_rows(w, z, sub);
    for (int64_t b = 0; b < live; b++) multiply_within(w, z, b);
    for (int64_t m = 1; m < live; m += BANDS) multiply_across(w, z, m, 1);
    if (w.subs == 2) multiply_across(w, z, BANDS, BANDS);
    multiply_bands(w, z, 0, bands, w.decay);
}

}  // namespace gdn
