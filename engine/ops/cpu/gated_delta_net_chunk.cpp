// A block of GATED_DELTA_NET in chunk form, with one decay per head (Yang et al., "Gated Delta
// Networks", arXiv:2412.06464). S [Dk, Dv] is the state before the block, G its cumulated decays,
// D_ij = e^(G_i - G_j) for i ≥ j. What the rows add to the state, U [n, Dv], solves
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
// split into what rounding leaves and what it takes (see tiles.h).

#include "gated_delta_net.h"

#include <initializer_list>

#include "kernels.h"
#include "tiles.h"

namespace gdn {

namespace {

// Rows that are solved at once. A block is padded to one or two times as many by rows of zeros.
constexpr int64_t SUB = DEPTH;
// Value columns that are computed together: two tiles, whose U and products stay in the L1 cache.
constexpr int64_t STRIP = 2 * SIDE;
// e^x counts as 0 below this: products of two decays must not be denormal, which takes long.
constexpr float LEAST_EXPONENT = -40.0f;

// A block, its operands as A or B tiles, and what comes of them.
struct Work {
    Head h;
    int64_t n, subs;             // Rows with padding, n = SUB · subs.
    bf16 *k, *q;                 // A [n, Dk].
    bf16 *k_columns;             // B [Dk, n].
    bf16 *k_rows;                // B [n, Dk], split: e^(G_last - G) K.
    bf16 *scores;                // A [n, n], split: Q Kᵀ ⊙ D · scale.
    bf16 *links;                 // A [SUB, SUB], split: -A from the first half to the second.
    float *kk, *qk;              // [n, MAX_BLOCK]: products, then -A and the scores.
    float *high, *low;           // [MAX_BLOCK]: G = high + low. Differences of one float32 lose the
                                 // weak decays behind strong ones.
    float *grown, *left, *beta;  // [MAX_BLOCK]: e^G, e^(G_last - G), beta.
    const float* zeros;          // A row of k, q or v.
    int64_t n_ahead, fetched;    // Rows that follow, and how many of them are on their way.
    // Of a strip:
    bf16 *state;      // B [Dk, STRIP].
    bf16 *u;          // B [n, STRIP], split.
    bf16 *u_columns;  // A [STRIP, n], split.
    float *residual;  // [n, STRIP]: K S, then what is to be solved, then (Q Kᵀ ⊙ D) U · scale.
    float *read;      // [n, STRIP]: Q S.

    int64_t k_depth() const { return h.dk / DEPTH; }
    int64_t split_depth() const { return SPLIT * subs; }
    const float* row(const float* x, int64_t step, int64_t i) const {
        return i < h.n ? x + i * step : zeros;
    }
};

template <typename T>
T* take(char*& room, int64_t n) {
    T* p = reinterpret_cast<T*>(room);
    room += n * static_cast<int64_t>(sizeof(T));
    return p;
}

Work make_work(const Head& h, int64_t n_ahead, char* room) {
    Work w{};
    w.h = h, w.n_ahead = n_ahead;
    w.subs = (h.n + SUB - 1) / SUB, w.n = w.subs * SUB;
    for (bf16** p : {&w.k, &w.q, &w.k_columns}) *p = take<bf16>(room, w.n * h.dk);
    w.k_rows = take<bf16>(room, SPLIT * w.n * h.dk);
    w.scores = take<bf16>(room, SPLIT * w.n * w.n);
    w.links = take<bf16>(room, SPLIT * SUB * SUB);
    w.state = take<bf16>(room, h.dk * STRIP);
    for (bf16** p : {&w.u, &w.u_columns}) *p = take<bf16>(room, SPLIT * w.n * STRIP);
    for (float** p : {&w.kk, &w.qk}) *p = take<float>(room, w.n * MAX_BLOCK);
    for (float** p : {&w.residual, &w.read}) *p = take<float>(room, w.n * STRIP);
    for (float** p : {&w.high, &w.low, &w.grown, &w.left, &w.beta})
        *p = take<float>(room, MAX_BLOCK);
    float* zeros = take<float>(room, MAX_HEAD);
    std::memset(zeros, 0, MAX_HEAD * sizeof(float));
    w.zeros = zeros;
    return w;
}

// Of the largest block.
constexpr int64_t ELEMENTS = (3 + SPLIT) * MAX_BLOCK * MAX_HEAD +
                             SPLIT * (MAX_BLOCK * MAX_BLOCK + SUB * SUB) + MAX_HEAD * STRIP +
                             2 * SPLIT * MAX_BLOCK * STRIP;
constexpr int64_t FLOATS =
    2 * MAX_BLOCK * MAX_BLOCK + 2 * MAX_BLOCK * STRIP + 5 * MAX_BLOCK + MAX_HEAD;
static_assert(2 * ELEMENTS + 4 * FLOATS <= CHUNK_BYTES);

// A row of the block to come: its loads would all have to wait for the L3 cache or memory. It is
// called between pieces of work that keep the processor busy for some hundred cycles.
GDN_INLINE void fetch_ahead(Work& w) {
    if (w.fetched >= w.n_ahead) return;
    const Head next = w.h.part(w.h.n + w.fetched++, 1);
    for (int64_t i = 0; i < next.dk; i += 16) {
        __builtin_prefetch(next.k + i);
        __builtin_prefetch(next.q + i);
    }
    for (int64_t i = 0; i < next.dv; i += 16) {
        __builtin_prefetch(next.v + i);
        __builtin_prefetch(next.out + i, 1);
    }
}

// c [16 m, 16 columns] (+)= a · b over `depth` tiles; m and columns are even.
void product(Work& w, Tiles a, int64_t m, Tiles b, int64_t columns, int64_t depth, float* c,
             int64_t stride, bool add = false) {
    for (int64_t j = 0; j < columns; j += 2)
        for (int64_t i = 0; i < m; i += 2) {
            fetch_ahead(w);
            multiply_tiles<2, 2>({a.tile(i, 0), a.side, a.depth}, {b.tile(j, 0), b.side, b.depth},
                                 depth, c + i * SIDE * stride + j * SIDE, stride, add);
        }
}

// --- The block's operands

// e^x of differences of cumulated decays, which are never positive.
GDN_INLINE vf decay(vf x) {
    return exp(select(x < splat(LEAST_EXPONENT), splat(-__builtin_inff()), x));
}

// G_i - G_j for lanes i on, or minus that.
GDN_INLINE vf since(const Work& w, int64_t i, int64_t j) {
    return (load(w.high + i) - w.high[j]) + (load(w.low + i) - w.low[j]);
}

void cumulate_decays(Work& w) {
    double sum = 0;
    for (int64_t i = 0; i < w.n; i++) {
        const bool live = i < w.h.n;
        sum += static_cast<double>(live ? w.h.g[i * w.h.g_step] : 0.0f);
        w.high[i] = static_cast<float>(sum);
        w.low[i] = static_cast<float>(sum - static_cast<double>(w.high[i]));
        w.beta[i] = live ? w.h.beta[i * w.h.beta_step] : 0.0f;
    }
    for (int64_t i = 0; i < w.n; i += W) {
        store(w.grown + i, decay(load(w.high + i) + load(w.low + i)));
        store(w.left + i, decay(-since(w, i, w.n - 1)));
    }
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

void pack_keys_and_queries(const Work& w) {
    for (int64_t sub = 0; sub < w.subs; sub++)
        for (int64_t r = 0; r < SIDE; r++) {
            const auto pair = [&](int64_t d, vf a, vf b) __attribute__((always_inline)) {
                const int64_t tile = d / SIDE * w.split_depth() + SPLIT * sub;
                const vf x = a * w.left[sub * SUB + r], y = b * w.left[sub * SUB + SIDE + r];
                put_b(w.k_rows + tile * TILE_SIZE + r * DEPTH + d % SIDE * 2, split(x, y));
            };
            pack_two_rows(w, w.h.k, w.h.k_step, sub * SUB + r, w.k, pair);
            pack_two_rows(w, w.h.q, w.h.q_step, sub * SUB + r, w.q, [](int64_t, vf, vf) {});
        }
    for (int64_t i = 0; i < w.n * w.h.dk; i += TILE_SIZE)
        transpose_tile([&](int r, int c) { return load_as<vi>(w.k + i + r * DEPTH + 2 * c); },
                       [&](int p, vi v) { put(w.k_columns + i + p, v); });
}

// Makes tiles of a strip of the state, and lets it decay over the block.
void pack_state(const Work& w, const float* from, float* to) {
    const int64_t dk = w.h.dk;
    const vf decay = splat(w.grown[w.n - 1]);
    bf16* tile = w.state;
    for (int64_t j = 0; j < STRIP; j += SIDE)
        for (int64_t d = 0; d < dk; d += DEPTH, tile += TILE_SIZE)
            transpose_tile(
                [&](int r, int c) __attribute__((always_inline)) {
                    const int64_t at = (j + r) * dk + d + c;
                    const vf a = load(from + at), b = load(from + at + SIDE);
                    store(to + at, a * decay), store(to + at + SIDE, b * decay);
                    return bf16_row(a, b);
                },
                [&](int p, vi v) __attribute__((always_inline)) { put(tile + p, v); });
}

// --- A and the scores

void multiply_by_keys(Work& w) {
    const Tiles columns = tiles(w.k_columns, w.k_depth());
    for (int64_t sub = 0; sub < w.subs; sub++) {
        const int64_t at = sub * SUB * w.h.dk, row = sub * SUB * MAX_BLOCK;
        product(w, tiles(w.k + at, w.k_depth()), 2, columns, 2 * sub + 2, w.k_depth(), w.kk + row,
                MAX_BLOCK);
        product(w, tiles(w.q + at, w.k_depth()), 2, columns, 2 * sub + 2, w.k_depth(), w.qk + row,
                MAX_BLOCK);
    }
}

// A row's own q·k in float32: where decays are strong, its output is made of little else.
void multiply_own_keys(const Work& w) {
    for (int64_t i = 0; i < w.n; i += 4) {
        vf products[4]{};
        for (int64_t r = 0; r < 4; r++) {
            const float *q = w.row(w.h.q, w.h.q_step, i + r), *k = w.row(w.h.k, w.h.k_step, i + r);
            for (int64_t d = 0; d < w.h.dk; d += W) products[r] += load(q + d) * load(k + d);
        }
        const v4 qk = sums(products[0], products[1], products[2], products[3]);
        for (int64_t r = i; r < i + 4; r++) w.qk[r * MAX_BLOCK + r] = qk[r - i];
    }
}

// W entries of row i from column j on, for which d decays: of -A, and of the scores.
GDN_INLINE void weigh(const Work& w, int64_t i, int64_t j, vf d) {
    float *kk = w.kk + i * MAX_BLOCK + j, *qk = w.qk + i * MAX_BLOCK + j;
    store(kk, load(kk) * (d * -w.beta[i]));
    store(qk, load(qk) * (d * w.h.scale));
}

// Turns the products of 16 rows from `first` on into -A and scores. A's diagonal is never read.
void weigh_rows(const Work& w, int64_t first) {
    // Decays over rows before these, as products: from row j to the last of those, and from there.
    alignas(64) float until[MAX_BLOCK], from[SIDE];
    for (int64_t j = 0; j < first; j += W) store(until + j, decay(-since(w, j, first - 1)));
    for (int64_t i = 0; first > 0 && i < SIDE; i += W)
        store(from + i, decay(since(w, first + i, first - 1)));
    const int64_t end = (first / SUB + 1) * SUB;
    for (int64_t i = first; i < first + SIDE; i++) {
        for (int64_t j = 0; j < first; j += W) weigh(w, i, j, load(until + j) * from[i - first]);
        for (int64_t j = first; j < first + SIDE; j += W) {
            vi row;
            for (int l = 0; l < W; l++) row[l] = static_cast<int32_t>(j) + l;
            const vi seen = row <= splat(static_cast<int32_t>(i));
            const vf x = select(seen, -since(w, j, i), splat(-__builtin_inff()));
            weigh(w, i, j, decay(x));
        }
        for (int64_t j = first + SIDE; j < end; j += W) store(w.qk + i * MAX_BLOCK + j, vf{});
    }
}

// Columns `sub` · SUB … of row i, as an A tile's row.
GDN_INLINE void pack_columns(const float* x, int64_t i, int64_t sub, bf16* to) {
    x += i * MAX_BLOCK + sub * SUB;
    for (int c = 0; c < SIDE; c += W) put_a(to + 2 * c, split(load(x + c), load(x + SIDE + c)));
}

void make_scores(Work& w) {
    multiply_by_keys(w);
    multiply_own_keys(w);
    for (int64_t i = 0; i < w.n; i += SIDE) weigh_rows(w, i);
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

// What is to be solved, from K S: beta (V - e^G K S).
void make_residuals(const Work& w, int64_t c) {
    for (int64_t i = 0; i < w.n; i++) {
        const float* v = w.row(w.h.v, w.h.v_step, i) + c;
        float* x = w.residual + i * STRIP;
        for (int64_t l = 0; l < STRIP; l += W)
            store(x + l, (load(v + l) - load(x + l) * w.grown[i]) * w.beta[i]);
    }
}

// x[r] += a[r][0] u for rows `begin` … 15.
GDN_INLINE void add_column(const float* a, vf u, vf* x, int begin) {
#pragma GCC unroll 16
    for (int r = begin; r < SIDE; r++) x[r] += u * a[r * MAX_BLOCK];
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
    for (int j = 0; j < SIDE; j++) add_column(a + SIDE * MAX_BLOCK + j, upper[j], x, 0);
    substitute(a + SIDE * MAX_BLOCK + SIDE, x);
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
            solve_columns(w.kk + first * MAX_BLOCK + first,
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

void make_updates(Work& w, int64_t c) {
    const Tiles state = tiles(w.state, w.k_depth());
    product(w, tiles(w.k, w.k_depth()), 2 * w.subs, state, 2, w.k_depth(), w.residual, STRIP);
    product(w, tiles(w.q, w.k_depth()), 2 * w.subs, state, 2, w.k_depth(), w.read, STRIP);
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
            store(out + l, load(within + l) + load(read + l) * grown);
    }
}

}  // namespace

void chunk(const Head& h, const float* from, float* to, int64_t n_ahead, char* scratch) {
    Work w = make_work(h, n_ahead, scratch);
    cumulate_decays(w);
    pack_keys_and_queries(w);
    make_scores(w);
    for (int64_t c = 0; c < h.dv; c += STRIP) {
        pack_state(w, from + c * h.dk, to + c * h.dk);
        make_updates(w, c);
        make_outputs(w, c);
        product(w, tiles(w.u_columns, w.split_depth()), 2, tiles(w.k_rows, w.split_depth()),
                h.dk / SIDE, w.split_depth(), to + c * h.dk, h.dk, true);
    }
}

}  // namespace gdn
