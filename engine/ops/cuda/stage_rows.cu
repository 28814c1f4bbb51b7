// STAGE_ROWS: rows of an activation, which the same launch may compute from an op's inputs, as
// staged.cuh reads them. A thread block does with a row what a single row's (mul_mat.cu) does.

#include "staged.cuh"

namespace gdn {

// FLOATS, of a norm: its rows, before FACTORS if these are present.
enum { STAGED, HEADS, FACTORS, FLOATS, X, MORE, FACTOR, TOTAL };
enum { SOURCE, EPS, HEAD, K_BLOCKS, REHEARSES };

// Row i of a view [T, in], of heads [T, H, D], or [T, U, in].
DEVICE float* row_at(const View& view, int i, int per_token) {
    if (!view) return nullptr;
    return per_token > 1 ? view.row(i / per_token, i % per_token) : view.row(i);
}

// The sum over a thread block of what each lane has, as a single row's thread block adds it.
DEVICE float sum_squares(float squares, float* shared) {
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < static_cast<int>(blockDim.x / 32); i++) total += shared[i];
    return total;
}

}  // namespace gdn

// Grid: (rows, runs of columns: one where the row is a norm).
REHEARSED_KERNEL(stage_rows, 1, 1) {
    using namespace gdn;
    if (rehearsal && a.attr[REHEARSES] == 0.0f) return;
    if (!rehearsal) wait_for_inputs();
    __shared__ float shared[32];
    const View& x = a.v[X];
    const int source = static_cast<int>(a.attr[SOURCE]), head = static_cast<int>(a.attr[HEAD]);
    const int t = blockIdx.x, per_token = x.rank == 3 && head == 0 ? x.shape[1] : 1;
    if (t >= a.rows(x) * per_token) return;
    const bool is_normed = source == ROW_NORMED, real = rehearsal == 0;
    Row row;
    row.x = row_at(x, t, per_token), row.more = row_at(a.v[MORE], t, per_token);
    row.factor = a.v[FACTOR].as<float>(), row.total = real ? row_at(a.v[TOTAL], t, 1) : nullptr;
    row.source = is_normed ? ROW_NORM : source, row.eps = a.attr[EPS], row.head = head;
    row.find_alignment();
    const int n = static_cast<int>(a.attr[K_BLOCKS]), lane = threadIdx.x % 32;
    const int own_warps = blockDim.x / 32, n_warps = gridDim.y * own_warps;
    const int warp = blockIdx.y * own_warps + threadIdx.x / 32;
    float factor = 1.0f;
    if (is_normed) {
        row.add_squares<true>(n, warp, n_warps);
        const float total = sum_squares(row.squares, shared);
        factor = rsqrt_of(total / static_cast<float>(n * K_BLOCK) + row.eps);
        row.total = nullptr;
    }
    const StagedRow to(a.v[STAGED], a.v[HEADS], t);
    for (int first = warp * BATCH; first < n; first += n_warps * BATCH) {
        const int i = first + lane / 4, k = first * K_BLOCK + 8 * lane;
        Eight values = row.columns<true>(k, i < n);
        if (is_normed)
            for (int j = 0; j < 8; j++) values.v[j] *= factor;
        to.put(values, first, real);
        if (real && a.v[FLOATS] && i < n) store_eight(a.v[FLOATS].row(t) + k, values, true);
    }
    if (source != ROW_NORM) return;
    const float total = sum_squares(row.squares, shared);
    if (real && threadIdx.x == 0)
        a.v[FACTORS].row(t)[0] = rsqrt_of(total / static_cast<float>(n * K_BLOCK) + row.eps);
}
