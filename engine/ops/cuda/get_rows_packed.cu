// GET_ROWS of a packed table: rows decoded to float32.

#include "k_block.cuh"

namespace gdn {

// Columns 8 · at … 8 · at + 7 of a panel's row.
template <typename F>
DEVICE void decode_eight(F, const uint8_t* panel, int row, int at, int, float* out) {
    const int i = at / 4, c = at % 4, lane = row % 8 * 4 + c;
    Piece<F> piece;
    uint32_t raw[2] = {};
    piece.load(F::k_block(panel, i), lane);
    Super<F>::fetch(F::super_block(panel, i), lane, raw);
    float v[8];
    decode(piece, Super<F>(raw), c, row / 8, v);
    for (int k = 0; k < 8; k++) out[8 * at + k] = v[k];
}

template <Layout L>
DEVICE void decode_eight(Plain<L>, const uint8_t* panel, int row, int at, int n, float* out) {
    for (int k = 8 * at; k < 8 * at + 8 && k < n; k++) {
        const auto* p = reinterpret_cast<const uint16_t*>(panel);
        if (L == L_F32) out[k] = reinterpret_cast<const float*>(panel)[k * PANEL + row];
        if (L == L_F16) out[k] = half_to_float(p[k * PANEL + row]);
        if (L == L_BF16) out[k] = bf16_to_float(p[(k / 2 * PANEL + row) * 2 + k % 2]);
    }
}

}  // namespace gdn

// Grid: (columns / (8 · threads), rows).
KERNEL(get_rows_packed) {
    using namespace gdn;
    enum { OUT, TABLE, IDS };
    const View &out = a.v[OUT], &table = a.v[TABLE];
    const int i = blockIdx.y, at = blockIdx.x * blockDim.x + threadIdx.x, n = out.shape[1];
    if (i >= a.rows(out) || 8 * at >= n) return;
    const int id = a.v[IDS].as<int32_t>()[i];
    with_format(table.layout, [&](auto f) {
        decode_eight(f, panel_at(table, id / PANEL), id % PANEL, at, n, out.row(i));
    });
}
