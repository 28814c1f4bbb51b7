// ADD_RMS_NORM: the residual sum and its RMS norm, a task for each row.

#include "kernels.h"

namespace gdn {
namespace {

// Attribute: eps. TOTAL and DELTA come together or not at all.
enum { NORM, TOTAL, X, WEIGHT, DELTA };

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n = a.v[X].shape[1];
    const float* weight = a.v[WEIGHT].as<float>();
    for (int64_t t = begin; t < end; t++) {
        const float* x = a.v[X].row(t);
        if (a.v[DELTA]) {
            const float* delta = a.v[DELTA].row(t);
            float* total = a.v[TOTAL].row(t);
            for_lanes(n, [&](int64_t i, int w) {
                store_part(total + i, load_part(x + i, w) + load_part(delta + i, w), w);
            });
            x = total;
        }
        rms_norm(x, weight, n, a.attr[0], a.v[NORM].row(t));
    }
}

}  // namespace

const Kernel add_rms_norm = {"ADD_RMS_NORM", [](const Args& a) { return a.rows(a.v[X]); }, run};

}  // namespace gdn
