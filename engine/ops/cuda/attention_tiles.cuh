// Attention of up to 16 · M_TILES rows (a token and a head of one key head's group each) over a
// range of positions, on tensor cores, with float16 caches.
//
// Tiles of POSITIONS keys and values are copied to shared memory while the tile before is computed.
// N_WARPS warps share a tile's scores by positions, and its products with values by columns.
// Queries and weights are rounded to float16; all sums are float32.
#pragma once

#include "attention.cuh"

namespace gdn::attention_op {

using half = uint16_t;

// LATENT: values are the first DV columns of the keys.
template <int DK_, int DV_, int M_TILES_, int N_WARPS_, int POSITIONS_, bool LATENT_ = false>
struct Shape {
    static constexpr int DK = DK_, DV = DV_, M_TILES = M_TILES_, N_WARPS = N_WARPS_;
    static constexpr int POSITIONS = POSITIONS_, ROWS = 16 * M_TILES;
    static constexpr bool LATENT = LATENT_, Q_IN_REGISTERS = DK <= 256;
    static constexpr int THREADS = 32 * M_TILES * N_WARPS;
    // Rows in shared memory are 16 bytes longer, so that 8 of them lie in different banks.
    static constexpr int K_STEP = DK + 8, V_STEP = LATENT ? K_STEP : DV + 8, P_STEP = POSITIONS + 8;
    static constexpr int KEYS = POSITIONS * K_STEP, VALUES = LATENT ? 0 : POSITIONS * V_STEP;
    static constexpr int STAGE = KEYS + VALUES, QUERIES = ROWS * K_STEP;
    static constexpr int SHARED =
        2 * (2 * STAGE + (Q_IN_REGISTERS ? 0 : QUERIES) + (N_WARPS > 1 ? ROWS * P_STEP : 0));
    static constexpr int N_TILES = POSITIONS / N_WARPS / 8;  // of a warp's scores
    static constexpr int COLUMNS = DV / N_WARPS;             // of a warp's result
    static_assert(DK % 32 == 0 && COLUMNS % 16 == 0 && POSITIONS % 16 == 0, "");
};

// A lane's part of a range's result: rows g and g + 8 of its warp's 16, g = lane / 4.
template <typename S>
struct Sums {
    float acc[S::COLUMNS / 8][4], m[2], l[2];

    DEVICE void clear() {
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 8; j++)
            acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
        m[0] = m[1] = -infinity(), l[0] = l[1] = 0.0f;
    }
    // Joins the next chunk's result.
    DEVICE void join(const Sums& chunk) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Factors f(m[i], chunk.m[i]);
#pragma unroll
            for (int j = 0; j < S::COLUMNS / 8; j++) {
                acc[j][2 * i] = f.join(acc[j][2 * i], chunk.acc[j][2 * i]);
                acc[j][2 * i + 1] = f.join(acc[j][2 * i + 1], chunk.acc[j][2 * i + 1]);
            }
            l[i] = f.join(l[i], chunk.l[i]), m[i] = fmaxf(m[i], chunk.m[i]);
        }
    }
    // Calls f(row of the 16 · M_TILES, column, value, index of m and l) for all that the lane has.
    template <typename F>
    DEVICE void for_each(F f) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int row = warp / S::N_WARPS * 16 + lane / 4;
        const int column = warp % S::N_WARPS * S::COLUMNS + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                f(row + i / 2 * 8, column + j * 8 + i % 2, acc[j][i], i / 2);
        }
    }
};

template <typename S>
struct Tiles {
    const View &k, &v;
    const int32_t* table;
    int kv_head, shift;  // log2 of the block size
    half* memory;
    // Exchanged between warps: weights, and the largest scores and sums of rows.
    half* weights;
    float *largest, *sums;
    uint32_t q[S::Q_IN_REGISTERS ? S::DK / 16 : 1][4];

    // `memory`: two stages of keys and values, queries unless they are in registers, weights.
    DEVICE Tiles(const Args& a, int32_t seq, int head, char* shared, float* largest_, float* sums_)
        : k(a.v[K_CACHE]),
          v(a.v[V_CACHE]),
          table(block_table(a, seq)),
          kv_head(head),
          shift(0),
          memory(reinterpret_cast<half*>(shared)),
          largest(largest_),
          sums(sums_) {
        while ((1 << shift) < k.shape[2]) shift++;
        weights = memory + 2 * S::STAGE + (S::Q_IN_REGISTERS ? 0 : S::QUERIES);
    }
    DEVICE half* queries() const { return S::Q_IN_REGISTERS ? memory : memory + 2 * S::STAGE; }

    // The query of each row, times `scale`, from f(row): a pointer, or null for a row of zeros.
    template <typename F>
    DEVICE void load_queries(F f, float scale, bool whole) {
        half* to = queries();
        for (int i = threadIdx.x; i < S::ROWS * S::DK / 4; i += S::THREADS) {
            const int row = i / (S::DK / 4), at = i % (S::DK / 4) * 4;
            const float* from = f(row);
            float x[4]{};
            if (from && whole) {
                const float4 y = *reinterpret_cast<const float4*>(from + at);
                x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
            } else if (from) {
                for (int e = 0; e < 4; e++) x[e] = from[at + e];
            }
            uint32_t* words = reinterpret_cast<uint32_t*>(to + row * S::K_STEP + at);
            words[0] = pack_half(x[0] * scale, x[1] * scale);
            words[1] = pack_half(x[2] * scale, x[3] * scale);
        }
        __syncthreads();
        if constexpr (S::Q_IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < S::DK / 16; i++) load_query(q[i], i);
        }
    }

    // Columns 16 i … 16 i + 15 of the warp's rows.
    DEVICE void load_query(uint32_t (&x)[4], int i) const {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 / S::N_WARPS * 16 + lane % 16;
        load_matrices(x, queries() + row * S::K_STEP + i * 16 + lane / 16 * 8);
    }

    // Starts the copies of a tile; positions from `end` on are zeros.
    DEVICE void load(int stage, int begin, int end) const {
        half* to = memory + stage * S::STAGE;
        // Blocks have a multiple of 16 positions. All are looked up before the first copy.
        int32_t blocks[S::POSITIONS / 16];
#pragma unroll
        for (int i = 0; i < S::POSITIONS / 16; i++) {
            const int position = begin + i * 16;
            blocks[i] = table[(position < end ? position : end - 1) >> shift];
        }
        load_rows<S::DK, S::K_STEP>(to, k, blocks, begin, end);
        if constexpr (!S::LATENT) load_rows<S::DV, S::V_STEP>(to + S::KEYS, v, blocks, begin, end);
        fence_copies();
    }

    template <int SIZE, int STEP>
    DEVICE void load_rows(half* to, const View& cache, const int32_t (&blocks)[S::POSITIONS / 16],
                          int begin, int end) const {
        constexpr int PARTS = SIZE / 8, N = S::POSITIONS * PARTS / S::THREADS;
        static_assert(S::POSITIONS * PARTS % S::THREADS == 0, "");
        const half* head = cache.as<half>() + static_cast<int64_t>(kv_head) * cache.stride[1];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int i = threadIdx.x + n * S::THREADS, row = i / PARTS, part = i % PARTS * 8;
            const int position = begin + row, in_block = position & ((1 << shift) - 1);
            int64_t block = blocks[0];
#pragma unroll
            for (int b = 1; b < S::POSITIONS / 16; b++) block = row < 16 * b ? block : blocks[b];
            const half* from = head + block * cache.stride[0] + in_block * cache.stride[2] + part;
            copy_async(to + row * STEP + part, from, position < end);
        }
    }

    // The warp's scores of a tile.
    DEVICE void score(float (&s)[S::N_TILES][4], const half* keys) const {
        // Few tiles: two sums for each, so that products don't wait for one another.
        constexpr int SETS = S::N_TILES <= 2 ? 2 : 1;
        float part[SETS][S::N_TILES][4]{};
        const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % S::N_WARPS * S::N_TILES * 8;
        const half* from = keys + (first + lane % 8) * S::K_STEP + lane / 8 * 8;
#pragma unroll
        for (int i = 0; i < S::DK / 32; i++) {
            uint32_t low[4], high[4];
            if constexpr (!S::Q_IN_REGISTERS) load_query(low, 2 * i), load_query(high, 2 * i + 1);
#pragma unroll
            for (int j = 0; j < S::N_TILES; j++) {
                uint32_t b[4];
                load_matrices(b, from + j * 8 * S::K_STEP + i * 32);
                if constexpr (S::Q_IN_REGISTERS) {
                    multiply_half(part[0][j], q[2 * i], b[0], b[1]);
                    multiply_half(part[SETS - 1][j], q[2 * i + 1], b[2], b[3]);
                } else {
                    multiply_half(part[0][j], low, b[0], b[1]);
                    multiply_half(part[SETS - 1][j], high, b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < S::N_TILES; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = part[0][j][i];
                if (SETS == 2) s[j][i] += part[SETS - 1][j][i];
            }
        }
    }

    // acc += weights · values.
    DEVICE void add_values(Sums<S>& to, const uint32_t (&p)[S::POSITIONS / 16][4],
                           const half* values) const {
        const int lane = threadIdx.x % 32, column = threadIdx.x / 32 % S::N_WARPS * S::COLUMNS;
        const half* from = values + lane % 16 * S::V_STEP + column + lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < S::POSITIONS / 16; i++) {
#pragma unroll
            for (int j = 0; j < S::COLUMNS / 16; j++) {
                uint32_t b[4];
                load_matrices_transposed(b, from + i * 16 * S::V_STEP + j * 16);
                multiply_half(to.acc[2 * j], p[i], b[0], b[1]);
                multiply_half(to.acc[2 * j + 1], p[i], b[2], b[3]);
            }
        }
    }

    // Combines a value of each row over the warps that share the row, by f.
    template <typename F>
    DEVICE void exchange(float (&x)[2], float* shared, F f) const {
        if constexpr (S::N_WARPS > 1) {
            const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
            float* row = shared + (warp / S::N_WARPS * 16 + lane / 4) * S::N_WARPS;
            if (lane % 4 == 0) {
                row[warp % S::N_WARPS] = x[0];
                row[8 * S::N_WARPS + warp % S::N_WARPS] = x[1];
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                x[i] = row[i * 8 * S::N_WARPS];
                for (int w = 1; w < S::N_WARPS; w++) x[i] = f(x[i], row[i * 8 * S::N_WARPS + w]);
            }
        }
    }

    // Turns a tile's scores into weights, in place; rescales `to`.
    DEVICE void weigh(float (&s)[S::N_TILES][4], Sums<S>& to, int first,
                      const int (&limits)[2]) const {
        const int lane = threadIdx.x % 32;
        const int position = first + threadIdx.x / 32 % S::N_WARPS * S::N_TILES * 8 + lane % 4 * 2;
        float most[2] = {-infinity(), -infinity()};
#pragma unroll
        for (int j = 0; j < S::N_TILES; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (position + j * 8 + i % 2 > limits[i / 2]) s[j][i] = -infinity();
                most[i / 2] = fmaxf(most[i / 2], s[j][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(most[i], shuffle_xor(most[i], 1));
            most[i] = fmaxf(most[i], shuffle_xor(most[i], 2));
        }
        exchange(most, largest, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(most[i], to.m[i]);
            const float factor = exp_fast(to.m[i] - most[i]);
            to.m[i] = most[i], to.l[i] *= factor;
#pragma unroll
            for (int j = 0; j < S::COLUMNS / 8; j++)
                to.acc[j][2 * i] *= factor, to.acc[j][2 * i + 1] *= factor;
        }
#pragma unroll
        for (int j = 0; j < S::N_TILES; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = exp_fast(s[j][i] - most[i / 2]);
                to.l[i / 2] += s[j][i];
            }
        }
    }

    // A tile's weights as the left operand: the warp's own, or all warps' through shared memory.
    DEVICE void pack_weights(uint32_t (&p)[S::POSITIONS / 16][4], const float (&s)[S::N_TILES][4]) {
        if constexpr (S::N_WARPS == 1) {
#pragma unroll
            for (int i = 0; i < S::POSITIONS / 16; i++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float* x = s[2 * i + r / 2] + r % 2 * 2;
                    p[i][r] = pack_half(x[0], x[1]);
                }
            }
        } else {
            const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
            half* rows = weights + warp / S::N_WARPS * 16 * S::P_STEP;
            const int column = warp % S::N_WARPS * S::N_TILES * 8 + lane % 4 * 2;
            half *upper = rows + lane / 4 * S::P_STEP + column, *lower = upper + 8 * S::P_STEP;
#pragma unroll
            for (int j = 0; j < S::N_TILES; j++) {
                *reinterpret_cast<uint32_t*>(upper + j * 8) = pack_half(s[j][0], s[j][1]);
                *reinterpret_cast<uint32_t*>(lower + j * 8) = pack_half(s[j][2], s[j][3]);
            }
            __syncthreads();
            const half* from = rows + lane % 16 * S::P_STEP + lane / 16 * 8;
#pragma unroll
            for (int i = 0; i < S::POSITIONS / 16; i++) load_matrices(p[i], from + i * 16);
        }
    }

    // Attends to positions begin … end - 1; a row sees those up to its limit, at least the first
    // one. `begin` is a multiple of POSITIONS.
    DEVICE void attend(Sums<S>& to, int begin, int end, const int (&limits)[2]) {
        to.clear();
        __syncthreads();
        load(0, begin, end);
        int stage = 0;
        for (int first = begin; first < end; first += S::POSITIONS) {
            wait_copies<0>();
            __syncthreads();
            if (first + S::POSITIONS < end) load(1 - stage, first + S::POSITIONS, end);
            const half* keys = memory + stage * S::STAGE;
            float s[S::N_TILES][4];
            uint32_t p[S::POSITIONS / 16][4];
            score(s, keys);
            weigh(s, to, first, limits);
            pack_weights(p, s);
            add_values(to, p, S::LATENT ? keys : keys + S::KEYS);
            stage = 1 - stage;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            to.l[i] += shuffle_xor(to.l[i], 1);
            to.l[i] += shuffle_xor(to.l[i], 2);
        }
        exchange(to.l, sums, [](float x, float y) { return x + y; });
    }
};

}  // namespace gdn::attention_op
