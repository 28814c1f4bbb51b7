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

// The weight and the first of `panels` panels of a thread block; of a plain weight, half a panel and one
// of `n_groups` groups of rows.
struct Place {
    int weight, panel, half, n_rows, group;

    // From attribute `first` on: the first thread blocks of weights 1, 2, ….
    DEVICE Place(const Args& a, int first, int panels = 1, int n_groups = 1) : weight(0) {
        const auto block = static_cast<float>(blockIdx.x);
        float begin = 0.0f;
#pragma unroll
        for (int i = 0; i + 1 < MAX_WEIGHTS; i++)
            if (block >= a.attr[first + i]) begin = a.attr[first + i], weight = i + 1;
        const int own = static_cast<int>(block - begin);
        const bool is_plain = is_plain_layout(a.v[WEIGHT + weight].layout);
        half = is_plain ? own % 2 : 0, group = is_plain ? own / 2 % n_groups : 0;
        n_rows = is_plain ? HALF : panels * PANEL;
        panel = is_plain ? own / 2 / n_groups : own * panels;
    }
};

// A token's results of its experts, weighted, in the router's order.
DEVICE float sum_of_experts(const View& results, const View& shares, int t, int column) {
    constexpr int AT_ONCE = 8;
    const int n = results.shape[1];
    float total = 0.0f;
#pragma unroll 1
    for (int first = 0; first < n; first += AT_ONCE) {
        float share[AT_ONCE], result[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int u = first + i < n ? first + i : n - 1;
            share[i] = load_published(shares.row(t) + u * shares.stride[1]);
            result[i] = load_published(results.row(t, u) + column);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i < n) total = fmaf(share[i], result[i], total);
    }
    return total;
}

// Stores rows begin … n - 1 ≤ ROWS of the block's products, if these are `real`: `value(i)` is number i
// of [panels, ROWS, 16].
template <int ROWS, typename Value>
DEVICE void store_products(const Args& a, const Place& at, int first, int begin, int n, int panels,
                           Value value, bool real) {
    const int n_out = a.v[WEIGHT + at.weight].shape[0];
    for (int i = threadIdx.x; i < panels * ROWS * PANEL; i += blockDim.x) {
        const int row = i / PANEL % ROWS, own = i / PANEL / ROWS * PANEL + i % PANEL;
        const int t = first + row, column = at.panel * PANEL + at.half * HALF + own;
        if (row < begin || row >= n || column >= n_out || own >= at.n_rows) continue;
        const float gate = a.v[GATE] ? load_published(a.v[GATE].row(t)) : 0.0f;
        float more = 0.0f;
        if (a.v[SHARES])
            more = sum_of_experts(a.v[ADD], a.v[SHARES], t, column);
        else if (a.v[ADD])
            more = load_published(a.v[ADD].row(t) + column);
        float y = value(i);
        if (a.v[GATE]) y *= sigmoid(gate);
        if (a.v[ADD]) y += more;
        if (real) a.v[OUT + at.weight].row(t)[column] = y;
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
DEVICE void finish_products(const Args& a, const Place& at, int first, int begin, int n, int panels,
                            Value value, bool real) {
    const int room = panels * ROWS * PANEL;
    if (gridDim.z == 1 || !real) {
        store_products<ROWS>(a, at, first, begin, n, panels, value, real);
    } else if (leave_sums(a, room, value)) {
        const float* all = a.v[PARTIAL].as<float>() + blockIdx.x * gridDim.z * room;
        const auto total = [&](int i) {
            float sum = 0.0f;
            for (unsigned z = 0; z < gridDim.z; z++) sum += load_published(all + z * room + i);
            return sum;
        };
        store_products<ROWS>(a, at, first, begin, n, panels, total, true);
    }
}

// Row t, or the last row of the capacity.
DEVICE const float* row_of(const View& x, int t) {
    return x.row(t < x.shape[0] ? t : x.shape[0] - 1);
}

// Rows of float32 times plain weights. Grid: (half panels of all weights, rows / R). The warps of a
// thread block share its columns. Dynamic shared memory: warps · R · (PLAIN_COLUMNS + PANEL) floats.
template <int R>
DEVICE void mul_mat_floats(const Args& a, char* shared) {
    constexpr int PER_WARP = R * PANEL, BUFFER_BYTES = R * PLAIN_COLUMNS * 4;
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
    const auto row_at = [&](int i) { return row_of(x, first + i); };
    char* const buffer = shared + warp * BUFFER_BYTES;
    const auto rows = rows_of_floats<R>(buffer, are_rows_aligned(x), row_at);
    auto* sums = reinterpret_cast<float*>(shared + n_warps * BUFFER_BYTES);
    with_plain(w.layout, [&](auto f) {
        multiply_plain<R>(f, panel_at(w, at.panel), at.half, rows, x.shape[1], warp, n_warps,
                          sums + warp * PER_WARP, true);
    });
    wait_for_inputs();  // For warps without columns.
    __syncthreads();
    const int n = n_rows - first < R ? n_rows - first : R;
    const auto total = [&](int i) {
        float value = 0.0f;
        for (int w = 0; w < n_warps; w++) value += sums[w * PER_WARP + i];
        return value;
    };
    store_products<R>(a, at, first, 0, n, 1, total, true);
}

}  // namespace gdn
