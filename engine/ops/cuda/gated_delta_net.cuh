// The kernels of GATED_DELTA_NET share operands, and the layout of a value column of the state in
// registers.
//
// LANES neighbouring lanes of a warp hold a column, PER floats each: the lane's i-th float4 is
// number i · LANES + lane of the column. Floats past the column's end are zero and stay zero.
#pragma once

#include "sequences.cuh"

namespace gdn::delta {

// Attributes: head_map (0: tiled, 1: grouped), scale, algorithm, first, end: a launch takes the
// sequences of first … end - 1 rows.
enum { OUT, Q, K, V, G, BETA, STATE, SEQ_STARTS, STATE_SRC, STATE_DST, SNAPSHOT_DST, CHUNKS };

constexpr int PER = DELTA_LANE_FLOATS, QUADS = PER / 4;
constexpr int THREADS = THREADS_delta_net_rows_4, WARPS = THREADS / 32;

DEVICE bool takes(const Args& a, int32_t n) { return n > 0 && n >= a.attr[3] && n < a.attr[4]; }

// The work of a thread block: some columns of one head of one sequence.
struct Place {
    int32_t begin, n, src, dst;  // rows of the sequence, slots
    int32_t head, key_head, seq;

    // Starts all loads that the address of the state needs at once; `n` is 0 without work.
    DEVICE Place(const Args& a, int32_t sequence, int32_t head_) : head(head_) {
        const int32_t* starts = a.v[SEQ_STARTS].as<int32_t>();
        const int32_t n_seqs = a.live[N_SEQS], last = a.v[STATE_SRC].shape[0] - 1;
        seq = sequence < last ? sequence : last;
        begin = starts[seq], n = starts[seq + 1] - begin;
        src = a.v[STATE_SRC].as<int32_t>()[seq];
        dst = a.v[STATE_DST].as<int32_t>()[seq];
        if (sequence >= n_seqs || !takes(a, n)) n = 0;
        const int32_t n_k = a.v[Q].shape[1], n_v = a.v[V].shape[1];
        key_head = a.attr[0] == 0.0f ? head % n_k : head / (n_v / n_k);
    }
    DEVICE float* column(const Args& a, int32_t slot, int c) const {
        const View& s = a.v[STATE];
        return s.as<float>() + static_cast<int64_t>(slot) * s.stride[0] +
               static_cast<int64_t>(head) * s.stride[1] + static_cast<int64_t>(c) * s.stride[2];
    }
    // Tokens before the first whose state is kept. Groups and chunks have no states inside, so the
    // tokens from there on are scanned one by one.
    DEVICE int32_t n_grouped(const Args& a) const {
        const int32_t rest = n - a.v[SNAPSHOT_DST].shape[1];
        return rest > 0 ? rest : 0;
    }
    // Slot for the state after token t of the sequence, -1 for none.
    DEVICE int32_t snapshot(const Args& a, int32_t t) const {
        const View& snapshots = a.v[SNAPSHOT_DST];
        const int32_t j = t - n + snapshots.shape[1];
        if (j < 0) return -1;
        return snapshots.as<int32_t>()[static_cast<int64_t>(seq) * snapshots.stride[0] + j];
    }
};

// `n` floats at p as a column's lane holds them; 16 bytes at a time where `whole`.
template <int LANES>
DEVICE void load_part(float (&x)[PER], const float* p, int n, int lane, bool whole) {
    if (whole) {
        float4 v[QUADS];
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int at = (i * LANES + lane) * 4;
            v[i] = at < n ? *reinterpret_cast<const float4*>(p + at) : float4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            x[4 * i] = v[i].x, x[4 * i + 1] = v[i].y;
            x[4 * i + 2] = v[i].z, x[4 * i + 3] = v[i].w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int at = (i / 4 * LANES + lane) * 4 + i % 4;
        x[i] = at < n ? p[at] : 0.0f;
    }
}

template <int LANES>
DEVICE void store_part(const float (&x)[PER], float* p, int n, int lane, bool whole) {
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int at = (i * LANES + lane) * 4;
        if (whole) {
            if (at < n)
                *reinterpret_cast<float4*>(p + at) =
                    float4{x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
        } else {
            for (int e = 0; e < 4; e++)
                if (at + e < n) p[at + e] = x[4 * i + e];
        }
    }
}

// The sum over a column's lanes, in each of them.
template <int LANES>
DEVICE float column_sum(float x) {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// Adds the values of the lane HALF away to this lane's, for the half of them that the lane keeps.
template <int HALF>
DEVICE void fold(float (&x)[16]) {
    const bool upper = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float keep = upper ? x[HALF + i] : x[i], give = upper ? x[i] : x[HALF + i];
        x[i] = keep + shuffle_xor(give, HALF);
    }
}

// The sums over a warp of 16 values of each lane: lane l gets that of value l % 16.
DEVICE float warp_sums(float (&x)[16]) {
    fold<8>(x), fold<4>(x), fold<2>(x), fold<1>(x);
    return x[0] + shuffle_xor(x[0], 16);
}

DEVICE float dot(const float (&x)[PER], const float (&y)[PER]) {
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i += 2) {
        even = fmaf(x[i], y[i], even);
        odd = fmaf(x[i + 1], y[i + 1], odd);
    }
    return even + odd;
}

// A token's operands, as a lane needs them.
struct Token {
    float k[PER], q[PER], decay[PER], v, beta;
};

template <int LANES, bool KDA>
DEVICE void load_token(Token& x, const Args& a, const Place& place, int32_t t, int c, int lane,
                       bool whole) {
    const int dk = a.v[Q].shape[2];
    const int64_t row = place.begin + t;
    load_part<LANES>(x.k, a.v[K].row(row, place.key_head), dk, lane, whole);
    load_part<LANES>(x.q, a.v[Q].row(row, place.key_head), dk, lane, whole);
    if (KDA)
        load_part<LANES>(x.decay, a.v[G].row(row, place.head), dk, lane, whole);
    else
        x.decay[0] = *a.v[G].row(row, place.head);
    x.v = a.v[V].row(row, place.head)[c];
    x.beta = *a.v[BETA].row(row, place.head);
}

// One token of a column; returns its output before the scale.
template <int LANES, bool KDA>
DEVICE float step(float (&s)[PER], const Token& x) {
    if (KDA) {
#pragma unroll
        for (int i = 0; i < PER; i++) s[i] *= exp_fast(x.decay[i]);
    }
    // The new state's output Sᵀq is computed from the old state, so that no sum waits for another.
    const float decay = KDA ? 1.0f : exp_fast(x.decay[0]);
    const float predicted = column_sum<LANES>(dot(s, x.k));
    const float read = column_sum<LANES>(dot(s, x.q)), kq = column_sum<LANES>(dot(x.k, x.q));
    const float d = x.beta * (x.v - decay * predicted);
#pragma unroll
    for (int i = 0; i < PER; i++) s[i] = fmaf(x.k[i], d, decay * s[i]);
    return fmaf(kq, d, decay * read);
}

// Whether rows of q, k and g may be read 16 bytes at a time.
template <bool KDA>
DEVICE bool rows_aligned(const Args& a) {
    bool whole = a.v[Q].shape[2] % 4 == 0;
    for (int i = Q; i <= G; i++) {
        if (i == V || (i == G && !KDA)) continue;
        whole = whole && is_aligned(a.v[i].data) && a.v[i].stride[0] % 4 == 0;
    }
    return whole;
}

// Tokens first … n - 1 of a sequence one by one, with their snapshots, and the last state.
template <int LANES, bool KDA>
DEVICE void scan(float (&s)[PER], const Args& a, const Place& place, int32_t first, int c, int lane,
                 bool live) {
    const int dk = a.v[Q].shape[2];
    const bool whole = rows_aligned<KDA>(a), whole_state = dk % 4 == 0;
    Token x;
    if (first < place.n) load_token<LANES, KDA>(x, a, place, first, c, lane, whole);
#pragma unroll 1
    for (int32_t t = first; t < place.n; t++) {
        const float o = step<LANES, KDA>(s, x) * a.attr[1];
        if (t + 1 < place.n) load_token<LANES, KDA>(x, a, place, t + 1, c, lane, whole);
        if (live && lane == 0) a.v[OUT].row(place.begin + t, place.head)[c] = o;
        const int32_t slot = place.snapshot(a, t);
        if (live && slot >= 0)
            store_part<LANES>(s, place.column(a, slot, c), dk, lane, whole_state);
    }
    if (live && place.dst >= 0)
        store_part<LANES>(s, place.column(a, place.dst, c), dk, lane, whole_state);
}

// The state that a thread's column starts from: of the slot, or zeros.
template <int LANES>
DEVICE void load_state(float (&s)[PER], const Args& a, const Place& place, int c, int lane) {
    const int dk = a.v[Q].shape[2];
    if (place.src >= 0) {
        load_part<LANES>(s, place.column(a, place.src, c), dk, lane, dk % 4 == 0);
    } else {
#pragma unroll
        for (int i = 0; i < PER; i++) s[i] = 0.0f;
    }
}

}  // namespace gdn::delta
