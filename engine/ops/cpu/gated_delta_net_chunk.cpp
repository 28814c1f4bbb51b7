// A row tile of GATED_DELTA_NET in chunk form (Yang et al., "Gated Delta Networks",
// arXiv:2412.06464; with one decay per key row: Kimi Delta Attention, arXiv:2510.26692). S [Dk, Dv]
// is the state before the row tile, G its cumulated decays, D_ij = e^(G_i - G_j) for i ≥ j. With
// one per key row each weighs its own part of a product. What the rows add to the state, U [n, Dv],
// solves
//
//     (I + A) U = beta (V - e^G K S),  A_ij = beta_i k_i·k_j D_ij for i > j,
//
// row after row in float32, in halves of SUB rows with a product between them. Then
//
//     O = (e^G Q S + (Q Kᵀ ⊙ D) U) · scale,  S <- e^G_last S + Kᵀ (e^(G_last - G) U).
//
// Products are made of bfloat16 tiles. Rounding an operand costs a relative error of 2.8e-6 in
// energy, which those of K S, Q S, K Kᵀ and Q Kᵀ (but for its diagonal) may have. In the others
// errors would add up, as similar keys have updates that cancel each other. Their operands are
// split into what rounding leaves and what it takes (see tiles.h). With one decay per key row A is
// not made of the same rounded keys as K S, so that errors of the two don't cancel each other: for
// products with S, K and Q are in two parts then.

#include <initializer_list>

#include "gated_delta_net_chunk.h"
#include "kernels.h"

namespace gdn {
namespace {

Work make_work(const Head& h, int64_t n_ahead, char*& room) {
    Work w{};
    w.h = h, w.n_ahead = n_ahead;
    w.subs = (h.n + SUB - 1) / SUB, w.n = w.subs * SUB;
    for (bf16** p : {&w.k, &w.q}) *p = take<bf16>(room, w.n * h.dk);
    w.k_rows = take<bf16>(room, SPLIT * w.n * h.dk);
    w.scores = take<bf16>(room, SPLIT * w.n * w.n);
    w.links = take<bf16>(room, SPLIT * SUB * SUB);
    w.state = take<bf16>(room, h.dk * STRIP);
    for (bf16** p : {&w.u, &w.u_columns}) *p = take<bf16>(room, SPLIT * w.n * STRIP);
    for (float** p : {&w.kk, &w.qk}) *p = take<float>(room, w.n * MAX_TILE_ROWS);
    for (float** p : {&w.residual, &w.read}) *p = take<float>(room, w.n * STRIP);
    for (float** p : {&w.grown, &w.beta}) *p = take<float>(room, MAX_TILE_ROWS);
    w.decay = take<float>(room, MAX_HEAD);
    float* zeros = take<float>(room, MAX_HEAD);
    std::memset(zeros, 0, MAX_HEAD * sizeof(float));
    w.zeros = zeros;
    for (int64_t i = 0; i < w.n; i++) w.beta[i] = i < h.n ? h.beta[i * h.beta_step] : 0.0f;
    return w;
}

// For the largest row tile.
constexpr int64_t ELEMENTS = (2 + SPLIT) * MAX_TILE_ROWS * MAX_HEAD +
                             SPLIT * (MAX_TILE_ROWS * MAX_TILE_ROWS + SUB * SUB) +
                             MAX_HEAD * STRIP + 2 * SPLIT * MAX_TILE_ROWS * STRIP;
constexpr int64_t FLOATS = 2 * MAX_TILE_ROWS * MAX_TILE_ROWS + 2 * MAX_TILE_ROWS * STRIP +
                           2 * MAX_TILE_ROWS + 2 * MAX_HEAD;
constexpr int64_t ROOM = ROOM_GDA > ROOM_KDA ? ROOM_GDA : ROOM_KDA;
static_assert(2 * ELEMENTS + 4 * FLOATS + ROOM <= CHUNK_BYTES);

// --- Scores

// The scores' diagonal, a row's own q·k · scale, in float32: where decays are strong, its output is
// made of little else.
void multiply_own_keys(const Work& w) {
    for (int64_t i = 0; i < w.n; i += 4) {
        vf products[4]{};
        for (int64_t r = 0; r < 4; r++) {
            const float *q = w.row(w.h.q, w.h.q_step, i + r), *k = w.row(w.h.k, w.h.k_step, i + r);
            for (int64_t d = 0; d < w.h.dk; d += W)
                products[r] = fma(load(q + d), load(k + d), products[r]);
        }
        const v4 qk = sums(products[0], products[1], products[2], products[3]) * w.h.scale;
        for (int64_t r = i; r < i + 4; r++) w.qk[r * MAX_TILE_ROWS + r] = qk[r - i];
    }
}

// Columns `sub` · SUB … of row i, as an A tile's row.
GDN_INLINE void pack_columns(const float* x, int64_t i, int64_t sub, bf16* to) {
    x += i * MAX_TILE_ROWS + sub * SUB;
    for (int c = 0; c < SIDE; c += W) put_a(to + 2 * c, split(load(x + c), load(x + SIDE + c)));
}

void pack_scores(const Work& w) {
    for (int64_t i = 0; i < w.n; i++) {
        bf16* to = w.scores + (i / SIDE * w.split_depth() * SIDE + i % SIDE) * DEPTH;
        for (int64_t sub = 0; sub <= i / SUB; sub++)
            pack_columns(w.qk, i, sub, to + sub * SPLIT * TILE_SIZE);
    }
    for (int64_t i = SUB; i < w.n; i++) {
        const int64_t r = i - SUB;
        pack_columns(w.kk, i, 0, w.links + (r / SIDE * SPLIT * SIDE + r % SIDE) * DEPTH);
    }
}

// --- A strip: value columns c … c + STRIP - 1

// Makes tiles of a strip of the state, and lets it decay over the row tile.
void pack_state(const Work& w, const float* from, float* to) {
    constexpr int PARTS = SIDE / W;
    const int64_t dk = w.h.dk;
    bf16* tile = w.state;
    for (int64_t j = 0; j < STRIP; j += SIDE)
        for (int64_t d = 0; d < dk; d += DEPTH, tile += TILE_SIZE) {
            vf decay[2 * PARTS];
            for (int p = 0; p < 2 * PARTS; p++) decay[p] = load(w.decay + d + p * W);
            transpose_tile(
                [&](int r, int c) __attribute__((always_inline)) {
                    const int64_t at = (j + r) * dk + d + c;
                    const vf a = load(from + at), b = load(from + at + SIDE);
                    store(to + at, a * decay[c / W]);
                    store(to + at + SIDE, b * decay[PARTS + c / W]);
                    return bf16_row(a, b);
                },
                [&](int p, vi v) __attribute__((always_inline)) { put(tile + p, v); });
        }
}

// What is to be solved, from K S: beta (V - e^G K S).
void make_residuals(const Work& w, int64_t c) {
    for (int64_t i = 0; i < w.n; i++) {
        const float* v = w.row(w.h.v, w.h.v_step, i) + c;
        float* x = w.residual + i * STRIP;
        for (int64_t l = 0; l < STRIP; l += W)
            store(x + l, fma(-load(x + l), splat(w.grown[i]), load(v + l)) * w.beta[i]);
    }
}

// x[r] += a[r][0] u for rows `begin` … 15.
GDN_INLINE void add_column(const float* a, vf u, vf* x, int begin) {
#pragma GCC unroll 16
    for (int r = begin; r < SIDE; r++) x[r] = fma(u, splat(a[r * MAX_TILE_ROWS]), x[r]);
}

// Solves 16 rows; a is where -A's diagonal begins.
GDN_INLINE void substitute(const float* a, vf* x) {
#pragma GCC unroll 16
    for (int j = 0; j < SIDE - 1; j++) add_column(a + j, x[j], x, j + 1);
}

// U of SUB rows, W columns from `residual` on, as pairs of rows r and r + 16.
GDN_INLINE void solve_columns(const float* a, const float* residual, Pairs* u) {
    vf x[SIDE], upper[SIDE];
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; r++) x[r] = load(residual + r * STRIP);
    substitute(a, x);
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; r++) upper[r] = x[r], x[r] = load(residual + (SIDE + r) * STRIP);
    for (int j = 0; j < SIDE; j++) add_column(a + SIDE * MAX_TILE_ROWS + j, upper[j], x, 0);
    substitute(a + SIDE * MAX_TILE_ROWS + SIDE, x);
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; r++) u[r] = split(upper[r], x[r]);
}

void solve(Work& w, int64_t sub) {
    const int64_t first = sub * SUB;
    for (int64_t j = 0; j < STRIP / SIDE; j++) {
        fetch_ahead(w);
        Pairs u[SIDE / W][SIDE];
        const int64_t tile = (j * w.split_depth() + SPLIT * sub) * TILE_SIZE;
        for (int p = 0; p < SIDE / W; p++) {
            solve_columns(w.kk + first * MAX_TILE_ROWS + first,
                          w.residual + first * STRIP + j * SIDE + p * W, u[p]);
            for (int r = 0; r < SIDE; r++) put_b(w.u + tile + r * DEPTH + 2 * p * W, u[p][r]);
        }
        bf16* to = w.u_columns + tile;
        transpose_tile([&](int r, int c) { return u[c / W][r].high; },
                       [&](int p, vi v) { put(to + p, v), put(to + 2 * TILE_SIZE + p, v); });
        transpose_tile([&](int r, int c) { return u[c / W][r].low; },
                       [&](int p, vi v) { put(to + TILE_SIZE + p, v); });
    }
}

// x S, where x is in one part or two.
void read_state(Work& w, const bf16* x, const bf16* rest, float* to) {
    const int64_t depth = w.k_depth();
    const Tiles state = tiles(w.state, depth);
    product(w, tiles(x, depth), 2 * w.subs, state, 2, depth, to, STRIP);
    if (rest) product(w, tiles(rest, depth), 2 * w.subs, state, 2, depth, to, STRIP, true);
}

void make_updates(Work& w, int64_t c) {
    read_state(w, w.k, w.k_rest, w.residual);
    read_state(w, w.q, w.q_rest, w.read);
    make_residuals(w, c);
    solve(w, 0);
    if (w.subs == 1) return;
    product(w, tiles(w.links, SPLIT), 2, tiles(w.u, w.split_depth()), 2, SPLIT,
            w.residual + SUB * STRIP, STRIP, true);
    solve(w, 1);
}

void make_outputs(Work& w, int64_t c) {
    const Tiles scores = tiles(w.scores, w.split_depth()), u = tiles(w.u, w.split_depth());
    for (int64_t sub = 0; sub < w.subs; sub++)
        product(w, {scores.tile(2 * sub, 0), scores.side, scores.depth}, 2, u, 2, SPLIT * (sub + 1),
                w.residual + sub * SUB * STRIP, STRIP);
    for (int64_t i = 0; i < w.h.n; i++) {
        const float *read = w.read + i * STRIP, *within = w.residual + i * STRIP;
        float* out = w.h.out + i * w.h.out_step + c;
        const float grown = w.grown[i] * w.h.scale;
        for (int64_t l = 0; l < STRIP; l += W)
            store(out + l, fma(load(read + l), splat(grown), load(within + l)));
    }
}

}  // namespace

void chunk(const Head& h, const float* from, float* to, int64_t n_ahead, char* scratch) {
    Work w = make_work(h, n_ahead, scratch);
    (h.dg == 1 ? make_operands_gda : make_operands_kda)(w, scratch);
    multiply_own_keys(w);
    pack_scores(w);
    for (int64_t c = 0; c < h.dv; c += STRIP) {
        pack_state(w, from + c * h.dk, to + c * h.dk);
        make_updates(w, c);
        make_outputs(w, c);
        product(w, tiles(w.u_columns, w.split_depth()), 2, tiles(w.k_rows, w.split_depth()),
                h.dk / SIDE, w.split_depth(), to + c * h.dk, h.dk, true);
    }
}

}  // namespace gdn
