// ROUND_ROWS: the rows of row tiles as bfloat16, for products of tiles.

#include "kernels.h"
#include "matrix.h"

namespace gdn {
namespace {

// Attribute: whether rows are put into A tiles, each of 16 rows of the step's list of tiled rows;
// else a row stays where it is in x, [T, in] or [T, U, in].
enum { OUT, X };

int64_t per_token(const Args& a) { return a.v[X].rank == 3 ? a.v[X].shape[1] : 1; }

void round_row(const float* x, int64_t n, bf16* to, int64_t step) {
    for (int64_t k = 0; k < n; k += DEPTH, to += step)
        for (int c = 0; c < DEPTH; c += W) store_bf16(to + c, load(x + k + c), W);
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View& x = a.v[X];
    const int64_t n_in = x.shape[x.rank - 1], n_u = per_token(a);
    auto* out = a.v[OUT].as<bf16>();
    for (int64_t i = begin; i < end; i++) {
        const int64_t t = a.step->tiled[i / n_u], u = i % n_u;
        const float* row = x.row(t) + (x.rank == 3 ? u * x.stride[1] : 0);
        if (a.attr[0] != 0)
            round_row(row, n_in, out + i / SIDE * SIDE * n_in + i % SIDE * DEPTH, TILE_SIZE);
        else
            round_row(row, n_in, out + (t * n_u + u) * n_in, DEPTH);
    }
}

}  // namespace

const Kernel round_rows = {"ROUND_ROWS",
                           [](const Args& a) { return a.step->n_tiled * per_token(a); }, run};

}  // namespace gdn
