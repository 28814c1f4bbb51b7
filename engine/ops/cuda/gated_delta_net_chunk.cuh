// The chunk form of GATED_DELTA_NET: definitions of its two kernels.
//
// Of a chunk of 64 tokens with decays E_i (of tokens 0 … i), a state S [Dk, Dv] before it, and
//
//     A_ij = beta_i k_i·k_j (j < i), B_ij = q_i·k_j (j <= i), both decayed from j to i,
//     T = (I + A)^-1,  W = T diag(beta) (E ⊙ K),  U = T diag(beta) V,
//
// the updates are D = U - W S, the outputs (E ⊙ Q) S + B D, and the next state is E_last ⊙ S + (K
// decayed to the chunk's end)ᵀ D. The first kernel computes all but S and D, for all chunks at
// once; the second goes from chunk to chunk. Products have float16 operands and float32 sums; T is
// solved in float32. No decay is above 1, so none overflows.
#pragma once

#include "gated_delta_net.cuh"

namespace gdn::delta {

using half = uint16_t;
constexpr int CHUNK = DELTA_CHUNK, VALUE_TILE = DELTA_VALUE_TILE;
constexpr int CHUNK_THREADS = THREADS_delta_net_prepare_64;

// A chunk's matrices for one value head, in a row of CHUNKS [slots, value heads, floats].
template <int WIDTH_>
struct Prepared {
    static constexpr int WIDTH = WIDTH_, MATRIX = CHUNK * WIDTH;  // of W, q and k: elements
    static constexpr int FLOATS = (3 * MATRIX + CHUNK * CHUNK) / 2 + WIDTH;  // all but U
    char* base;
    int n_columns;  // of U: Dv, rounded up

    DEVICE Prepared(const Args& a, int slot, int head) {
        base = reinterpret_cast<char*>(a.v[CHUNKS].row(slot, head));
        n_columns = (a.v[V].shape[2] + VALUE_TILE - 1) / VALUE_TILE * VALUE_TILE;
    }
    DEVICE half* w() const { return reinterpret_cast<half*>(base); }
    DEVICE half* q() const { return w() + MATRIX; }
    DEVICE half* k() const { return w() + 2 * MATRIX; }
    DEVICE half* b() const { return w() + 3 * MATRIX; }  // [CHUNK, CHUNK]
    DEVICE float* decay() const { return reinterpret_cast<float*>(b() + CHUNK * CHUNK); }
    // [CHUNK, n_columns]
    DEVICE float* u() const { return reinterpret_cast<float*>(base) + FLOATS; }
};

// The slot of a sequence's first chunk; no two sequences share slots.
DEVICE int first_slot(int begin, int seq) { return begin / CHUNK + seq; }

// Fragments (see primitives.cuh) of float16 matrices in shared memory with rows of STEP elements.
// Left operand: rows m … m + 15, columns k … k + 15; with TRANSPOSED it is stored by columns.
template <int STEP, bool TRANSPOSED = false>
DEVICE void load_left(uint32_t (&x)[4], const half* from, int m, int k) {
    const int lane = threadIdx.x % 32;
    if (TRANSPOSED)
        load_matrices_transposed(
            x, from + (k + lane / 16 * 8 + lane % 8) * STEP + m + lane / 8 % 2 * 8);
    else
        load_matrices(x, from + (m + lane % 16) * STEP + k + lane / 16 * 8);
}
// Right operand, rows k … k + 15, columns n … n + 15: (x[0], x[1]) are those of the first 8
// columns. Stored by rows, or with TRANSPOSED by columns.
template <int STEP, bool TRANSPOSED = false>
DEVICE void load_right(uint32_t (&x)[4], const half* from, int k, int n) {
    const int lane = threadIdx.x % 32;
    if (TRANSPOSED)
        load_matrices(x, from + (n + lane / 16 * 8 + lane % 8) * STEP + k + lane / 8 % 2 * 8);
    else
        load_matrices_transposed(x, from + (k + lane % 16) * STEP + n + lane / 16 * 8);
}

// Calls f(row, column, two neighbouring values) for the lane's part of a result of 8 N columns.
template <int N, typename F>
DEVICE void for_pairs(const float (&x)[N][4], int m, int n, F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            f(m + lane / 4 + 8 * i, n + 8 * j + lane % 4 * 2, x[j][2 * i], x[j][2 * i + 1]);
    }
}

}  // namespace gdn::delta
