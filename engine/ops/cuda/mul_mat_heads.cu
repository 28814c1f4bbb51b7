// MUL_MAT_HEADS: each head's rows times a float32 matrix of its own.
//
// Both kernels add the products of 32 inputs in order, then those sums in order: a row's results
// are the same, bit for bit, for any number of rows.

#include "vectors.cuh"

namespace gdn {

// Attribute: whether the matrix is [in, out] instead of [out, in].
enum { OUT, X, WEIGHT, TAIL };

// Rows and outputs of a thread's part of a tile.
constexpr int ROWS_EACH = 8, OUT_EACH = 4;
static_assert(HEADS_TILE_ROWS * HEADS_TILE_OUTPUTS == 32 * THREADS_mul_mat_heads_tiles, "");

// Four floats of which n are there (others are zeros), `fours`: in one load if all are.
DEVICE Floats<4> load_part(const float* p, int n, bool fours) {
    if (fours && n >= 4) return load<4>(p);
    Floats<4> x;
    for (int i = 0; i < 4; i++) x.v[i] = i < n ? p[i] : 0.0f;
    return x;
}

// Copies the columns of rows [begin, end) that are not multiplied.
DEVICE void copy_tail(const Args& a, int h, int begin, int end, int n_out) {
    const View& tail = a.v[TAIL];
    if (!tail) return;
    const int size = tail.shape[2], n = (end - begin) * size;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const int t = begin + i / size, c = i % size;
        a.v[OUT].row(t, h)[n_out + c] = tail.row(t, h)[c];
    }
}

// A chunk of inputs from `first` of output o's weights.
DEVICE void load_weights(float (&w)[HEADS_INPUTS], const View& weight, int h, int o, int first,
                         int n_in, bool transposed) {
    if (transposed) {
#pragma unroll
        for (int i = 0; i < HEADS_INPUTS; i++)
            w[i] = first + i < n_in ? weight.row(h, first + i)[o] : 0.0f;
        return;
    }
    const float* row = weight.row(h, o) + first;
    const bool fours = in_fours(weight);
#pragma unroll
    for (int i = 0; i < HEADS_INPUTS; i += 4) {
        const Floats<4> part = load_part(row + i, n_in - first - i, fours);
        for (int j = 0; j < 4; j++) w[i + j] = part.v[j];
    }
}

}  // namespace gdn

// For few rows: a lane has an output, a warp takes every fourth chunk of inputs.
// Grid: (outputs / 32, heads, rows / HEADS_FEW_ROWS). Shared: [chunks, HEADS_FEW_ROWS, 32] floats.
KERNEL(mul_mat_heads_rows) {
    using namespace gdn;
    DYNAMIC_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const View &x = a.v[X], &weight = a.v[WEIGHT];
    const bool transposed = a.attr[0] != 0.0f;
    const int h = blockIdx.y, begin = blockIdx.z * HEADS_FEW_ROWS, n_rows = a.rows(x);
    if (begin >= n_rows) return;
    const int end = begin + HEADS_FEW_ROWS < n_rows ? begin + HEADS_FEW_ROWS : n_rows;
    const int n_in = x.shape[2], n_out = weight.shape[transposed ? 2 : 1];
    const int n_chunks = (n_in + HEADS_INPUTS - 1) / HEADS_INPUTS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, o = blockIdx.x * 32 + lane;
    const bool fours = in_fours(x);
    for (int chunk = warp; chunk < n_chunks; chunk += 4) {
        const int first = chunk * HEADS_INPUTS;
        float w[HEADS_INPUTS];
        if (o < n_out) load_weights(w, weight, h, o, first, n_in, transposed);
        for (int t = begin; t < end && o < n_out; t++) {
            const float* row = x.row(t, h) + first;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < HEADS_INPUTS; i += 4) {
                const Floats<4> part = load_part(row + i, n_in - first - i, fours);
                for (int j = 0; j < 4; j++) sum = fmaf(w[i + j], part.v[j], sum);
            }
            sums[(chunk * HEADS_FEW_ROWS + t - begin) * 32 + lane] = sum;
        }
    }
    __syncthreads();
    for (int t = begin + warp; t < end && o < n_out; t += 4) {
        float total = 0.0f;
        for (int chunk = 0; chunk < n_chunks; chunk++)
            total += sums[(chunk * HEADS_FEW_ROWS + t - begin) * 32 + lane];
        a.v[OUT].row(t, h)[o] = total;
    }
    if (blockIdx.x == 0) copy_tail(a, h, begin, end, n_out);
}

namespace gdn {

// A chunk of inputs of a tile's rows and weights, by inputs.
struct Tiles {
    alignas(16) float x[HEADS_INPUTS][HEADS_TILE_ROWS + 4], w[HEADS_INPUTS][HEADS_TILE_OUTPUTS + 4];
};

DEVICE void load_tiles(Tiles& tiles, const Args& a, int h, int begin, int end, int o, int first) {
    const View &x = a.v[X], &weight = a.v[WEIGHT];
    const bool transposed = a.attr[0] != 0.0f, x_fours = in_fours(x), w_fours = in_fours(weight);
    const int left = x.shape[2] - first, n_out = weight.shape[transposed ? 2 : 1];
    for (int i = threadIdx.x; i < HEADS_TILE_ROWS * HEADS_INPUTS / 4; i += blockDim.x) {
        const int r = i / (HEADS_INPUTS / 4), k = i % (HEADS_INPUTS / 4) * 4;
        const int n = begin + r < end ? left - k : 0;
        const Floats<4> part =
            load_part(n > 0 ? x.row(begin + r, h) + first + k : nullptr, n, x_fours);
        for (int j = 0; j < 4; j++) tiles.x[k + j][r] = part.v[j];
    }
    for (int i = threadIdx.x; i < HEADS_TILE_OUTPUTS * HEADS_INPUTS / 4; i += blockDim.x) {
        if (transposed) {
            const int k = i / (HEADS_TILE_OUTPUTS / 4), c = i % (HEADS_TILE_OUTPUTS / 4) * 4;
            const int n = k < left ? n_out - o - c : 0;
            const float* p = n > 0 ? weight.row(h, first + k) + o + c : nullptr;
            store<4>(&tiles.w[k][c], load_part(p, n, w_fours));
        } else {
            const int c = i / (HEADS_INPUTS / 4), k = i % (HEADS_INPUTS / 4) * 4;
            const int n = o + c < n_out ? left - k : 0;
            const float* p = n > 0 ? weight.row(h, o + c) + first + k : nullptr;
            const Floats<4> part = load_part(p, n, w_fours);
            for (int j = 0; j < 4; j++) tiles.w[k + j][c] = part.v[j];
        }
    }
}

// A thread's 8 × 4 sums of one chunk.
DEVICE void multiply(float (&sum)[ROWS_EACH][OUT_EACH], const Tiles& tiles, int r, int c) {
#pragma unroll
    for (int i = 0; i < ROWS_EACH; i++)
        for (int j = 0; j < OUT_EACH; j++) sum[i][j] = 0.0f;
#pragma unroll 4
    for (int k = 0; k < HEADS_INPUTS; k++) {
        const Floats<4> w = load<4>(&tiles.w[k][c]);
#pragma unroll
        for (int half = 0; half < ROWS_EACH; half += 4) {
            const Floats<4> x = load<4>(&tiles.x[k][r + half]);
#pragma unroll
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < OUT_EACH; j++)
                    sum[half + i][j] = fmaf(w.v[j], x.v[i], sum[half + i][j]);
        }
    }
}

}  // namespace gdn

// For many rows. Grid: (rows / HEADS_TILE_ROWS, heads, outputs / HEADS_TILE_OUTPUTS).
KERNEL(mul_mat_heads_tiles) {
    using namespace gdn;
    __shared__ Tiles tiles;
    const View& weight = a.v[WEIGHT];
    const int n_out = weight.shape[a.attr[0] != 0.0f ? 2 : 1], n_in = a.v[X].shape[2];
    const int h = blockIdx.y, begin = blockIdx.x * HEADS_TILE_ROWS, n_rows = a.rows(a.v[X]);
    if (begin >= n_rows) return;
    const int end = begin + HEADS_TILE_ROWS < n_rows ? begin + HEADS_TILE_ROWS : n_rows;
    const int o = blockIdx.z * HEADS_TILE_OUTPUTS;
    const int r = threadIdx.x / (HEADS_TILE_OUTPUTS / OUT_EACH) * ROWS_EACH;
    const int c = threadIdx.x % (HEADS_TILE_OUTPUTS / OUT_EACH) * OUT_EACH;
    float total[ROWS_EACH][OUT_EACH] = {};
    for (int first = 0; first < n_in; first += HEADS_INPUTS) {
        __syncthreads();
        load_tiles(tiles, a, h, begin, end, o, first);
        __syncthreads();
        float sum[ROWS_EACH][OUT_EACH];
        multiply(sum, tiles, r, c);
#pragma unroll
        for (int i = 0; i < ROWS_EACH; i++)
            for (int j = 0; j < OUT_EACH; j++) total[i][j] += sum[i][j];
    }
#pragma unroll
    for (int i = 0; i < ROWS_EACH; i++)
        for (int j = 0; j < OUT_EACH; j++)
            if (begin + r + i < end && o + c + j < n_out)
                a.v[OUT].row(begin + r + i, h)[o + c + j] = total[i][j];
    if (blockIdx.z == 0) copy_tail(a, h, begin, end, n_out);
}
