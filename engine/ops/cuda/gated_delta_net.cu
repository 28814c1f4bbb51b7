// GATED_DELTA_NET: a scan with the state in registers; a thread block takes some value columns of
// one head of one sequence, each column spread over LANES lanes (see gated_delta_net.cuh).
//
// Few rows are scanned token by token, more rows in groups of 4 tokens, which shortens the chain
// from state to state: all four predictions and outputs are read from the state before the group,
// and small triangular matrices add the contributions d of the group's own tokens,
//
//     d_t = beta_t (v_t - S'k_t) - sum_{j<t} A_tj d_j,   o_t = S'q_t + sum_{j<=t} B_tj d_j,
//
// where S' is S decayed to token t, A_tj = beta_t k_t·k_j and B_tj = q_t·k_j, decayed from j to t.
// Decays are products of factors of at most 1: no difference of exponents is taken. Tokens past the
// end are zeros, which change nothing.

#include "gated_delta_net.cuh"

namespace gdn::delta {

constexpr int GROUP = 4, TILE = WARPS * GROUP;

// A group's scalars. With KDA decays are in the rows themselves, and these hold none.
struct alignas(16) Scalars {
    float a[GROUP][GROUP], b[GROUP][GROUP];
    float beta[GROUP], grown_beta[GROUP];  // grown: decays of tokens 0 … t
    float grown[GROUP], left[GROUP];       // left: decays of tokens after t
};

// Dynamic shared memory of two tiles: rows of k, q and with KDA g, then values.
template <int LANES, bool KDA>
struct Tiles {
    static constexpr int WIDTH = LANES * PER, COLUMNS = THREADS / LANES;
    static constexpr int ROWS_SIZE = TILE * WIDTH;
    static constexpr int STAGE = ROWS_SIZE * (KDA ? 3 : 2) + TILE * COLUMNS;
    static constexpr int SHARED = 4 * (2 * STAGE + (KDA ? WARPS * WIDTH : 0));

    float* base;
    int stage;

    DEVICE float* k() const { return base + stage * STAGE; }
    DEVICE float* q() const { return k() + ROWS_SIZE; }
    DEVICE float* g() const { return k() + 2 * ROWS_SIZE; }
    DEVICE float* v() const { return k() + STAGE - TILE * COLUMNS; }
    DEVICE float* decay() const { return base + 2 * STAGE; }  // [WARPS][WIDTH], KDA only
};

DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// TILE rows of one head of a view, WIDTH floats each; zeros from row `n` and column `size` on.
template <int WIDTH>
DEVICE void load_rows(float* to, const View& x, int64_t row, int head, int size, int n,
                      bool whole) {
    const float* from = x.row(row, head);
    if (whole) {
        for (int i = threadIdx.x; i < TILE * WIDTH / 4; i += THREADS) {
            const int t = i / (WIDTH / 4), at = i % (WIDTH / 4) * 4;
            const bool valid = t < n && at < size;
            copy_async(to + 4 * i, valid ? from + static_cast<int64_t>(t) * x.stride[0] + at : from,
                       valid);
        }
        return;
    }
    for (int i = threadIdx.x; i < TILE * WIDTH; i += THREADS) {
        const int t = i / WIDTH, at = i % WIDTH;
        to[i] = t < n && at < size ? from[static_cast<int64_t>(t) * x.stride[0] + at] : 0.0f;
    }
}

// The 16 products of a group: q_t·k_j at (t, j) where j <= t, k_j·k_t above the diagonal. With KDA,
// k and q become the vectors that read the state before the group, and g the keys of the update.
template <int LANES, bool KDA>
DEVICE void multiply_group(float (&x)[16], const Tiles<LANES, KDA>& tiles, int group) {
    constexpr int WIDTH = Tiles<LANES, KDA>::WIDTH;
    for (int i = threadIdx.x % 32; i < WIDTH; i += 32) {
        float k[GROUP], q[GROUP], moved[GROUP], grown = 1.0f;
#pragma unroll
        for (int t = 0; t < GROUP; t++) {
            const int at = (group * GROUP + t) * WIDTH + i;
            k[t] = tiles.k()[at], q[t] = tiles.q()[at];
            if (KDA) {
                const float e = exp_fast(tiles.g()[at]);
                grown *= e;
                tiles.k()[at] = k[t] * grown;
                tiles.q()[at] = q[t] * grown;
#pragma unroll
                for (int j = 0; j < t; j++) moved[j] *= e;
            }
            moved[t] = k[t];
#pragma unroll
            for (int j = 0; j < t; j++) {
                x[t * GROUP + j] = fmaf(q[t], moved[j], x[t * GROUP + j]);
                x[j * GROUP + t] = fmaf(k[t], moved[j], x[j * GROUP + t]);
            }
            x[t * GROUP + t] = fmaf(q[t], k[t], x[t * GROUP + t]);
        }
        if (KDA) {
            for (int t = 0; t < GROUP; t++) tiles.g()[(group * GROUP + t) * WIDTH + i] = moved[t];
            tiles.decay()[group * WIDTH + i] = grown;
        }
    }
}

// Scalars of a warp's group, from `beta` and with one decay a head `g` of its tokens.
template <int LANES, bool KDA>
DEVICE void prepare(const Tiles<LANES, KDA>& tiles, int group, const float* beta, const float* g,
                    Scalars& to) {
    float x[16]{}, e[GROUP];
    multiply_group(x, tiles, group);
    const float sum = warp_sums(x);
#pragma unroll
    for (int t = 0; t < GROUP; t++) e[t] = KDA ? 1.0f : exp_fast(g[t]);
    const int lane = threadIdx.x % 32, row = lane / GROUP, column = lane % GROUP;
    // Decays after `from` up to `until`.
    auto between = [&](int from, int until) {
        float product = 1.0f;
#pragma unroll
        for (int t = 0; t < GROUP; t++) product *= t > from && t <= until ? e[t] : 1.0f;
        return product;
    };
    if (lane < 16) {
        to.b[row][column] = column <= row ? sum * between(column, row) : 0.0f;
        if (column > row)
            to.a[column][row] = beta[column] * sum * between(row, column);
        else
            to.a[column][row] = 0.0f;
    }
    if (lane < GROUP) {
        const float grown = between(-1, lane);
        to.beta[lane] = beta[lane], to.grown_beta[lane] = beta[lane] * grown;
        to.grown[lane] = grown, to.left[lane] = between(lane, GROUP - 1);
    }
}

// Sums over a column's lanes of 4 values of each lane: lane l gets that of value l % 4.
template <int LANES>
DEVICE float column_sums(const float (&x)[GROUP], int lane) {
    const bool high = lane & 2, odd = lane & 1;
    const float a = (high ? x[2] : x[0]) + shuffle_xor(high ? x[0] : x[2], 2);
    const float b = (high ? x[3] : x[1]) + shuffle_xor(high ? x[1] : x[3], 2);
    float sum = (odd ? b : a) + shuffle_xor(odd ? a : b, 1);
#pragma unroll
    for (int mask = 4; mask < LANES; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
}

DEVICE float fma4(float4 x, const float* y, float sum) {
    return fmaf(x.w, y[3], fmaf(x.z, y[2], fmaf(x.y, y[1], fmaf(x.x, y[0], sum))));
}

// One group on a column; returns the output of token lane % 4, before the scale.
template <int LANES, bool KDA>
DEVICE float run_group(float (&s)[PER], const Tiles<LANES, KDA>& tiles, const Scalars& x, int group,
                       int column, int lane) {
    constexpr int WIDTH = Tiles<LANES, KDA>::WIDTH, COLUMNS = Tiles<LANES, KDA>::COLUMNS;
    const float* k = tiles.k() + group * GROUP * WIDTH + lane * 4;
    const float* q = tiles.q() + group * GROUP * WIDTH + lane * 4;
    float p[GROUP]{}, r[GROUP]{}, d[GROUP];
    float4 keys[GROUP][QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
#pragma unroll
        for (int t = 0; t < GROUP; t++) {
            keys[t][i] = load4(k + t * WIDTH + i * LANES * 4);
            p[t] = fma4(keys[t][i], s + 4 * i, p[t]);
        }
    }
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
#pragma unroll
        for (int t = 0; t < GROUP; t++)
            r[t] = fma4(load4(q + t * WIDTH + i * LANES * 4), s + 4 * i, r[t]);
    }
#pragma unroll
    for (int t = 0; t < GROUP; t++) p[t] = column_sum<LANES>(p[t]);
    const float* v = tiles.v() + group * GROUP * COLUMNS + column;
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        d[t] = fmaf(-x.grown_beta[t], p[t], x.beta[t] * v[t * COLUMNS]);
#pragma unroll
        for (int j = 0; j < t; j++) d[t] = fmaf(-x.a[t][j], d[j], d[t]);
    }
    const float last = x.grown[GROUP - 1];
    float update[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; t++) update[t] = KDA ? d[t] : x.left[t] * d[t];
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        float4 decay{last, last, last, last};
        if (KDA) decay = load4(tiles.decay() + group * WIDTH + (i * LANES + lane) * 4);
        float* y = s + 4 * i;
        y[0] *= decay.x, y[1] *= decay.y, y[2] *= decay.z, y[3] *= decay.w;
#pragma unroll
        for (int t = 0; t < GROUP; t++) {
            float4 key = keys[t][i];
            if (KDA) key = load4(tiles.g() + (group * GROUP + t) * WIDTH + (i * LANES + lane) * 4);
            y[0] = fmaf(key.x, update[t], y[0]), y[1] = fmaf(key.y, update[t], y[1]);
            y[2] = fmaf(key.z, update[t], y[2]), y[3] = fmaf(key.w, update[t], y[3]);
        }
    }
    const float sum = column_sums<LANES>(r, lane);
    const float* b = x.b[lane % GROUP];
    return fma4(load4(b), d, x.grown[lane % GROUP] * sum);
}

// A tile's scalars of tokens: threads 0 … TILE - 1 read beta, the next ones g of one decay a head.
template <bool KDA>
DEVICE float load_scalar(const Args& a, const Place& place, int t, int n) {
    const int i = threadIdx.x % TILE;
    if (t + i >= n || threadIdx.x >= (KDA ? TILE : 2 * TILE)) return 0.0f;
    return *a.v[threadIdx.x < TILE ? BETA : G].row(place.begin + t + i, place.head);
}

template <int LANES, bool KDA>
DEVICE void load_tile(const Tiles<LANES, KDA>& tiles, const Args& a, const Place& place, int t,
                      int n, int c, bool whole, bool whole_values) {
    constexpr int WIDTH = Tiles<LANES, KDA>::WIDTH, COLUMNS = Tiles<LANES, KDA>::COLUMNS;
    const int dk = a.v[Q].shape[2], rest = a.v[V].shape[2] - c;
    const int64_t row = place.begin + t;
    load_rows<WIDTH>(tiles.k(), a.v[K], row, place.key_head, dk, n - t, whole);
    load_rows<WIDTH>(tiles.q(), a.v[Q], row, place.key_head, dk, n - t, whole);
    if (KDA) load_rows<WIDTH>(tiles.g(), a.v[G], row, place.head, dk, n - t, whole);
    View values = a.v[V];
    values.data += 4 * static_cast<int64_t>(c);
    load_rows<COLUMNS>(tiles.v(), values, row, place.head, rest, n - t, whole_values);
    fence_copies();
}

template <int LANES, bool KDA>
DEVICE void run_rows(const Args& a, char* memory) {
    __shared__ Scalars scalars[WARPS];
    __shared__ float betas[2][TILE], decays[2][TILE];
    constexpr int COLUMNS = Tiles<LANES, KDA>::COLUMNS;
    const Place place(a, blockIdx.z, blockIdx.y);
    if (place.n == 0) return;
    const View& v = a.v[V];
    const int lane = threadIdx.x % LANES, column = threadIdx.x / LANES, warp = threadIdx.x / 32;
    const int first = blockIdx.x * COLUMNS, c = first + column;
    const bool live = c < v.shape[2];
    const int read = live ? c : v.shape[2] - 1;
    float s[PER];
    load_state<LANES>(s, a, place, read, lane);

    const bool whole = rows_aligned<KDA>(a);
    const bool whole_values = v.shape[2] % 4 == 0 && v.stride[0] % 4 == 0 && is_aligned(v.data);
    const int n = place.n_grouped(a);
    Tiles<LANES, KDA> tiles{reinterpret_cast<float*>(memory), 0};
    auto keep_scalar = [&](float x, int stage) {
        if (threadIdx.x < TILE)
            betas[stage][threadIdx.x] = x;
        else if (threadIdx.x < 2 * TILE)
            decays[stage][threadIdx.x - TILE] = x;
    };
    if (n > 0) {
        load_tile(tiles, a, place, 0, n, first, whole, whole_values);
        keep_scalar(load_scalar<KDA>(a, place, 0, n), 0);
    }
    for (int t = 0; t < n; t += TILE) {
        const int stage = tiles.stage;
        wait_copies<0>();
        __syncthreads();
        float scalar = 0.0f;
        if (t + TILE < n) {
            const Tiles<LANES, KDA> next{tiles.base, 1 - stage};
            load_tile(next, a, place, t + TILE, n, first, whole, whole_values);
            scalar = load_scalar<KDA>(a, place, t + TILE, n);
        }
        prepare(tiles, warp, betas[stage] + warp * GROUP, decays[stage] + warp * GROUP,
                scalars[warp]);
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < WARPS && t + i * GROUP < n; i++) {
            const float o = run_group(s, tiles, scalars[i], i, column, lane) * a.attr[1];
            const int token = t + i * GROUP + lane;
            if (live && lane < GROUP && token < n)
                a.v[OUT].row(place.begin + token, place.head)[c] = o;
        }
        keep_scalar(scalar, 1 - stage);
        tiles.stage = 1 - stage;
    }
    scan<LANES, KDA>(s, a, place, n, read, lane, live);
}

template <int LANES, bool KDA>
DEVICE void run_step(const Args& a) {
    constexpr int COLUMNS = THREADS / LANES;
    const Place place(a, blockIdx.z, blockIdx.y);
    if (place.n == 0) return;
    const int lane = threadIdx.x % LANES, c = blockIdx.x * COLUMNS + threadIdx.x / LANES;
    const bool live = c < a.v[V].shape[2];
    const int read = live ? c : a.v[V].shape[2] - 1;
    float s[PER];
    load_state<LANES>(s, a, place, read, lane);
    scan<LANES, KDA>(s, a, place, 0, read, lane, live);
}

}  // namespace gdn::delta

// Grid: (columns / (128 / LANES), value heads, sequences). KERNEL (primitives.cuh) declares each
// with the argument `a`. Names end in LANES: a head's keys fit into 16 · LANES.
#define GATED_DELTA_NET(NAME, LANES, KDA)                                \
    KERNEL(NAME##_step_##LANES) { gdn::delta::run_step<LANES, KDA>(a); } \
    KERNEL(NAME##_rows_##LANES) {                                        \
        using Memory = gdn::delta::Tiles<LANES, KDA>;                    \
        KERNEL_SHARED(NAME##_rows_##LANES, memory, Memory::SHARED);      \
        gdn::delta::run_rows<LANES, KDA>(a, memory);                     \
    }

GATED_DELTA_NET(delta_net, 4, false)
GATED_DELTA_NET(delta_net, 8, false)
GATED_DELTA_NET(delta_net, 16, false)
GATED_DELTA_NET(delta_net_kda, 4, true)
GATED_DELTA_NET(delta_net_kda, 8, true)
GATED_DELTA_NET(delta_net_kda, 16, true)
