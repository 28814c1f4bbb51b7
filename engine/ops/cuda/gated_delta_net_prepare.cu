// The chunk form of GATED_DELTA_NET, first kernel: the matrices of all chunks (see
// gated_delta_net_chunk.cuh), a block for each chunk and value head.

#include "gated_delta_net_chunk.cuh"

namespace gdn::delta {

constexpr int SUB = 16, A_STEP = CHUNK + 1, T_STEP = CHUNK + 8;

// Dynamic shared memory. Values replace the queries once those have been used.
template <int WIDTH, bool KDA>
struct Memory {
    static constexpr int STEP = WIDTH + 8, V_STEP = VALUE_TILE + 8;
    half k[CHUNK * STEP], q[CHUNK * STEP], t[2][CHUNK * T_STEP];  // t: for values, for keys
    float a[CHUNK * A_STEP], inverse[CHUNK * A_STEP], part[3][SUB * (SUB + 1)];
    // Cumulated decays as sums of two floats: their differences keep digits that float32 would
    // lose.
    float high[CHUNK], low[CHUNK], beta[CHUNK];
    float decay[KDA ? CHUNK * WIDTH : 1];
};

// n rows of a head as float16; zeros elsewhere.
template <int WIDTH, int STEP>
DEVICE void load_halves(half* to, const View& x, int64_t row, int head, int first, int size,
                        int n) {
    const float* from = x.row(row, head) + first;
    for (int i = threadIdx.x; i < CHUNK * WIDTH / 2; i += CHUNK_THREADS) {
        const int t = i / (WIDTH / 2), at = i % (WIDTH / 2) * 2;
        const float* p = from + static_cast<int64_t>(t) * x.stride[0] + at;
        const float low = t < n && at < size ? p[0] : 0.0f;
        const float high = t < n && at + 1 < size ? p[1] : 0.0f;
        *reinterpret_cast<uint32_t*>(to + t * STEP + at) = pack_half(low, high);
    }
}

// Cumulated decays of one decay a head, in float64, by one warp: a lane has two tokens.
template <typename M>
DEVICE void cumulate(M& m, const float* g, int stride, int n) {
    const int lane = threadIdx.x;
    double x[2];
    for (int i = 0; i < 2; i++) {
        const int t = 2 * lane + i;
        x[i] = t < n ? g[static_cast<int64_t>(t) * stride] : 0.0;
    }
    double sum = x[0] + x[1];
    for (int by = 1; by < 32; by *= 2) {
        const double below = shuffle_up(sum, by);
        if (lane >= by) sum += below;
    }
    const double both[2] = {sum - x[1], sum};
    for (int i = 0; i < 2; i++) {
        const float high = static_cast<float>(both[i]);
        m.high[2 * lane + i] = high;
        m.low[2 * lane + i] = static_cast<float>(both[i] - high);
    }
}

template <typename M>
DEVICE float decay_between(const M& m, int from, int to) {
    return exp_fast((m.high[to] - m.high[from]) + (m.low[to] - m.low[from]));
}

// A and B with one decay a head: a warp has 16 rows, and half of the columns.
template <int WIDTH, bool KDA>
DEVICE void make_products(Memory<WIDTH, KDA>& m, half* b, float scale) {
    constexpr int STEP = Memory<WIDTH, KDA>::STEP;
    const int warp = threadIdx.x / 32, row = warp % 4 * 16, column = warp / 4 * 32;
    float kk[4][4]{}, qk[4][4]{};
    // Blocks above the diagonal are zero.
    if (column <= row) {
        for (int i = 0; i < WIDTH; i += 16) {
            uint32_t k[4], q[4], right[4];
            load_left<STEP>(k, m.k, row, i);
            load_left<STEP>(q, m.q, row, i);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                load_right<STEP, true>(right, m.k, i, column + 8 * j);
                multiply_half(kk[j], k, right[0], right[1]);
                multiply_half(kk[j + 1], k, right[2], right[3]);
                multiply_half(qk[j], q, right[0], right[1]);
                multiply_half(qk[j + 1], q, right[2], right[3]);
            }
        }
    }
    for_pairs(kk, row, column, [&](int i, int j, float x, float y) {
        m.a[i * A_STEP + j] = j < i ? m.beta[i] * x * decay_between(m, j, i) : 0.0f;
        m.a[i * A_STEP + j + 1] = j + 1 < i ? m.beta[i] * y * decay_between(m, j + 1, i) : 0.0f;
    });
    for_pairs(qk, row, column, [&](int i, int j, float x, float y) {
        const float low = j <= i ? x * scale * decay_between(m, j, i) : 0.0f;
        const float high = j + 1 <= i ? y * scale * decay_between(m, j + 1, i) : 0.0f;
        *reinterpret_cast<uint32_t*>(b + i * CHUNK + j) = pack_half(low, high);
    });
}

// A and B with a decay for each key row: each warp decays 8 tokens' keys from token to token.
template <int WIDTH>
DEVICE void make_products_kda(Memory<WIDTH, true>& m, half* b, float scale) {
    constexpr int STEP = WIDTH + 8, PER_LANE = (WIDTH + 31) / 32;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 8;
    float moved[8][PER_LANE]{};
    for (int i = threadIdx.x; i < CHUNK * CHUNK; i += CHUNK_THREADS) {
        m.a[i / CHUNK * A_STEP + i % CHUNK] = 0.0f;
        b[i] = 0;
    }
    __syncthreads();
    for (int i = first; i < CHUNK; i++) {
        float sums[16]{};
#pragma unroll
        for (int d = 0; d < PER_LANE; d++) {
            const int at = d * 32 + lane;
            const float e = m.decay[i * WIDTH + at];
            const float k = half_to_float(m.k[i * STEP + at]);
            const float q = half_to_float(m.q[i * STEP + at]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                moved[j][d] = first + j == i ? k : moved[j][d] * e;
                sums[j] = fmaf(k, moved[j][d], sums[j]);
                sums[8 + j] = fmaf(q, moved[j][d], sums[8 + j]);
            }
        }
        const float sum = warp_sums(sums);
        const int j = first + lane % 8;
        if (lane < 8 && j < i) m.a[i * A_STEP + j] = m.beta[i] * sum;
        if (lane >= 8 && lane < 16 && j <= i) b[i * CHUNK + j] = float_to_half(sum * scale);
    }
}

// (I + A)^-1: blocks of 16 on the diagonal by substitution, then one diagonal of blocks after
// another.
template <typename M>
DEVICE void invert(M& m) {
    const int thread = threadIdx.x;
    for (int i = thread; i < CHUNK * A_STEP; i += CHUNK_THREADS) m.inverse[i] = 0.0f;
    __syncthreads();
    if (thread < CHUNK) {
        const int base = thread / SUB * SUB, column = thread % SUB;
        float x[SUB];
#pragma unroll
        for (int i = 0; i < SUB; i++) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++) sum = fmaf(m.a[(base + i) * A_STEP + base + j], x[j], sum);
            x[i] = i < column ? 0.0f : i == column ? 1.0f : -sum;
            m.inverse[(base + i) * A_STEP + base + column] = x[i];
        }
    }
    const int r = thread / SUB, c = thread % SUB;
    for (int distance = 1; distance < CHUNK / SUB; distance++) {
        __syncthreads();
        for (int block = distance; block < CHUNK / SUB; block++) {
            const int row = block * SUB, column = row - distance * SUB;
            float sum = 0.0f;
            for (int i = column; i < row; i++)
                sum = fmaf(m.a[(row + r) * A_STEP + i], m.inverse[i * A_STEP + column + c], sum);
            m.part[block - distance][r * (SUB + 1) + c] = sum;
        }
        __syncthreads();
        for (int block = distance; block < CHUNK / SUB; block++) {
            const int row = block * SUB, column = row - distance * SUB;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < SUB; i++)
                sum = fmaf(m.inverse[(row + r) * A_STEP + row + i],
                           m.part[block - distance][i * (SUB + 1) + c], sum);
            m.inverse[(row + r) * A_STEP + column + c] = -sum;
        }
    }
    __syncthreads();
}

// A warp's 16 rows of T · x, half of its WIDTH columns.
template <int WIDTH, int STEP>
DEVICE void multiply_inverse(float (&y)[WIDTH / 16][4], const half* t, const half* x) {
    const int warp = threadIdx.x / 32, row = warp % 4 * 16, column = warp / 4 * (WIDTH / 2);
    for (int i = 0; i <= row; i += 16) {
        uint32_t left[4], right[4];
        load_left<T_STEP>(left, t, row, i);
#pragma unroll
        for (int j = 0; j < WIDTH / 16; j += 2) {
            load_right<STEP>(right, x, i, column + 8 * j);
            multiply_half(y[j], left, right[0], right[1]);
            multiply_half(y[j + 1], left, right[2], right[3]);
        }
    }
}

// Queries decayed from the chunk's start, keys decayed to its end, all decays; with KDA the keys in
// shared memory become those decayed from the start.
template <int WIDTH>
DEVICE void write_decayed_kda(Memory<WIDTH, true>& m, const Prepared<WIDTH>& to, float scale) {
    constexpr int STEP = WIDTH + 8;
    for (int d = threadIdx.x; d < WIDTH; d += CHUNK_THREADS) {
        float left = 1.0f, grown = 1.0f;
        for (int i = CHUNK - 1; i >= 0; i--) {
            to.k()[i * WIDTH + d] = float_to_half(half_to_float(m.k[i * STEP + d]) * left);
            left *= m.decay[i * WIDTH + d];
        }
        for (int i = 0; i < CHUNK; i++) {
            grown *= m.decay[i * WIDTH + d];
            const float q = half_to_float(m.q[i * STEP + d]) * scale;
            to.q()[i * WIDTH + d] = float_to_half(q * grown);
            m.k[i * STEP + d] = float_to_half(half_to_float(m.k[i * STEP + d]) * grown);
        }
        to.decay()[d] = grown;
    }
}

template <int WIDTH>
DEVICE void write_decayed(const Memory<WIDTH, false>& m, const Prepared<WIDTH>& to, float scale) {
    constexpr int STEP = WIDTH + 8, LAST = CHUNK - 1;
    for (int at = threadIdx.x; at < CHUNK * WIDTH / 2; at += CHUNK_THREADS) {
        const int i = at / (WIDTH / 2), d = at % (WIDTH / 2) * 2;
        const float grown = exp_fast(m.high[i]) * scale, left = decay_between(m, i, LAST);
        const half *q = m.q + i * STEP + d, *k = m.k + i * STEP + d;
        reinterpret_cast<uint32_t*>(to.q())[at] =
            pack_half(half_to_float(q[0]) * grown, half_to_float(q[1]) * grown);
        reinterpret_cast<uint32_t*>(to.k())[at] =
            pack_half(half_to_float(k[0]) * left, half_to_float(k[1]) * left);
    }
    for (int d = threadIdx.x; d < WIDTH; d += CHUNK_THREADS) to.decay()[d] = exp_fast(m.high[LAST]);
}

template <int WIDTH, bool KDA>
DEVICE void prepare_chunk(const Args& a, char* memory) {
    using M = Memory<WIDTH, KDA>;
    M& m = *reinterpret_cast<M*>(memory);
    const int n_snapshots = a.v[SNAPSHOT_DST].shape[1];
    auto count = [&](int32_t n) {
        const int32_t rest = n - n_snapshots;
        return takes(a, n) && rest > 0 ? (rest + CHUNK - 1) / CHUNK : 0;
    };
    const Found found = find(a.v[SEQ_STARTS], a.live + N_SEQS, blockIdx.x, count);
    if (found.seq < 0) return;
    const Place place(a, found.seq, blockIdx.y);
    const int start = found.index * CHUNK, rest = place.n_grouped(a) - start;
    const int n = rest < CHUNK ? rest : CHUNK, dk = a.v[Q].shape[2], dv = a.v[V].shape[2];
    const int64_t row = place.begin + start;
    const Prepared<WIDTH> to(a, first_slot(place.begin, place.seq) + found.index, place.head);
    const float scale = a.attr[1];
    const View& g = a.v[G];

    load_halves<WIDTH, M::STEP>(m.k, a.v[K], row, place.key_head, 0, dk, n);
    load_halves<WIDTH, M::STEP>(m.q, a.v[Q], row, place.key_head, 0, dk, n);
    if (threadIdx.x < CHUNK) {
        const int t = threadIdx.x;
        m.beta[t] = t < n ? *a.v[BETA].row(row + t, place.head) : 0.0f;
    }
    if constexpr (KDA) {
        for (int i = threadIdx.x; i < CHUNK * WIDTH; i += CHUNK_THREADS) {
            const int t = i / WIDTH, d = i % WIDTH;
            m.decay[i] = t < n && d < dk ? exp_fast(g.row(row + t, place.head)[d]) : 1.0f;
        }
    } else if (threadIdx.x < 32) {
        cumulate(m, g.row(row, place.head), g.stride[0], n);
    }
    __syncthreads();
    if constexpr (KDA)
        make_products_kda(m, to.b(), scale);
    else
        make_products(m, to.b(), scale);
    __syncthreads();
    if constexpr (KDA)
        write_decayed_kda(m, to, scale);
    else
        write_decayed(m, to, scale);
    invert(m);
    for (int i = threadIdx.x; i < CHUNK * CHUNK; i += CHUNK_THREADS) {
        const int r = i / CHUNK, c = i % CHUNK;
        const float x = m.inverse[r * A_STEP + c] * m.beta[c];
        m.t[0][r * T_STEP + c] = float_to_half(x);
        m.t[1][r * T_STEP + c] = float_to_half(KDA ? x : x * exp_fast(m.high[c]));
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, first_row = warp % 4 * 16;
    float w[WIDTH / 16][4]{};
    multiply_inverse<WIDTH, M::STEP>(w, m.t[1], m.k);
    for_pairs(w, first_row, warp / 4 * (WIDTH / 2), [&](int i, int d, float x, float y) {
        *reinterpret_cast<uint32_t*>(to.w() + i * WIDTH + d) = pack_half(x, y);
    });
    for (int c = 0; c < to.n_columns; c += VALUE_TILE) {
        __syncthreads();
        load_halves<VALUE_TILE, M::V_STEP>(m.q, a.v[V], row, place.head, c, dv - c, n);
        __syncthreads();
        float u[VALUE_TILE / 16][4]{};
        multiply_inverse<VALUE_TILE, M::V_STEP>(u, m.t[0], m.q);
        for_pairs(u, first_row, warp / 4 * (VALUE_TILE / 2), [&](int i, int d, float x, float y) {
            *reinterpret_cast<float2*>(to.u() + i * to.n_columns + c + d) = float2{x, y};
        });
    }
}

}  // namespace gdn::delta

// Grid: (chunks, value heads).
#define PREPARE(NAME, WIDTH, KDA)                                                                \
    KERNEL(NAME##_prepare_##WIDTH) {                                                             \
        using namespace gdn::delta;                                                              \
        static_assert(Prepared<WIDTH>::FLOATS == gdn::DELTA_CHUNK_FLOATS_##WIDTH, "kernels.py"); \
        KERNEL_SHARED(NAME##_prepare_##WIDTH, memory, (sizeof(Memory<WIDTH, KDA>)));             \
        prepare_chunk<WIDTH, KDA>(a, memory);                                                    \
    }

PREPARE(delta_net, 64, false)
PREPARE(delta_net, 128, false)
PREPARE(delta_net, 256, false)
PREPARE(delta_net_kda, 64, true)
PREPARE(delta_net_kda, 128, true)
PREPARE(delta_net_kda, 256, true)
