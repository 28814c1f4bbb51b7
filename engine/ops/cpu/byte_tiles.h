// Products of panels with many rows by tiles of int8: to the last bit those of `multiply`, whose dot
// products are exact integers too and are scaled and summed in the same order.
#pragma once

#include "matrix.h"
#include "product.h"

namespace gdn {

// Bytes that up to 16 rows take as `gather_bytes` lays them out, a multiple of 64.
constexpr int64_t gathered_bytes(int64_t n_in) {
    return n_in / K_BLOCK * SIDE * (K_BLOCK + 4 + 2 * 4);
}

// Puts n ≤ 16 rows side by side, the last one again in place of those that lack, for products with
// weights of this layout: k-block by k-block their int8, scales, and what mins are multiplied by.
void gather_bytes(int32_t layout, const Row* rows, int64_t n, int64_t n_in, char* room);

// Rows from which on tiles are faster than rows one by one (Xeon, measured).
int64_t min_gathered(int32_t layout);

// What tiles must be told before products with weights of this layout; ends with
// begin_matrix_products().
void begin_byte_products(int32_t layout);

// As `multiply`, of gathered rows; the layout is one of quantized weights.
void multiply_bytes(int32_t layout, const uint8_t* panel, int64_t n_in, const char* gathered,
                    int64_t n, float (*out)[ROWS]);

}  // namespace gdn
