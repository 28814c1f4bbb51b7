// What the files of GATED_DELTA_NET's chunk form share: a row tile's operands as bfloat16 tiles,
// which gated_delta_net_chunk.cpp uses. With one decay per head gated_delta_net_gda.cpp makes them,
// with one per key row (KDA) gated_delta_net_kda.cpp.
#pragma once

#include "gated_delta_net.h"
#include "tiles.h"

namespace gdn {

// Rows that are solved at once. A row tile is padded to one or two times as many by rows of zeros.
constexpr int64_t SUB = DEPTH;
// Value columns that are computed together: two tiles, whose U and products stay in the L1 cache.
constexpr int64_t STRIP = 2 * SIDE;

// A row tile, its operands as A or B tiles, and their products.
struct Work {
    Head h;
    int64_t n, subs;           // Rows with padding, n = SUB · subs.
    const float* zeros;        // A row of q, k, v or g.
    float* beta;               // [MAX_TILE_ROWS].
    int64_t n_ahead, fetched;  // Rows that follow, and how many of them are on their way.
    // Made by the file of each kind of decays:
    bf16 *k, *q;            // A [n, Dk]: K and Q; with KDA e^G K and e^G Q,
    bf16 *k_rest, *q_rest;  // and their rounding errors (else null).
    bf16* k_rows;           // B [n, Dk], split: e^(G_last - G) K.
    float* kk;              // [n, MAX_TILE_ROWS]: -A. What is not below its diagonal is never read.
    float* qk;     // [n, MAX_TILE_ROWS]: (Q Kᵀ ⊙ D) · scale below the diagonal, zeros above it
                   // up to the end of SUB columns.
    float* grown;  // [MAX_TILE_ROWS]: e^G, still to weigh K S and Q S; with KDA ones.
    float* decay;  // [Dk]: e^G_last.
    // Of both:
    bf16* scores;  // A [n, n], split: qk.
    bf16* links;   // A [SUB, SUB], split: -A from the first half to the second.
    // Of a strip:
    bf16* state;      // B [Dk, STRIP].
    bf16* u;          // B [n, STRIP], split.
    bf16* u_columns;  // A [STRIP, n], split.
    float* residual;  // [n, STRIP]: K S, then what is to be solved, then (Q Kᵀ ⊙ D) U · scale.
    float* read;      // [n, STRIP]: Q S.

    int64_t k_depth() const { return h.dk / DEPTH; }
    int64_t split_depth() const { return SPLIT * subs; }
    const float* row(const float* x, int64_t step, int64_t i) const {
        return i < h.n ? x + i * step : zeros;
    }
};

// Prepares a row tile's work for GDA and for KDA; `room` is scratch of so many bytes.
void make_operands_gda(Work& w, char* room);
void make_operands_kda(Work& w, char* room);

constexpr int64_t ROOM_GDA = 2 * MAX_TILE_ROWS * MAX_HEAD + 3 * 4 * MAX_TILE_ROWS;
constexpr int64_t ROOM_KDA =
    4 * (3 * MAX_TILE_ROWS + SIDE + 1) * MAX_HEAD + 2 * (2 * MAX_TILE_ROWS + 4 * SUB) * MAX_HEAD;

template <typename T>
T* take(char*& room, int64_t n) {
    T* p = reinterpret_cast<T*>(room);
    room += n * static_cast<int64_t>(sizeof(T));
    return p;
}

// Fetches a row of the next row tile, whose loads would all wait for the L3 cache or memory.
// Called between computations of some hundred cycles.
GDN_INLINE void fetch_ahead(Work& w) {
    if (w.fetched >= w.n_ahead) return;
    const Head next = w.h.part(w.h.n + w.fetched++, 1);
    for (int64_t i = 0; i < next.dg; i += 16) __builtin_prefetch(next.g + i);
    for (int64_t i = 0; i < next.dk; i += 16) {
        __builtin_prefetch(next.k + i);
        __builtin_prefetch(next.q + i);
    }
    for (int64_t i = 0; i < next.dv; i += 16) {
        __builtin_prefetch(next.v + i);
        __builtin_prefetch(next.out + i, 1);
    }
}

// c [16 m, 16 columns] (+)= a · b over `depth` tiles.
inline void product(Work& w, Tiles a, int64_t m, Tiles b, int64_t columns, int64_t depth, float* c,
                    int64_t stride, bool add = false) {
    multiply_matrices(a, m, b, columns, depth, c, stride, add, [&] { fetch_ahead(w); });
}

// Rows i and i + 16 of half `sub`, of e^(G_last - G) K, in W key rows from d on.
GDN_INLINE void put_key_rows(const Work& w, int64_t sub, int64_t i, int64_t d, vf upper, vf lower) {
    const int64_t tile = d / SIDE * w.split_depth() + SPLIT * sub;
    put_b(w.k_rows + tile * TILE_SIZE + i * DEPTH + d % SIDE * 2, split(upper, lower));
}

// B tiles of the transpose of so many elements of A tiles.
inline void transpose_tiles(const bf16* from, int64_t size, bf16* to) {
    for (int64_t i = 0; i < size; i += TILE_SIZE)
        transpose_tile([&](int r, int c) { return load_as<vi>(from + i + r * DEPTH + 2 * c); },
                       [&](int p, vi v) { put(to + i + p, v); });
}

}  // namespace gdn
