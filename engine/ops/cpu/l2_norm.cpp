// L2_NORM: x / sqrt(Σx² + eps), a task for each head of a row.

#include "kernels.h"

namespace gdn {
namespace {

// Attribute: eps.
enum { OUT, X };

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_heads = a.v[X].shape[1], n = a.v[X].shape[2];
    for (int64_t i = begin; i < end; i++) {
        const int64_t t = i / n_heads, h = i % n_heads;
        const float* x = a.v[X].row(t, h);
        float* out = a.v[OUT].row(t, h);
        const float total = sum_of_squares(x, n) + static_cast<float>(a.attr[0]);
        const vf scale = splat(1.0f / __builtin_sqrtf(total));
        for_lanes(n,
                  [&](int64_t c, int w) { store_part(out + c, load_part(x + c, w) * scale, w); });
    }
}

}  // namespace

const Kernel l2_norm = {"L2_NORM", [](const Args& a) { return a.rows(a.v[X]) * a.v[X].shape[1]; },
                        run};

}  // namespace gdn
