// What MUL_MAT's kernels share: all weights of a node are one launch.
#pragma once

#include "mul_mat.cuh"

namespace gdn {

// There are MAX_WEIGHTS outputs and as many weights. A single row's launch may have inputs of the op
// that makes it: MORE, FACTOR and TOTAL (row.cuh). Several rows are STAGED and HEADS (staged.cuh),
// with FACTORS that their products are multiplied by, and FLOATS in place of X for plain weights.
// PARTIAL and COUNTERS are present where a panel is split along K among several thread blocks. With
// SHARES, ADD are the results [T, U, out] of a token's experts, to be weighted by them.
enum MulMat {
    OUT,
    X = MAX_WEIGHTS,
    MORE,
    FACTOR,
    TOTAL,
    STAGED = MORE,
    HEADS,
    FACTORS,
    WEIGHT,
    GATE = WEIGHT + MAX_WEIGHTS,
    ADD,
    PARTIAL,
    COUNTERS,
    SHARES,
    FLOATS
};

// The weight and the first of `panels` panels of a thread block; of a plain weight, half a panel.
struct Place {
    int weight, panel, half, n_rows;

    // From attribute `first` on: the first thread blocks of weights 1, 2, ….
    DEVICE Place(const Args& a, int first, int panels = 1) : weight(0) {
        const auto block = static_cast<float>(blockIdx.x);
        float begin = 0.0f;
#pragma unroll
        for (int i = 0; i + 1 < MAX_WEIGHTS; i++)
            if (block >= a.attr[first + i]) begin = a.attr[first + i], weight = i + 1;
        panel = static_cast<int>(block - begin);
        const bool is_plain = is_plain_layout(a.v[WEIGHT + weight].layout);
        half = is_plain ? panel % 2 : 0;
        n_rows = is_plain ? HALF : panels * PANEL;
        panel = is_plain ? panel / 2 : panel * panels;
    }
};

// A token's results of its experts, weighted, in the router's order.
DEVICE float sum_of_experts(const View& results, const View& shares, int t, int column) {
    float total = 0.0f;
    for (int u = 0; u < results.shape[1]; u++)
        total = fmaf(shares.row(t)[u * shares.stride[1]], results.row(t, u)[column], total);
    return total;
}

// Stores n ≤ ROWS rows of the block's products: `value(i)` is number i of [panels, ROWS, 16].
template <int ROWS, typename Value>
DEVICE void store_products(const Args& a, const Place& at, int first, int n, int panels,
                           Value value) {
    const int n_out = a.v[WEIGHT + at.weight].shape[0];
    for (int i = threadIdx.x; i < panels * ROWS * PANEL; i += blockDim.x) {
        const int row = i / PANEL % ROWS, own = i / PANEL / ROWS * PANEL + i % PANEL;
        const int t = first + row, column = at.panel * PANEL + at.half * HALF + own;
        if (row >= n || column >= n_out || own >= at.n_rows) continue;
        float y = value(i);
        if (a.v[GATE]) y *= sigmoid(a.v[GATE].row(t)[0]);
        if (a.v[SHARES])
            y += sum_of_experts(a.v[ADD], a.v[SHARES], t, column);
        else if (a.v[ADD])
            y += a.v[ADD].row(t)[column];
        a.v[OUT + at.weight].row(t)[column] = y;
    }
}

// Writes a thread block's sums, `value(i)` for i < n, to PARTIAL. Returns true in the last of the
// panel's thread blocks to arrive, which also resets the counter.
template <typename Value>
DEVICE bool leave_sums(const Args& a, int n, Value value) {
    float* own = a.v[PARTIAL].as<float>() + (blockIdx.x * gridDim.z + blockIdx.z) * n;
    int32_t* counter = a.v[COUNTERS].as<int32_t>() + blockIdx.x;
    __shared__ int32_t n_before;
    for (int i = threadIdx.x; i < n; i += blockDim.x) own[i] = value(i);
    publish();
    __syncthreads();
    if (threadIdx.x == 0) n_before = add_atomic(counter, 1);
    __syncthreads();
    const bool is_last = n_before == static_cast<int32_t>(gridDim.z) - 1;
    if (is_last && threadIdx.x == 0) *counter = 0;
    return is_last;
}

// Stores the products of a thread block, whose sums are `value(i)` for i of [panels, ROWS, 16]. Where
// K is split, the last thread block adds the sums of all in their order.
template <int ROWS, typename Value>
DEVICE void finish_products(const Args& a, const Place& at, int first, int n, int panels,
                            Value value) {
    const int room = panels * ROWS * PANEL;
    if (gridDim.z == 1) {
        store_products<ROWS>(a, at, first, n, panels, value);
    } else if (leave_sums(a, room, value)) {
        const float* all = a.v[PARTIAL].as<float>() + blockIdx.x * gridDim.z * room;
        store_products<ROWS>(a, at, first, n, panels, [&](int i) {
            float total = 0.0f;
            for (unsigned z = 0; z < gridDim.z; z++) total += load_published(all + z * room + i);
            return total;
        });
    }
}

// Row t, or the last row of the capacity.
DEVICE const float* row_of(const View& x, int t) {
    return x.row(t < x.shape[0] ? t : x.shape[0] - 1);
}

// Rows of float32 times plain weights. Grid: (half panels of all weights, rows / R). The warps of a
// thread block share its columns. Dynamic shared memory: warps · R · PANEL floats.
template <int R>
DEVICE void mul_mat_floats(const Args& a, float* sums) {
    constexpr int PER_WARP = R * PANEL;
    const View& x = a.v[X];
    // Weights are fetched before the number of live rows is known. Rows past the live ones are
    // multiplied as they are, and not stored.
    const int n_rows = a.rows(x), first = blockIdx.y * R;
    if (first > 0 && first >= n_rows) {
        wait_for_inputs();
        return;
    }
    const Place at(a, 0);
    const View& w = a.v[WEIGHT + at.weight];
    const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const float* rows[R];
    for (int i = 0; i < R; i++) rows[i] = row_of(x, first + i);
    with_plain(w.layout, [&](auto f) {
        const auto value = [&](int i, int k) { return rows[i][k]; };
        multiply_plain<R>(f, panel_at(w, at.panel), at.half, value, x.shape[1], warp, n_warps,
                          sums + warp * PER_WARP);
    });
    wait_for_inputs();  // For warps without columns.
    __syncthreads();
    const int n = n_rows - first < R ? n_rows - first : R;
    store_products<R>(a, at, first, n, 1, [&](int i) {
        float value = 0.0f;
        for (int w = 0; w < n_warps; w++) value += sums[w * PER_WARP + i];
        return value;
    });
}

}  // namespace gdn
