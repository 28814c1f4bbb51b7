// MUL_MAT_ID of few tokens: a thread block for each panel and (token, choice), or for each panel
// and token; see row.cuh.

#include "row.cuh"

namespace gdn {

// A launch has at least one live token, so token 0 needs no check.
enum MulMatId { OUT, X = MAX_MATRICES, MATRIX, IDS = MATRIX + MAX_MATRICES, WEIGHTS };
// The most batches of a row that a warp has, bytes of a batch of weights, warps of an expert.
enum MulMatIdAttribute { ROUNDS, SLOT_BYTES, SHARE };

// The matrix and panel of a thread block.
struct ExpertPlace {
    int matrix, panel;

    DEVICE explicit ExpertPlace(const Args& a) : matrix(0), panel(blockIdx.x) {
        bool found = false;
#pragma unroll
        for (int i = 0; i + 1 < MAX_MATRICES; i++) {
            const int n = (a.v[MATRIX + i].shape[1] + PANEL - 1) / PANEL;
            found = found || panel < n;
            if (!found) panel -= n, matrix = i + 1;
        }
    }
};

// A warp's batches of a row, and its slot.
struct PairMemory {
    RowBatch* batches;
    char* slot;
    float* sums;  // Behind those of all warps.

    DEVICE PairMemory(const Args& a, char* shared) {
        const int rounds = static_cast<int>(a.attr[ROUNDS]), n_warps = blockDim.x / 32;
        const int slot_bytes = static_cast<int>(a.attr[SLOT_BYTES]), warp = threadIdx.x / 32;
        char* slots = shared + n_warps * rounds * sizeof(RowBatch);
        batches = reinterpret_cast<RowBatch*>(shared) + warp * rounds;
        slot = slots + warp * slot_bytes;
        sums = reinterpret_cast<float*>(slots + n_warps * slot_bytes);
    }
};

// The part of warp `warp` of n_warps in the products of a pair's panel, to sums [16].
DEVICE void multiply_pair(const Args& a, const ExpertPlace& at, int t, int u, int warp, int n_warps,
                          const PairMemory& memory, float* sums) {
    const View &x = a.v[X], &w = a.v[MATRIX + at.matrix], &ids = a.v[IDS];
    const int64_t expert = ids.as<int32_t>()[t * ids.stride[0] + u * ids.stride[1]];
    const float* row = x.rank == 3 ? x.row(t, u) : x.row(t);
    const int n_in = w.shape[2], n = n_in / K_BLOCK;
    Stream stream(w, at.panel, 1, memory.slot, warp, n_warps);
    stream.panel += expert * w.stride[0];
    if (!is_plain_layout(w.layout)) {
        stream.fetch();
        Row r;
        r.x = row, r.aligned = is_aligned(row);
        r.stage_all(memory.batches, n, warp, n_warps);
    }
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            const auto value = [&](int, int k) { return row[k]; };
            for (int half = 0; half < 2; half++)
                multiply_plain<1>(f, stream.panel, half, value, n_in, warp, n_warps,
                                  sums + half * HALF);
        } else {
            multiply_row(f, stream, memory.batches, n, warp, n_warps, sums);
        }
    });
}

}  // namespace gdn

// Grid: (panels of all matrices, U, T). Dynamic shared memory: for each warp ROUNDS batches, a
// slot, 16 floats.
KERNEL_FOR(mul_mat_id, 2) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    const PairMemory memory(a, shared);
    float* sums = memory.sums;
    const int t = blockIdx.z, u = blockIdx.y, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    if (t > 0 && t >= a.rows(a.v[IDS])) return;
    const ExpertPlace at(a);
    const View& w = a.v[MATRIX + at.matrix];
    multiply_pair(a, at, t, u, warp, n_warps, memory, sums + warp * PANEL);
    __syncthreads();
    const int r = threadIdx.x, column = at.panel * PANEL + r;
    if (r >= PANEL || column >= w.shape[1]) return;
    float value = 0.0f;
    for (int i = 0; i < n_warps; i++) value += sums[i * PANEL + r];
    a.v[OUT + at.matrix].row(t, u)[column] = value;
}

// With the weighted sum over a token's experts. Grid: (panels of all matrices, T). Dynamic shared
// memory: for each warp ROUNDS batches, a slot; U · SHARE · 16 floats.
KERNEL_FOR(mul_mat_id_sum, 2) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    const PairMemory memory(a, shared);
    float* sums = memory.sums;
    const int t = blockIdx.y, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const int share = static_cast<int>(a.attr[SHARE]), n_used = a.v[IDS].shape[1];
    if (t > 0 && t >= a.rows(a.v[IDS])) return;
    const ExpertPlace at(a);
    const View &w = a.v[MATRIX + at.matrix], &weights = a.v[WEIGHTS];
    for (int u = warp / share; u < n_used; u += n_warps / share) {
        sync_warp();  // All lanes have read the batches of the pair before.
        multiply_pair(a, at, t, u, warp % share, share, memory,
                      sums + (u * share + warp % share) * PANEL);
    }
    __syncthreads();
    const int r = threadIdx.x, column = at.panel * PANEL + r;
    if (r >= PANEL || column >= w.shape[1]) return;
    float total = 0.0f;
    for (int u = 0; u < n_used; u++) {
        float value = 0.0f;
        for (int i = 0; i < share; i++) value += sums[(u * share + i) * PANEL + r];
        total += weights.row(t)[u * weights.stride[1]] * value;
    }
    a.v[OUT + at.matrix].row(t)[column] = total;
}
