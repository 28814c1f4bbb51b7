// Products of panels with many rows by tiles of int8, bit for bit those of `multiply`: dot products
// are exact integers, scaled and summed in the same order.
#pragma once

#include "matrix.h"
#include "product.h"

namespace gdn {

// The most columns of rows that are gathered for tiles.
constexpr int64_t MAX_GATHERED_COLUMNS = 1 << 14;

// Bytes that 16 rows of so many columns may need to be gathered, a multiple of 64.
constexpr int64_t gathered_bytes(int64_t n_in) {
    return n_in / K_BLOCK * SIDE * (K_BLOCK + 4 + 2 * 4);
}

// Rows of a tile: int8 of k-block i in `row_bytes` steps from q + i · k_block_bytes on; side by side
// scales [k-blocks, 16] and factors of mins [k-blocks · groups, 16].
struct TileRows {
    const int8_t* q;
    int64_t row_bytes, k_block_bytes, n;
    float *scale, *sum;
};

// Up to TILE rows for products with panels of one layout: by tiles, where there are such and enough
// rows; rows that are left are multiplied one by one. While it lives, tiles are configured for it.
class PreparedRows {
   public:
    // room: TILE / SIDE · gathered_bytes(n_in), if `by_tiles`.
    PreparedRows(int32_t layout, int64_t n_in, const Row* rows, int64_t n, bool by_tiles,
                 char* room);
    ~PreparedRows();
    PreparedRows(const PreparedRows&) = delete;

    // As gdn::multiply. By tiles the layout is the one that the rows are prepared for.
    void multiply(int32_t layout, const uint8_t* panel, float (*out)[PANEL]) const;

   private:
    const int64_t n_in_, n_;
    const Row* const rows_;
    int64_t n_tiled_ = 0;
    TileRows tiles_[TILE / SIDE];
};

}  // namespace gdn
