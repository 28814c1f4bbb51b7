// QUANTIZE_ROWS: an activation as int8 for products with many rows; see quantize.cuh.

#include "quantize.cuh"

// Grid: (k-blocks / 8, rows / 8); a warp for each k-block of 8 rows. Rows past the live ones become
// zeros.
KERNEL(quantize_rows) {
    using namespace gdn;
    enum { Q, SCALE, SUM, X };
    const View& x = a.v[X];
    const int n_k_blocks = x.shape[1] / K_BLOCK, n_rows = a.rows(x);
    const int k_block = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, c = lane % 4, row = blockIdx.y * 8 + g;
    if (blockIdx.y * 8 >= n_rows) return;
    const bool valid = k_block < n_k_blocks && row < n_rows;
    Eight v{};
    if (valid) v = load_eight(x.row(row) + k_block * K_BLOCK + 8 * c, is_aligned(x));
    const Quantized q = quantize(v);
    if (k_block >= n_k_blocks) return;
    const int64_t at = static_cast<int64_t>(blockIdx.y) * n_k_blocks + k_block;
    a.v[Q].as<Words2>()[at * 32 + lane] = {{q.q[0], q.q[1]}};
    if (c == 0) a.v[SCALE].as<float>()[at * 8 + g] = q.scale;
    if (c % 2 == 0) a.v[SUM].as<int32_t>()[at * 16 + c / 2 * 8 + g] = q.sum;
}
