// MUL_MAT_ID: rows times the matrices of the experts that they chose.
//
// SORT_BY_EXPERT lists the pairs (token, choice) by expert; a task is a panel of one expert's matrix
// for all of its pairs. SUM_EXPERTS adds a token's results in the router's order, so that they do
// not depend on the rest of the batch.

#include <algorithm>

#include "kernels.h"
#include "product.h"

namespace gdn {

namespace {

namespace sorting {

enum { ORDER, STARTS, IDS };

// A counting sort; an expert's pairs stay in their order.
void run(const Args& a, int64_t, int64_t) {
    const View& ids = a.v[IDS];
    const int64_t n_tokens = a.rows(ids), n_used = ids.shape[1];
    const int64_t n_experts = a.v[STARTS].shape[0] - 1;
    auto *order = a.v[ORDER].as<int32_t>(), *starts = a.v[STARTS].as<int32_t>();
    const auto id = [&](int64_t i) {
        return ids.as<int32_t>()[i / n_used * ids.stride[0] + i % n_used * ids.stride[1]];
    };
    std::fill(starts, starts + n_experts + 1, 0);
    for (int64_t i = 0; i < n_tokens * n_used; i++) starts[id(i) + 1]++;
    for (int64_t e = 0; e < n_experts; e++) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < n_tokens * n_used; i++) order[starts[id(i)]++] = static_cast<int32_t>(i);
    for (int64_t e = n_experts; e > 0; e--) starts[e] = starts[e - 1];
    starts[0] = 0;
}

}  // namespace sorting

namespace products {

enum { OUT, X, Q, SCALE, SUM, MATRIX, ORDER, STARTS, IDS };

int64_t n_panels(const Args& a) { return (a.v[MATRIX].shape[1] + ROWS - 1) / ROWS; }

int64_t n_tasks(const Args& a) {
    return a.rows(a.v[IDS]) ? a.v[MATRIX].shape[0] * n_panels(a) : 0;
}

// Row i of [T, in], or of [T, U, in] taken as [T · U, in].
template <typename T>
const T* flat_row(const View& v, int64_t i) {
    if (v.rank == 2) return v.as<T>() + i * v.stride[0];
    return v.as<T>() + i / v.shape[1] * v.stride[0] + i % v.shape[1] * v.stride[1];
}

Row row_of(const Args& a, int64_t pair) {
    const int64_t i = a.v[X].rank == 2 ? pair / a.v[IDS].shape[1] : pair;
    if (!a.v[Q]) return {flat_row<float>(a.v[X], i), nullptr, nullptr, nullptr};
    return {flat_row<float>(a.v[X], i), flat_row<int8_t>(a.v[Q], i),
            flat_row<float>(a.v[SCALE], i), flat_row<int32_t>(a.v[SUM], i)};
}

// One panel of an expert's matrix times n of the expert's pairs.
void multiply_pairs(const Args& a, const uint8_t* panel, int64_t p, const int32_t* pairs, int64_t n) {
    const View& m = a.v[MATRIX];
    const int64_t n_out = m.shape[1];
    const size_t bytes = 4 * static_cast<size_t>(std::min<int64_t>(ROWS, n_out - p * ROWS));
    Row rows[TILE];
    float out[TILE][ROWS];
    rows[0] = row_of(a, pairs[0]);
    for (int64_t i = 1; i < n; i++) rows[i] = row_of(a, pairs[i]);
    multiply(m.layout, panel, m.shape[2], rows, n, out);
    for (int64_t i = 0; i < n; i++)
        std::memcpy(a.v[OUT].as<float>() + pairs[i] * n_out + p * ROWS, out[i], bytes);
}

void run(const Args& a, int64_t begin, int64_t end) {
    const View& m = a.v[MATRIX];
    const int64_t panels = n_panels(a);
    const auto *order = a.v[ORDER].as<int32_t>(), *starts = a.v[STARTS].as<int32_t>();
    for (int64_t task = begin; task < end; task++) {
        const int64_t expert = task / panels, p = task % panels;
        const int64_t first = starts[expert], last = starts[expert + 1];
        if (first == last) {
            // The rest of this expert's panels have nothing to do either.
            task = (expert + 1) * panels - 1;
            continue;
        }
        const uint8_t* panel = m.as<uint8_t>() + expert * m.stride[0] + p * m.stride[1];
        for (int64_t i = first; i < last; i += TILE)
            multiply_pairs(a, panel, p, order + i, std::min(TILE, last - i));
    }
}

}  // namespace products

namespace sums {

enum { OUT, PARTIAL, GATES };

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_used = a.v[PARTIAL].shape[1], n = a.v[PARTIAL].shape[2];
    for (int64_t t = begin; t < end; t++) {
        for_lanes(n, [&](int64_t i, int w) {
            vf total{};
            for (int64_t u = 0; u < n_used; u++) {
                const float gate = a.v[GATES].row(t)[u * a.v[GATES].stride[1]];
                total += splat(gate) * load_part(a.v[PARTIAL].row(t, u) + i, w);
            }
            store_part(a.v[OUT].row(t) + i, total, w);
        });
    }
}

}  // namespace sums

}  // namespace

const Kernel sort_by_expert = {
    "SORT_BY_EXPERT", [](const Args&) { return int64_t{1}; }, sorting::run};
const Kernel mul_mat_id = {"MUL_MAT_ID", products::n_tasks, products::run};
const Kernel sum_experts = {
    "SUM_EXPERTS", [](const Args& a) { return a.rows(a.v[sums::OUT]); }, sums::run};

}  // namespace gdn
