// QUANTIZE_ROWS: an activation as int8, for products with quantized weights.
//
// Per 32 columns a float32 scale, max |x| / 127, and per 16 columns the sum of the integers. A
// value that is not finite makes its group's scale not finite, so that it is not lost.

#include "kernels.h"
#include "product.h"

namespace gdn {
namespace {

// Attribute: whether only remainder rows are wanted.
enum { Q, SCALE, SUM, X };

void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sums) {
    vf largest{}, nothing{};
    for (int i = 0; i < K_BLOCK; i += W) {
        const vf v = load(x + i);
        largest = max(largest, max(v, -v));
        nothing = fma(v, vf{}, nothing);
    }
    const float d = max_lane(largest) / 127.0f + sum(nothing);
    const vf inverse = splat(d > 0 ? 1.0f / d : 0.0f);
    *scale = d;
    sums[0] = sums[1] = 0;
    for (int i = 0; i < K_BLOCK; i += W) {
        // Rounds to the nearest integer, which is then in the low bits.
        const vi n = bits(fma(load(x + i), inverse, splat(12582912.0f))) - 0x4B400000;
        for (int j = 0; j < W; j++) {
            q[i + j] = static_cast<int8_t>(n[j]);
            sums[i / SUM_GROUP] += q[i + j];
        }
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View &x = a.v[X], &q = a.v[Q];
    const int64_t n_in = x.shape[x.rank - 1], per_token = x.rank == 3 ? x.shape[1] : 1;
    for (int64_t task = begin; task < end; task++) {
        const int64_t u = task % per_token, nth = task / per_token;
        const int64_t t = a.attr[0] != 0 ? a.step->remainder[nth] : nth, i = t * per_token + u;
        const float* row = x.row(t) + (x.rank == 3 ? u * x.stride[1] : 0);
        for (int64_t g = 0; g < n_in / K_BLOCK; g++)
            quantize_group(row + g * K_BLOCK, q.as<int8_t>() + i * n_in + g * K_BLOCK,
                           a.v[SCALE].as<float>() + i * (n_in / K_BLOCK) + g,
                           a.v[SUM].as<int32_t>() + i * (n_in / SUM_GROUP) + 2 * g);
    }
}

int64_t n_tasks(const Args& a) {
    return (a.attr[0] != 0 ? a.step->n_remainder : a.rows(a.v[X])) *
           (a.v[X].rank == 3 ? a.v[X].shape[1] : 1);
}

}  // namespace

const Kernel quantize_rows = {"QUANTIZE_ROWS", n_tasks, run};

}  // namespace gdn
