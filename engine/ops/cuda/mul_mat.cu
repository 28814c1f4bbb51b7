// MUL_MAT of 1 row (row.cuh), fused with the op that makes it, or of 2 rows (product.cuh).

#include "product.cuh"
#include "row.cuh"

namespace gdn {

// In the place of the views of quantized rows, which a single row does not have.
enum RowViews { MORE = Q, FACTOR = SCALE, TOTAL = SUM };
// HEAD: the size of heads; PANELS: of a thread block; ROUNDS: the most batches of the row that a
// warp has; SLOT_BYTES: of the largest batch of weights.
enum RowAttribute { SOURCE, EPS, HEAD, PANELS, ROUNDS, SLOT_BYTES };

DEVICE Row row_of(const Args& a) {
    Row row;
    row.x = a.v[X].as<float>(), row.more = a.v[MORE].as<float>();
    row.factor = a.v[FACTOR].as<float>();
    if (blockIdx.x == 0) row.total = a.v[TOTAL].as<float>();
    row.source = static_cast<int>(a.attr[SOURCE]), row.head = static_cast<int>(a.attr[HEAD]);
    row.eps = a.attr[EPS];
    row.aligned = is_aligned(row.x) && is_aligned(row.more) && is_aligned(row.factor) &&
                  is_aligned(row.total);
    return row;
}

}  // namespace gdn

// Grid: (groups of PANELS panels of all weights, 1, splits along K: one where the row is a norm).
// Dynamic shared memory: for each warp ROUNDS batches, a slot, PANELS · 16 + 1 floats.
EAGER_KERNEL_FOR(mul_mat_1, 2) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    const auto attribute = [&](int i) { return static_cast<int>(a.attr[i]); };
    const int panels = attribute(PANELS), width = panels * PANEL;
    const int rounds = attribute(ROUNDS), slot_bytes = attribute(SLOT_BYTES);
    const Place at(a, panels);
    const View& w = a.v[WEIGHT + at.weight];
    const int own_warp = threadIdx.x / 32, own_warps = blockDim.x / 32, n_in = w.shape[1];
    const int warp = blockIdx.z * own_warps + own_warp, n_warps = gridDim.z * own_warps;
    auto* batches = reinterpret_cast<RowBatch*>(shared) + own_warp * rounds;
    char* slots = shared + own_warps * rounds * sizeof(RowBatch);
    float* sums = reinterpret_cast<float*>(slots + own_warps * slot_bytes);
    float *squares = sums + own_warps * width, *own = sums + own_warp * width;
    const int left = n_panels(w) - at.panel, n = n_in / K_BLOCK;
    Stream stream(w, at.panel, left < panels ? left : panels, slots + own_warp * slot_bytes, warp,
                  n_warps);
    Row row = row_of(a);
    if (!is_plain_layout(w.layout)) {
        stream.fetch();
        wait_for_inputs();
        row.stage_all(batches, n, warp, n_warps);
    }
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            const bool counts = threadIdx.x % 2 == 0;  // Two lanes have the same columns.
            const auto value = [&](int, int k) { return row.column(k, counts); };
            multiply_plain<1>(f, stream.panel, at.half, value, n_in, warp, n_warps, own);
        } else {
            multiply_row(f, stream, batches, n, warp, n_warps, own);
        }
    });
    wait_for_inputs();  // For warps without columns.
    const float own_squares = warp_sum(row.squares);
    if (threadIdx.x % 32 == 0) squares[own_warp] = own_squares;
    __syncthreads();
    float factor = 1.0f;
    if (row.source == ROW_NORM) {
        float total = 0.0f;
        for (int i = 0; i < own_warps; i++) total += squares[i];
        factor = rsqrt_of(total / static_cast<float>(n_in) + row.eps);
    }
    finish_products(a, at, 0, 1, width, width, [&](int i) {
        float value = 0.0f;
        for (int k = 0; k < own_warps; k++) value += sums[k * width + i];
        return value * factor;
    });
}

EAGER_KERNEL_FOR(mul_mat_2, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<2>(a, reinterpret_cast<float*>(sums));
}
