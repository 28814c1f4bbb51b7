// MUL_MAT's kernels: all weights of a node in one launch.
#pragma once

#include "mul_mat.cuh"

namespace gdn {

// There are MAX_WEIGHTS outputs and as many weights. Q, SCALE and SUM (quantize.cuh) are absent
// where thread blocks quantize rows themselves. PARTIAL and COUNTERS are present where a panel is
// split along K among several thread blocks.
enum MulMat {
    OUT,
    X = MAX_WEIGHTS,
    Q,
    SCALE,
    SUM,
    WEIGHT,
    GATE = WEIGHT + MAX_WEIGHTS,
    ADD,
    PARTIAL,
    COUNTERS
};

// The weight and the first of `panels` panels of a thread block; of a plain weight, half a panel.
struct Place {
    int weight, panel, half, n_rows;

    DEVICE explicit Place(const Args& a, int panels = 1) : weight(0), panel(blockIdx.x) {
        const float inverse = reciprocal_of(static_cast<float>(panels));
        bool found = false;
#pragma unroll
        for (int i = 0; i + 1 < MAX_WEIGHTS; i++) {
            const int n = n_blocks(a.v[WEIGHT + i], panels, inverse);
            found = found || panel < n;
            if (!found) panel -= n, weight = i + 1;
        }
        const bool is_plain = is_plain_layout(a.v[WEIGHT + weight].layout);
        half = is_plain ? panel % 2 : 0;
        n_rows = is_plain ? HALF : panels * PANEL;
        panel = is_plain ? panel / 2 : panel * panels;
    }

    DEVICE static int n_blocks(const View& w, int panels, float inverse) {
        const int n = (w.shape[0] + PANEL - 1) / PANEL;
        if (is_plain_layout(w.layout)) return 2 * n;
        // (n + panels - 1) / panels without a slow division: no quotient is near an integer.
        return static_cast<int>((static_cast<float>(n + panels) - 0.5f) * inverse);
    }
};

// Stores n rows of the block's products: `value(i)` is number i of [n, width].
template <typename Value>
DEVICE void store_products(const Args& a, const Place& at, int first, int n, int width,
                           Value value) {
    const int n_out = a.v[WEIGHT + at.weight].shape[0];
    for (int i = threadIdx.x; i < n * width; i += blockDim.x) {
        const int t = first + i / width, column = at.panel * PANEL + at.half * HALF + i % width;
        if (column >= n_out || i % width >= at.n_rows) continue;
        float y = value(i);
        if (a.v[GATE]) y *= sigmoid(a.v[GATE].row(t)[0]);
        if (a.v[ADD]) y += a.v[ADD].row(t)[column];
        a.v[OUT + at.weight].row(t)[column] = y;
    }
}

// Writes a thread block's sums, `value(i)` for i < n, to PARTIAL. Returns true in the last of the
// panel's thread blocks to arrive, which also resets the counter. `room`: sums of a thread block.
template <typename Value>
DEVICE bool leave_sums(const Args& a, int room, int n, Value value) {
    float* own = a.v[PARTIAL].as<float>() + (blockIdx.x * gridDim.z + blockIdx.z) * room;
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

// Stores the products of a thread block, whose sums are `value(i)` for i of [n, width]. Where K is
// split, the last thread block adds the sums of all in their order. `room`: sums of a thread block.
template <typename Value>
DEVICE void finish_products(const Args& a, const Place& at, int first, int n, int width, int room,
                            Value value) {
    if (gridDim.z == 1) {
        store_products(a, at, first, n, width, value);
    } else if (leave_sums(a, room, n * width, value)) {
        const float* all = a.v[PARTIAL].as<float>() + blockIdx.x * gridDim.z * room;
        store_products(a, at, first, n, width, [&](int i) {
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

// Grid: (panels of all weights, rows / ROWS_OF_X, splits along K; with several splits there are at
// most ROWS_OF_X rows). The warps of a thread block share its columns. Dynamic shared memory: warps
// · ROWS_OF_X · PANEL floats.
template <typename Rows, typename MakeRows>
DEVICE void mul_mat(const Args& a, float* sums, MakeRows make_rows) {
    constexpr int N = Rows::ROWS_OF_X, PER_WARP = N * PANEL, AT_ONCE = N < 8 ? N : 8;
    const View& x = a.v[X];
    // Weights are fetched before the number of live rows is known. Rows past the live ones are
    // multiplied as they are, and not stored.
    const int n_rows = a.rows(x), first = blockIdx.y * N, n_in = x.shape[1];
    if (first > 0 && first >= n_rows) {
        wait_for_inputs();
        return;
    }
    const Place at(a);
    const View& w = a.v[WEIGHT + at.weight];
    const uint8_t* panel = panel_at(w, at.panel);
    const int own_warp = threadIdx.x / 32, own_warps = blockDim.x / 32;
    const int warp = blockIdx.z * own_warps + own_warp, n_warps = gridDim.z * own_warps;
    float* own = sums + own_warp * PER_WARP;
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            for (int t = 0; t < N; t += AT_ONCE) {
                if (t > 0 && first + t >= n_rows) break;
                const float* rows[AT_ONCE];
                for (int i = 0; i < AT_ONCE; i++) rows[i] = row_of(x, first + t + i);
                const auto value = [&](int i, int k) { return rows[i][k]; };
                multiply_plain<AT_ONCE>(f, panel, at.half, value, n_in, warp, n_warps,
                                        own + t * PANEL);
            }
        } else {
            auto rows = make_rows(first);
            multiply_panel(f, panel, rows, warp, n_warps, own);
        }
    });
    wait_for_inputs();  // For warps without columns.
    __syncthreads();
    const int n = n_rows - first < N ? n_rows - first : N;
    finish_products(a, at, first, n, PANEL, PER_WARP, [&](int i) {
        float value = 0.0f;
        for (int w = 0; w < own_warps; w++) value += sums[w * PER_WARP + i];
        return value;
    });
}

template <int R>
DEVICE void mul_mat_floats(const Args& a, float* sums) {
    mul_mat<FloatRows<R>>(a, sums, [&](int first) {
        const View& x = a.v[X];
        const auto row_at = [&](int i) { return row_of(x, first + i); };
        return FloatRows<R>(row_at, x.shape[1] / K_BLOCK, is_aligned(x));
    });
}

template <int N>
DEVICE void mul_mat_quantized(const Args& a, float* sums) {
    mul_mat<QuantizedRows<N>>(a, sums, [&](int first) {
        return QuantizedRows<N>(a, Q, first, a.v[X].shape[0], a.v[X].shape[1] / K_BLOCK);
    });
}

}  // namespace gdn
