// Products of many rows with a packed weight on tensor cores: a tile of BM rows of bfloat16 x times
// 128 rows of the weight (8 panels), which is decoded to bfloat16 on its way into shared memory.
//
// A row's sums are added in the order of columns, whatever other rows the tile has. K is a multiple
// of 32.
#pragma once

#include "k_block.cuh"

namespace gdn {

constexpr int TILE_N = GEMM_COLUMNS, TILE_K = K_BLOCK, STAGES = 3;

// 8 elements of row r of a tile of 32 columns, swizzled so that 8 rows use all banks.
DEVICE uint16_t* chunk(uint16_t* tile, int r, int c) {
    return tile + r * TILE_K + (c ^ (r / 2 % 4)) * 8;
}

// A lane's piece of a k-block of any layout, as it is stored.
struct StoredPiece {
    uint32_t w[4], head[2], super[2];
};

template <typename F>
DEVICE void fetch(F, const uint8_t* panel, int i, int lane, StoredPiece& to) {
    Piece<F> piece;
    piece.clear();
    piece.load(F::k_block(panel, i), lane);
    for (int k = 0; k < 4; k++) to.w[k] = piece.planes[k];
    for (int k = 0; k < 2; k++) to.head[k] = piece.head[k];
    Super<F>::fetch(F::super_block(panel, i), lane, to.super);
}

template <Layout L>
DEVICE void fetch(Plain<L>, const uint8_t* panel, int i, int lane, StoredPiece& to) {
    if (L != L_BF16) return;
    const auto* at = reinterpret_cast<const uint32_t*>(panel) + (i * 16 + lane % 4 * 4) * PANEL;
    uint32_t w[8];
    for (int k = 0; k < 8; k++) w[k] = load_stream(at + k % 4 * PANEL + lane / 4 + k / 4 * 8);
    for (int k = 0; k < 4; k++) to.w[k] = w[k];
    for (int k = 0; k < 2; k++) to.head[k] = w[4 + k], to.super[k] = w[6 + k];
}

template <typename F>
DEVICE void expand(F, const StoredPiece& from, int c, int i, Words4& to) {
    Piece<F> piece;
    for (int k = 0; k < 4; k++) piece.planes[k] = from.w[k];
    for (int k = 0; k < 2; k++) piece.head[k] = from.head[k];
    float v[8];
    decode(piece, Super<F>(from.super), c, i, v);
    for (int k = 0; k < 4; k++) to.w[k] = pack_bf16(v[2 * k], v[2 * k + 1]);
}

template <Layout L>
DEVICE void expand(Plain<L>, const StoredPiece& from, int, int i, Words4& to) {
    for (int k = 0; k < 2; k++) {
        to.w[k] = i == 0 ? from.w[k] : from.head[k];
        to.w[k + 2] = i == 0 ? from.w[k + 2] : from.super[k];
    }
}

// A tile: warp w decodes panel w of 8, and computes rows from w % 2 · BM / 2 and columns from
// w / 2 · 32 of the product.
template <int BM>
struct Gemm {
    static constexpr int THREADS = THREADS_gemm_64, A_SIZE = BM * TILE_K, B_SIZE = TILE_N * TILE_K;
    static constexpr int SHARED = (STAGES * A_SIZE + 2 * B_SIZE) * 2;
    static constexpr int COPIES = BM * 4 / THREADS ? BM * 4 / THREADS : 1, TILES = BM / 32;

    const View& weight;
    const uint8_t* panel;  // nullptr past the last.
    uint16_t *a, *b;
    const uint16_t* rows[COPIES];
    int n_k_blocks, warp, lane;
    StoredPiece k_block{};
    float acc[TILES][4][4] = {};

    // `row_at(i)`: row i of the tile, or nullptr. `matrix`: the weight's first panel.
    template <typename RowAt>
    DEVICE Gemm(const View& w, const uint8_t* matrix, int first_column, char* shared, RowAt row_at)
        : weight(w),
          a(reinterpret_cast<uint16_t*>(shared)),
          b(a + STAGES * A_SIZE),
          n_k_blocks(w.shape[w.rank - 1] / K_BLOCK),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32) {
        const int number = first_column / PANEL + warp;
        const int64_t offset = static_cast<int64_t>(number) * w.stride[w.rank - 2];
        panel = number < n_panels(w) ? matrix + offset : nullptr;
        for (int i = 0; i < COPIES; i++) {
            const int row = (threadIdx.x + i * THREADS) / 4;
            rows[i] = row < BM ? row_at(row) : nullptr;
        }
    }

    DEVICE void copy_rows(int step) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int row = (threadIdx.x + i * THREADS) / 4, c = threadIdx.x % 4;
            if (row >= BM || step >= n_k_blocks) continue;
            // Without a row the copy writes zeros, and any address will do.
            const void* from = rows[i] ? static_cast<const void*>(rows[i] + step * TILE_K + 8 * c)
                                       : static_cast<const void*>(weight.data);
            copy_async(chunk(a + step % STAGES * A_SIZE, row, c), from, rows[i] != nullptr);
        }
        fence_copies();
    }

    DEVICE void fetch_weights(int step) {
        if (panel == nullptr || step >= n_k_blocks) return;
        with_format(weight.layout, [&](auto f) { fetch(f, panel, step, lane, k_block); });
    }

    DEVICE void put_weights(int step) {
        Words4 words[2] = {};
        const int g = lane / 4, c = lane % 4;
        if (panel != nullptr)
            with_format(weight.layout, [&](auto f) {
                for (int i = 0; i < 2; i++) expand(f, k_block, c, i, words[i]);
            });
        uint16_t* tile = b + step % 2 * B_SIZE;
        for (int i = 0; i < 2; i++)
            *reinterpret_cast<Words4*>(chunk(tile, warp * PANEL + g + 8 * i, c)) = words[i];
    }

    DEVICE void multiply(int step) {
        uint16_t *at = a + step % STAGES * A_SIZE, *bt = b + step % 2 * B_SIZE;
        const int first_row = warp % 2 * (BM / 2), first_column = warp / 2 * 32;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t x[TILES][4], w[2][4];
#pragma unroll
            for (int i = 0; i < TILES; i++)
                load_matrices(x[i], chunk(at, first_row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = first_column + 16 * j + lane / 16 * 8 + lane % 8;
                load_matrices(w[j], chunk(bt, row, 2 * k + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    multiply_bf16(acc[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
    }

    DEVICE void run() {
        copy_rows(0);
        copy_rows(1);
        fetch_weights(0);
        for (int step = 0; step < n_k_blocks; step++) {
            put_weights(step);
            fetch_weights(step + 1);
            wait_copies<1>();
            // All warps have read, before this barrier, the stages that are overwritten below.
            __syncthreads();
            copy_rows(step + 2);
            multiply(step);
        }
    }

    // Calls f(row, column of the tile, value) for all products of this thread.
    template <typename Put>
    DEVICE void store(Put put) const {
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    put(warp % 2 * (BM / 2) + 16 * i + g + k / 2 * 8,
                        warp / 2 * 32 + 8 * j + 2 * c + k % 2, acc[i][j][k]);
    }
};

}  // namespace gdn
