// MUL_MAT of 1 row (row.cuh), fused with the op that makes it.

#include "product.cuh"
#include "row.cuh"

namespace gdn {

// HEAD: the size of heads; PANELS: of a thread block; ROUNDS: the most batches of the row that a
// warp has; SLOT_BYTES: of the largest batch of weights; SLOTS: of a warp's ring.
enum RowAttribute { SOURCE, EPS, HEAD, PANELS, ROUNDS, SLOT_BYTES, SLOTS, FIRST_BLOCKS };

DEVICE Row row_of(const Args& a) {
    Row row;
    row.x = a.v[X].as<float>(), row.more = a.v[MORE].as<float>();
    row.factor = a.v[FACTOR].as<float>();
    if (blockIdx.x == 0) row.total = a.v[TOTAL].as<float>();
    row.source = static_cast<int>(a.attr[SOURCE]), row.head = static_cast<int>(a.attr[HEAD]);
    row.eps = a.attr[EPS];
    row.find_alignment();
    return row;
}

}  // namespace gdn

// Grid: (groups of PANELS panels of all weights, 1, splits along K: one where the row is a norm).
// Dynamic shared memory: for each warp ROUNDS batches, SLOTS slots, PANELS · 16 + 1 floats.
EAGER_KERNEL_FOR(mul_mat_1, 2) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    const auto attribute = [&](int i) { return static_cast<int>(a.attr[i]); };
    const int panels = attribute(PANELS), width = panels * PANEL;
    const int rounds = attribute(ROUNDS), slot_bytes = attribute(SLOT_BYTES);
    const int n_slots = attribute(SLOTS), ring_bytes = n_slots * slot_bytes;
    const Place at(a, FIRST_BLOCKS, panels);
    const View& w = a.v[WEIGHT + at.weight];
    const int own_warp = warp_index(), own_warps = blockDim.x / 32, n_in = w.shape[1];
    const int warp = blockIdx.z * own_warps + own_warp, n_warps = gridDim.z * own_warps;
    auto* batches = reinterpret_cast<RowBatch*>(shared) + own_warp * rounds;
    char* rings = shared + own_warps * rounds * sizeof(RowBatch);
    float* sums = reinterpret_cast<float*>(rings + own_warps * ring_bytes);
    float *squares = sums + own_warps * width, *own = sums + own_warp * width;
    const int left = n_panels(w) - at.panel, n = n_in / K_BLOCK;
    const PanelRun run{panel_at(w, at.panel), left < panels ? left : panels};
    const Ring ring{rings + own_warp * ring_bytes, slot_bytes, n_slots};
    Stream<false> stream(w, run, {}, ring, warp, n_warps);
    Row row = row_of(a);
    if (!is_plain_layout(w.layout)) {
        stream.start();
        wait_for_inputs();
        row.stage_all(batches, n, warp, n_warps);
    }
    with_format(w.layout, [&](auto f) {
        if constexpr (is_plain(decltype(f){})) {
            wait_for_inputs();
            if (row.source == ROW_NORM) row.add_squares(n, warp, n_warps);
            const auto column = [&](int k) { return row.column(k); };
            multiply_plain<1>(f, run.first, at.half, ComputedRow<decltype(column)>{column}, n_in,
                              warp, n_warps, own, true);
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
    const auto value = [&](int i) {
        float sum = 0.0f;
        for (int k = 0; k < own_warps; k++) sum += sums[k * width + i];
        return sum * factor;
    };
    finish_products<1>(a, at, 0, 0, 1, panels, value, true);
}
