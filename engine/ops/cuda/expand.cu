// EXPAND: a packed weight as a bfloat16 matrix [out, in], for products of many rows.

#include "k_block.cuh"

namespace gdn {

// Columns 8c … 8c+7 of rows g and g + 8 of k-block i, to a matrix whose row 0 is the panel's first.
template <typename F>
DEVICE void expand_k_block(F, const uint8_t* panel, int i, int n_rows, int n_in, uint16_t* out) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    Piece<F> piece;
    uint32_t raw[2] = {};
    piece.load(F::k_block(panel, i), lane);
    Super<F>::fetch(F::super_block(panel, i), lane, raw);
    const Super<F> super(raw);
    for (int j = 0; j < 2; j++) {
        float v[8];
        decode(piece, super, c, j, v);
        Words4 packed;
        for (int k = 0; k < 4; k++) packed.w[k] = pack_bf16(v[2 * k], v[2 * k + 1]);
        const int64_t row = g + 8 * j;
        auto* to = reinterpret_cast<Words4*>(out + row * n_in + i * K_BLOCK + 8 * c);
        if (row < n_rows) *to = packed;
    }
}

template <Layout L>
DEVICE void expand_k_block(Plain<L>, const uint8_t* panel, int i, int n_rows, int n_in,
                           uint16_t* out) {
    const int lane = threadIdx.x % 32, k = i * K_BLOCK + lane;
    if (k >= n_in) return;
    for (int row = 0; row < n_rows; row++) {
        uint16_t* to = out + static_cast<int64_t>(row) * n_in + k;
        if (L == L_F32) *to = float_to_bf16(reinterpret_cast<const float*>(panel)[k * PANEL + row]);
        const auto* at = reinterpret_cast<const uint16_t*>(panel);
        if (L == L_F16) *to = float_to_bf16(half_to_float(at[k * PANEL + row]));
        if (L == L_BF16) *to = at[(k / 2 * PANEL + row) * 2 + k % 2];
    }
}

}  // namespace gdn

// Grid: (k-blocks / 8, panels); a warp for each k-block.
KERNEL(expand) {
    using namespace gdn;
    enum { OUT, WEIGHT };
    const View& w = a.v[WEIGHT];
    const int n_in = w.shape[1], i = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * PANEL;
    if (i * K_BLOCK >= n_in) return;
    const int n_rows = w.shape[0] - first < PANEL ? w.shape[0] - first : PANEL;
    uint16_t* out = a.v[OUT].as<uint16_t>() + static_cast<int64_t>(first) * n_in;
    with_format(w.layout,
                [&](auto f) { expand_k_block(f, panel_at(w, blockIdx.y), i, n_rows, n_in, out); });
}
