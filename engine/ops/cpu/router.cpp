// ROUTER: the experts of a token and their weights, a task for each row.
//
// Rows are copied to scratch and filled up to whole vectors, so that equal logits get equal scores
// wherever they lie. Scores are finite, and -inf marks experts that can't be chosen (any more): a
// choice is always an existing expert, even if logits are NaN.

#include "kernels.h"

namespace gdn {
namespace {

// Attributes: n_used, gating, scale, eps, n_groups, n_groups_used, normalized.
enum { IDS, WEIGHTS, LOGITS, BIAS };
enum { SOFTMAX, SIGMOID };

constexpr float LOWEST = -__FLT_MAX__, NEVER = -__builtin_inff();

int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

vf at_least_lowest(vf x) { return max(x, splat(LOWEST)); }  // NaN too.

// The index of the highest of n scores (whole vectors), the first of equal ones; marks it as taken.
int32_t take_best(float* scores, int64_t n) {
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    vf best = load(scores);
    vi where = lane;
    for (int64_t i = W; i < n; i += W) {
        const vf v = load(scores + i);
        const vi better = v > best;
        best = select(better, v, best);
        where = (better & (lane + static_cast<int32_t>(i))) | (~better & where);
    }
    int32_t index = where[0];
    for (int i = 1; i < W; i++) {
        const float top = scores[index];
        if (best[i] > top || (best[i] == top && where[i] < index)) index = where[i];
    }
    scores[index] = NEVER;
    return index;
}

// p of one row; `n` is whole vectors of which the last one's surplus is NEVER.
void probabilities(float* p, int64_t n, bool softmax) {
    if (!softmax) {
        // Not below -80, so that even the smallest ones have a sum to be divided by.
        for (int64_t i = 0; i < n; i += W) {
            const vf x = load(p + i);
            store(p + i, sigmoid(select(x < splat(-80.0f), splat(-80.0f), x)));
        }
        return;
    }
    vf highest = load(p), total{};
    for (int64_t i = W; i < n; i += W) highest = max(highest, load(p + i));
    const vf top = splat(max_lane(highest));
    for (int64_t i = 0; i < n; i += W) {
        const vf e = exp(load(p + i) - top);
        total += e;
        store(p + i, e);
    }
    const vf scale = splat(1.0f / sum(total));
    for (int64_t i = 0; i < n; i += W) store(p + i, load(p + i) * scale);
}

// Marks the experts outside of the best groups. A group is as good as the sum of its two best.
void keep_best_groups(float* scores, int64_t n, int64_t n_groups, int64_t n_kept, float* goodness) {
    const int64_t size = n / n_groups, n_padded = whole_vectors(n_groups);
    for (int64_t g = 0; g < n_padded; g++) {
        float first = LOWEST, second = LOWEST;
        for (int64_t i = 0; g < n_groups && i < size; i++) {
            const float v = scores[g * size + i];
            second = v > first ? first : v > second ? v : second;
            first = v > first ? v : first;
        }
        const float both = first + second;
        goodness[g] = g >= n_groups ? NEVER : both > LOWEST ? both : LOWEST;
    }
    for (int64_t i = 0; i < n_kept; i++) take_best(goodness, n_padded);
    for (int64_t g = 0; g < n_groups; g++)
        for (int64_t i = 0; goodness[g] != NEVER && i < size; i++) scores[g * size + i] = NEVER;
}

void run_row(const Args& a, int64_t t) {
    const int64_t n = a.v[LOGITS].shape[1], n_padded = whole_vectors(n);
    const int64_t n_used = a.v[IDS].shape[1], n_groups = static_cast<int64_t>(a.attr[4]);
    float *p = reinterpret_cast<float*>(a.scratch), *scores = p + n_padded;
    std::memcpy(p, a.v[LOGITS].row(t), 4 * static_cast<size_t>(n));
    for (int64_t i = n; i < n_padded; i++) p[i] = NEVER;
    probabilities(p, n_padded, a.attr[1] == SOFTMAX);
    const float* bias = a.v[BIAS].as<float>();
    for_lanes(n, [&](int64_t i, int w) {
        const vf score = bias ? load(p + i) + load_part(bias + i, w) : load(p + i);
        store(scores + i, at_least_lowest(score));
    });
    for (int64_t i = n; i < n_padded; i++) scores[i] = NEVER;
    if (n_groups > 1)
        keep_best_groups(scores, n, n_groups, static_cast<int64_t>(a.attr[5]), scores + n_padded);

    int32_t* ids = a.v[IDS].as<int32_t>() + t * a.v[IDS].stride[0];
    float *weights = a.v[WEIGHTS].row(t), total = 0;
    for (int64_t u = 0; u < n_used; u++) {
        ids[u] = take_best(scores, n_padded);
        weights[u] = p[ids[u]];
        total += weights[u];
    }
    total = a.attr[6] != 0 ? total + static_cast<float>(a.attr[3]) : 1.0f;
    for (int64_t u = 0; u < n_used; u++)
        weights[u] = weights[u] / total * static_cast<float>(a.attr[2]);
}

void run(const Args& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) run_row(a, t);
}

}  // namespace

const Kernel router = {"ROUTER", [](const Args& a) { return a.rows(a.v[LOGITS]); }, run};

}  // namespace gdn
