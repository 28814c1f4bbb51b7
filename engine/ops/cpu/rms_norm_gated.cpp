// RMS_NORM_GATED: rms(x) · weight · act(gate), a task for each head of a row.

#include "kernels.h"

namespace gdn {
namespace {

// Attributes: eps, act.
enum { OUT, X, GATE, WEIGHT };
enum { SILU, SIGMOID };

template <int ACT>
void run_head(const Args& a, int64_t t, int64_t h) {
    const int64_t n = a.v[X].shape[2];
    const float *x = a.v[X].row(t, h), *gate = a.v[GATE].row(t, h);
    const float* weight = a.v[WEIGHT].as<float>();
    float* out = a.v[OUT].row(t, h);
    const vf scale = inverse_rms(x, n, a.attr[0]);
    for_lanes(n, [&](int64_t c, int w) {
        const vf g = load_part(gate + c, w);
        const vf normed = load_part(x + c, w) * scale * load_part(weight + c, w);
        store_part(out + c, normed * (ACT == SILU ? silu(g) : sigmoid(g)), w);
    });
}

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_heads = a.v[X].shape[1];
    const auto head = a.attr[1] == SILU ? run_head<SILU> : run_head<SIGMOID>;
    for (int64_t i = begin; i < end; i++) head(a, i / n_heads, i % n_heads);
}

}  // namespace

const Kernel rms_norm_gated = {"RMS_NORM_GATED",
                               [](const Args& a) { return a.rows(a.v[X]) * a.v[X].shape[1]; }, run};

}  // namespace gdn
