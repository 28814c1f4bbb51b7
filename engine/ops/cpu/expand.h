// Packed weights as tiles of bfloat16, for products of many rows.
#pragma once

#include "../layout.h"
#include "matrix.h"

namespace gdn {

// Whether a layout's values may be rounded to bfloat16: float32 and float16 would lose digits.
inline bool has_tiles(int32_t layout) { return layout != L_F32 && layout != L_F16; }

// K-blocks `begin` … `end` - 1 of a panel as B tiles, one for each k-block: in `room` (TILE_SIZE
// elements each), or in place where panels are tiles already.
const bf16* expand(int32_t layout, const uint8_t* panel, int64_t begin, int64_t end, bf16* room);

}  // namespace gdn
