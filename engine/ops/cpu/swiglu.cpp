// SWIGLU: silu(gate) · up, each clamped where the pair has a limit, a task for each block of columns of a row.

#include "kernels.h"

namespace gdn {
namespace {

// Attribute: limit, 0 for none.
enum { OUT, GATE, UP };

constexpr int64_t BLOCK = 256;

int64_t columns(const View& v) { return v.shape[v.rank - 1]; }

int64_t n_blocks(const Args& a) { return (columns(a.v[GATE]) + BLOCK - 1) / BLOCK; }

// How many rows of columns a token has: the axes between the first and the last.
int64_t rows_per_token(const View& v) {
    int64_t n = 1;
    for (int axis = 1; axis < v.rank - 1; axis++) n *= v.shape[axis];
    return n;
}

// Row i of token t. Any of the axes may have gaps, so its index is taken apart.
float* row_of(const View& v, int64_t t, int64_t i) {
    float* p = v.row(t);
    for (int axis = v.rank - 2; axis > 0; axis--) {
        p += i % v.shape[axis] * v.stride[axis];
        i /= v.shape[axis];
    }
    return p;
}

// NaN stays NaN.
vf at_most(vf x, vf limit) { return select(x > limit, limit, x); }
vf at_least(vf x, vf limit) { return select(x < limit, limit, x); }

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n = columns(a.v[GATE]), blocks = n_blocks(a), rows = rows_per_token(a.v[GATE]);
    const vf limit = splat(a.attr[0] > 0 ? static_cast<float>(a.attr[0]) : __builtin_inff());
    for (int64_t task = begin; task < end; task++) {
        const int64_t start = task % blocks * BLOCK, i = task / blocks;
        const int64_t size = n - start < BLOCK ? n - start : BLOCK;
        const float* gate = row_of(a.v[GATE], i / rows, i % rows) + start;
        const float* up = row_of(a.v[UP], i / rows, i % rows) + start;
        float* out = row_of(a.v[OUT], i / rows, i % rows) + start;
        for_lanes(size, [&](int64_t c, int w) {
            const vf g = silu(load_part(gate + c, w)), u = load_part(up + c, w);
            store_part(out + c, at_most(g, limit) * at_least(at_most(u, limit), -limit), w);
        });
    }
}

}  // namespace

const Kernel swiglu = {
    "SWIGLU",
    [](const Args& a) { return a.rows(a.v[GATE]) * rows_per_token(a.v[GATE]) * n_blocks(a); }, run};

}  // namespace gdn
