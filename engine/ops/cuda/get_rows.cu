// GET_ROWS: rows of a float32 table by index.

#include "vectors.cuh"

namespace gdn {

enum { OUT, TABLE, IDS };

template <int V>
DEVICE void copy_columns(const float* from, float* to, int n) {
    for (int i = 0; i < 4 / V; i++) {
        const int c = (blockIdx.y * 4 / V + i) * blockDim.x * V + threadIdx.x * V;
        if (c < n) store<V>(to + c, load<V>(from + c));
    }
}

}  // namespace gdn

// Grid: (rows, columns / (4 · threads)).
KERNEL(get_rows) {
    using namespace gdn;
    const int t = blockIdx.x, n = a.v[OUT].shape[1];
    if (t >= a.rows(a.v[OUT])) return;
    const float* from = a.v[TABLE].row(a.v[IDS].as<int32_t>()[t]);
    if (in_fours(a.v[TABLE]) && in_fours(a.v[OUT]))
        copy_columns<4>(from, a.v[OUT].row(t), n);
    else
        copy_columns<1>(from, a.v[OUT].row(t), n);
}
