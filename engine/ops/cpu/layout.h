// Packed weights: panels of 16 rows, interleaved so that one vector holds the same columns of
// neighbouring rows, and quantized values in planes of 4, 2 and 1 bits.
//
// A row is cut into records of 32 columns. In a record, "words" are the 4 bytes of 4 consecutive
// columns of a row; word i of all 16 rows together is 64 bytes, and planes keep the words' lower and
// higher bits apart:
//
//   bits   planes (bytes of a record)
//   8      words 0…7 (512)
//   4      words 2c | 2c+1 << 4 (256)
//   2      words 4h | 4h+1 << 2 | 4h+2 << 4 | 4h+3 << 6 (128)
//   1      bit i of a byte is word i's (64)
//
// 6 bits are 4 and 2, 5 are 4 and 1, 3 are 2 and 1. A value is scale · (q - ZERO) - min. Scales are
// float16 per group of GROUP columns in front of a record's planes (flat), or 8 bits there times a
// float16 in front of every 8 records (super), as K-quants have them. Each GGUF type has a layout
// that keeps its values exactly; what it adds to a file's size is at most 3 %.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace gdn {

constexpr int ROWS = 16, RECORD = 32, SUPER = 256, WORDS = 8;
constexpr int WORD_BYTES = ROWS * 4;
// How many vectors cover 16 rows.
constexpr int PARTS = ROWS / W;

enum Layout : int32_t {
    L_F32,
    L_F16,
    L_BF16,
    L_Q4_0,
    L_Q4_1,
    L_Q5_0,
    L_Q5_1,
    L_Q8_0,
    L_IQ4_NL,
    L_Q2_K,
    L_Q3_K,
    L_Q4_K,
    L_Q5_K,
    L_Q6_K,
    L_IQ4_XS,
    N_LAYOUTS
};

template <int BITS_, int GROUP_, bool SUPER_, bool MIN_, int ZERO_, bool CODEBOOK_ = false>
struct Format {
    static constexpr int BITS = BITS_, GROUP = GROUP_, ZERO = ZERO_;
    static constexpr bool IS_SUPER = SUPER_, HAS_MIN = MIN_, CODEBOOK = CODEBOOK_;
    // Values are int8 rather than unsigned.
    static constexpr bool SIGNED = BITS == 8 || CODEBOOK;
    static constexpr int GROUPS = RECORD / GROUP;
    static constexpr int SCALE_BYTES = ROWS * GROUPS * (IS_SUPER ? 1 : 2);
    static constexpr int HEAD_BYTES = SCALE_BYTES * (HAS_MIN ? 2 : 1);
    static constexpr int RECORD_BYTES = HEAD_BYTES + ROWS * RECORD * BITS / 8;
    static constexpr int SUPER_HEAD = IS_SUPER ? ROWS * 2 * (HAS_MIN ? 2 : 1) : 0;
    static constexpr int SUPER_BYTES = SUPER_HEAD + SUPER / RECORD * RECORD_BYTES;

    static int64_t panel_bytes(int64_t n_in) {
        return IS_SUPER ? n_in / SUPER * SUPER_BYTES : n_in / RECORD * RECORD_BYTES;
    }
    // Where a record begins, and where its super-block does.
    static const uint8_t* record(const uint8_t* panel, int64_t i) {
        if (!IS_SUPER) return panel + i * RECORD_BYTES;
        constexpr int n = SUPER / RECORD;
        return panel + i / n * SUPER_BYTES + SUPER_HEAD + i % n * RECORD_BYTES;
    }
    static const uint8_t* super_block(const uint8_t* panel, int64_t i) {
        return panel + i / (SUPER / RECORD) * SUPER_BYTES;
    }
};

// Elements of 2 or 4 bytes, 16 rows side by side for each column; BF16 in pairs of columns.
template <Layout L>
struct Plain {
    static constexpr Layout LAYOUT = L;
    static int64_t panel_bytes(int64_t n_in) {
        if (L == L_BF16) return (n_in + 1) / 2 * ROWS * 4;
        return n_in * ROWS * (L == L_F32 ? 4 : 2);
    }
};

constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};

// Calls f with the format of a layout.
template <typename F>
auto with_format(int32_t layout, F f) {
    switch (layout) {
        case L_F16: return f(Plain<L_F16>{});
        case L_BF16: return f(Plain<L_BF16>{});
        case L_Q4_0: return f(Format<4, 32, false, false, 8>{});
        case L_Q4_1: return f(Format<4, 32, false, true, 0>{});
        case L_Q5_0: return f(Format<5, 32, false, false, 16>{});
        case L_Q5_1: return f(Format<5, 32, false, true, 0>{});
        case L_Q8_0: return f(Format<8, 32, false, false, 0>{});
        case L_IQ4_NL: return f(Format<4, 32, false, false, 0, true>{});
        case L_Q2_K: return f(Format<2, 16, true, true, 0>{});
        case L_Q3_K: return f(Format<3, 16, true, false, 4>{});
        case L_Q4_K: return f(Format<4, 32, true, true, 0>{});
        case L_Q5_K: return f(Format<5, 32, true, true, 0>{});
        case L_Q6_K: return f(Format<6, 16, true, false, 32>{});
        case L_IQ4_XS: return f(Format<4, 32, true, false, 0, true>{});
        default: return f(Plain<L_F32>{});
    }
}

template <typename F>
constexpr bool is_plain(F) {
    return false;
}
template <Layout L>
constexpr bool is_plain(Plain<L>) {
    return true;
}

}  // namespace gdn
