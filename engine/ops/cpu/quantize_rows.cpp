// QUANTIZE_ROWS: an activation as integers, for products with quantized weights.
//
// Per 32 columns a float32 scale, max |x| / 127, and per 16 columns the sum of the integers. Fine
// rows, with a scale of max |x| / (127 · 128), become 15-bit integers in two int8 planes (product.h).
// A value that is not finite makes its group's scale not finite, so that it is not lost.

#include "kernels.h"
#include "product.h"

namespace gdn {
namespace {

// Attribute: whether only remainder rows are wanted.
enum { Q, SCALE, SUM, X };

typedef int8_t bytes __attribute__((vector_size(W)));

// The lowest byte of each lane.
GDN_INLINE void store_bytes(int8_t* p, vi v) {
    const auto low = __builtin_convertvector(v, bytes);
    std::memcpy(p, &low, sizeof(low));
}

template <bool FINE>
void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sums) {
    vf largest{}, nothing{};
    for (int i = 0; i < K_BLOCK; i += W) {
        const vf v = load(x + i);
        largest = max(largest, max(v, -v));
        nothing = fma(v, vf{}, nothing);
    }
    const float d = max_lane(largest) / (FINE ? 127.0f * 128.0f : 127.0f) + sum(nothing);
    const vf inverse = splat(d > 0 ? 1.0f / d : 0.0f);
    *scale = d;
    for (int g = 0; g < K_BLOCK / SUM_GROUP; g++) {
        vf total{};
        for (int i = g * SUM_GROUP; i < (g + 1) * SUM_GROUP; i += W) {
            // Rounds to the nearest integer, which is then in the low bits.
            vi n = bits(fma(load(x + i), inverse, splat(12582912.0f))) - 0x4B400000;
            // As many bits as are stored, also where the scale is not finite.
            n = FINE ? n << 17 >> 17 : n << 24 >> 24;
            total += to_float(n);
            if (FINE) {
                const vi high = (n + 64) >> 7;
                store_bytes(q + i, high);
                n -= high << 7;
            }
            store_bytes(q + i + (FINE ? K_BLOCK : 0), n);
        }
        sums[g] = static_cast<int32_t>(sum(total));
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View &x = a.v[X], &q = a.v[Q];
    const int64_t n_in = x.shape[x.rank - 1], per_token = x.rank == 3 ? x.shape[1] : 1;
    for (int64_t task = begin; task < end; task++) {
        const int64_t u = task % per_token, nth = task / per_token;
        const int64_t t = a.attr[0] != 0 ? a.step->remainder[nth] : nth, i = t * per_token + u;
        const float* row = x.row(t) + (x.rank == 3 ? u * x.stride[1] : 0);
        const bool is_fine = a.step->is_fine(x, t);
        const auto quantize = is_fine ? quantize_group<true> : quantize_group<false>;
        int8_t* to = q.as<int8_t>() + i * q.shape[q.rank - 1];
        for (int64_t g = 0; g < n_in / K_BLOCK; g++)
            quantize(row + g * K_BLOCK, to + g * (is_fine ? 2 * K_BLOCK : K_BLOCK),
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
