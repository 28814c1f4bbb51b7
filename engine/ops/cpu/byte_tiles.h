// Products of panels with many rows by tiles of int8, bit for bit those of `multiply`: dot products
// are exact integers, scaled and summed in the same order.
#pragma once

#include "matrix.h"
#include "product.h"

namespace gdn {

// Bytes of up to 16 rows as `gather_bytes` lays them out, a multiple of 64.
constexpr int64_t gathered_bytes(int64_t n_in) {
    return n_in / K_BLOCK * SIDE * (K_BLOCK + 4 + 2 * 4);
}

// Puts n ≤ 16 rows side by side, filled up to 16 with the last one, for products with weights of
// this layout: for each k-block their int8, their scales, and their factors of mins.
void gather_bytes(int32_t layout, const Row* rows, int64_t n, int64_t n_in, char* room);

// The fewest rows for which tiles are faster than rows one by one (Xeon, measured).
int64_t min_gathered(int32_t layout);

// Configures tiles for products with weights of this layout, until begin_matrix_products().
void begin_byte_products(int32_t layout);

// As `multiply`, of gathered rows; the layout is one of quantized weights.
void multiply_bytes(int32_t layout, const uint8_t* panel, int64_t n_in, const char* gathered,
                    int64_t n, float (*out)[PANEL]);

}  // namespace gdn
