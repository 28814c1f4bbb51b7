// Packing of weights; see ../layout.h.
#pragma once

#include "../layout.h"

namespace gdn {

// The layout that keeps a GGML type exactly, or -1.
int32_t layout_of(int ggml_id);

// Bytes of 16 rows of n_in columns.
int64_t panel_bytes(int32_t layout, int64_t n_in);

// Packs panels begin … end of a matrix of n_rows rows of a GGML type; rows past the last are zeros.
// `factor` multiplies all values; it is 1 where units are not float32 (Scale::SMALL_FLOATS).
void pack_rows(int ggml_id, const uint8_t* src, int64_t n_rows, int64_t n_in, float factor,
               uint8_t* dst, int64_t begin, int64_t end);

// Row `row` of a panel as float32.
void decode_row(int32_t layout, const uint8_t* panel, int row, int64_t n_in, float* out);

}  // namespace gdn
