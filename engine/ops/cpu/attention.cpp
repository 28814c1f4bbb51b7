// ATTENTION: softmax over a sequence's cached positions, taken tile after tile (online softmax), so
// that no buffer grows with the context.

#include "attention.h"

#include "kernels.h"

namespace gdn::attention_op {

void store_result(const Args& a, int64_t t, int64_t h, const float* acc, float total) {
    const View &out = a.v[OUT], &gate = a.v[GATE];
    const float scale = 1.0f / total;
    float* y = out.row(t, h);
    const bool per_head = gate && gate.rank == 2;
    const vf factor = per_head ? sigmoid(splat(gate.row(t)[h])) : splat(1.0f);
    for_lanes(out.shape[2], [&](int64_t d, int n) {
        vf v = load(acc + d) * scale;
        if (per_head)
            v *= factor;
        else if (gate)
            v *= sigmoid(load_part(gate.row(t, h) + d, n));
        store_part(y + d, v, n);
    });
}

namespace {

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_tiles = n_tile_tasks(a);
    const int64_t middle = end < n_tiles ? end : begin > n_tiles ? begin : n_tiles;
    if (begin < middle) run_tile_tasks(a, begin, middle);
    if (middle < end) run_row_tasks(a, middle - n_tiles, end - n_tiles);
}

}  // namespace

}  // namespace gdn::attention_op

const gdn::Kernel gdn::attention = {
    "ATTENTION",
    [](const Args& a) { return attention_op::n_tile_tasks(a) + attention_op::n_row_tasks(a); },
    attention_op::run};
