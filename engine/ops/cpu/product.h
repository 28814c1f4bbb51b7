// Products of one panel (16 rows of a weight) with rows of an activation.
//
// A row's sum has the same order of operations however many rows there are, so results do not depend
// on how they are grouped.
#pragma once

#include "layout.h"

namespace gdn {

// One row of an activation: float32, and int8 with its scales (per 32) and sums (per 16).
struct Row {
    const float* x;
    const int8_t* q;
    const float* scale;
    const int32_t* sum;
};

constexpr int SUM_GROUP = 16;
// The most rows of one call: what meets a panel while it is in the cache.
constexpr int64_t TILE = 64;

// out[i] = the 16 rows of a panel times rows[i], for n ≤ TILE rows.
void multiply(int32_t layout, const uint8_t* panel, int64_t n_in, const Row* rows, int64_t n,
              float (*out)[ROWS]);

}  // namespace gdn
