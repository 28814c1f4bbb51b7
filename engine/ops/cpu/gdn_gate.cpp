// GDN_GATE: g = a · softplus(alpha + dt), or lower_bound · sigmoid(a · (alpha + dt)) where there is a
// lower bound, and sigmoid(beta). A task for each row, or where each key
// row has its own decay (KDA) for each head of a row.

#include "kernels.h"

namespace gdn {
namespace {

// Attribute: lower_bound, 0 for none.
enum { G, STEP, ALPHA, BETA, A, DT };

bool per_key_row(const Args& a) { return a.v[ALPHA].rank == 3; }

int64_t tasks_per_row(const Args& a) { return per_key_row(a) ? a.v[ALPHA].shape[1] : 1; }

void step_sizes(const Args& a, int64_t t) {
    const float* beta = a.v[BETA].row(t);
    float* step = a.v[STEP].row(t);
    for_lanes(a.v[BETA].shape[1],
              [&](int64_t h, int w) { store_part(step + h, sigmoid(load_part(beta + h, w)), w); });
}

// `scale(i, w)` gives w entries of a.
template <typename Scale>
void decays(float* g, const float* alpha, const float* dt, int64_t n, float bound, Scale scale) {
    for_lanes(n, [&](int64_t i, int w) {
        const vf x = load_part(alpha + i, w) + load_part(dt + i, w);
        const vf y = bound != 0.0f ? bound * sigmoid(scale(i, w) * x) : scale(i, w) * softplus(x);
        store_part(g + i, y, w);
    });
}

void run(const Args& a, int64_t begin, int64_t end) {
    const float *scales = a.v[A].as<float>(), *dt = a.v[DT].as<float>();
    const int64_t n_heads = a.v[BETA].shape[1], per_row = tasks_per_row(a);
    const float bound = static_cast<float>(a.attr[0]);
    const int64_t n = per_key_row(a) ? a.v[ALPHA].shape[2] : n_heads;
    for (int64_t i = begin; i < end; i++) {
        const int64_t t = i / per_row, h = i % per_row;
        float* g = a.v[G].row(t) + h * n;
        const float* alpha = a.v[ALPHA].row(t) + h * n;
        if (h == 0) step_sizes(a, t);
        if (per_key_row(a))
            decays(g, alpha, dt + h * n, n, bound, [&](int64_t, int) { return splat(scales[h]); });
        else
            decays(g, alpha, dt, n, bound,
                   [&](int64_t c, int w) { return load_part(scales + c, w); });
    }
}

}  // namespace

const Kernel gdn_gate = {"GDN_GATE",
                         [](const Args& a) { return a.rows(a.v[ALPHA]) * tasks_per_row(a); }, run};

}  // namespace gdn
