// The byte layouts of packed weights, for the CPU's kernels and the GPU's: panels of 16 rows,
// interleaved so that one vector holds the same columns of neighbouring rows, with quantized values
// in planes of 4, 2 and 1 bits.
//
// A panel is cut into k-blocks of 32 columns. In a k-block, "words" are the 4 bytes of 4
// consecutive columns of a row; word i of all 16 rows together is 64 bytes, and planes keep the
// words' lower and higher bits apart:
//
//   bits   planes (bytes of a k-block)
//   8      words 0…7 (512)
//   4      words 2c | 2c+1 << 4 (256)
//   2      words 4h | 4h+1 << 2 | 4h+2 << 4 | 4h+3 << 6 (128)
//   1      bit i of a byte is word i's (64)
//
// 6 bits are 4 and 2, 5 are 4 and 1, 3 are 2 and 1. Q1_0's single bit is read as bit 1 of its byte:
// 0 or 2. A value is scale · (q - ZERO) - min. Scales of GROUP columns lie in front of a k-block's
// planes, those of a super-block (8 k-blocks, or the last ones) in front of it; `Scale` says what
// they are. Each GGUF type with a layout keeps its values exactly.
#pragma once

#ifndef DEVICE  // CUDA's primitives.cuh defines it, and the integer types.
#include <cstdint>
#define DEVICE
#endif

namespace gdn {

// Rows of a panel, columns of a k-block and of a super-block, words of a row in a k-block.
constexpr int PANEL = 16, K_BLOCK = 32, SUPER = 256, WORDS = 8;
constexpr int WORD_BYTES = PANEL * 4;

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
    L_MXFP4,
    L_NVFP4,
    L_Q1_0,
    L_Q2_0,
    N_LAYOUTS
};

// A group's scale: a float16 (HALVES); 8 bits, signed where there are no mins, times the
// super-block's float16 (BYTES), as in K-quants; the exponent of a power of two, as a float32 has
// it (POWERS); an unsigned 8-bit float with 4 bits of exponent, times the super-block's float32,
// which has the factor of the whole tensor (SMALL_FLOATS).
enum class Scale { HALVES, BYTES, POWERS, SMALL_FLOATS };

// What a value's bits stand for: a number, or an entry of a table. That of IQ4 has int8; that of FP4
// (E2M1) has its values twofold, from the smallest on: 12 is zero.
enum class Values { NUMBERS, IQ4, FP4 };

template <int BITS_, int GROUP_, Scale SCALE_, bool MIN_, int ZERO_,
          Values VALUES_ = Values::NUMBERS>
struct Format {
    static constexpr int BITS = BITS_, GROUP = GROUP_, ZERO = ZERO_;
    static constexpr Scale SCALE = SCALE_;
    static constexpr Values VALUES = VALUES_;
    static constexpr bool HAS_MIN = MIN_, CODEBOOK = VALUES != Values::NUMBERS;
    static constexpr bool IS_SUPER = SCALE == Scale::BYTES || SCALE == Scale::SMALL_FLOATS;
    // Values are int8 rather than unsigned.
    static constexpr bool SIGNED = BITS == 8 || VALUES == Values::IQ4;
    // Where a value's lowest bit lies in its byte, and the bits of a value from there on.
    static constexpr int LOWEST = BITS == 1 ? 1 : 0;
    static constexpr int WIDTH = SIGNED ? 8 : VALUES == Values::FP4 ? 5 : BITS;
    static constexpr int GROUPS = K_BLOCK / GROUP;
    static constexpr int SCALE_BYTES = PANEL * GROUPS * (SCALE == Scale::HALVES ? 2 : 1);
    static constexpr int HEAD_BYTES = SCALE_BYTES * (HAS_MIN ? 2 : 1);
    static constexpr int K_BLOCK_BYTES = HEAD_BYTES + PANEL * K_BLOCK * BITS / 8;
    static constexpr int UNIT_BYTES = SCALE == Scale::SMALL_FLOATS ? 4 : 2;
    static constexpr int SUPER_HEAD = IS_SUPER ? PANEL * UNIT_BYTES * (HAS_MIN ? 2 : 1) : 0;
    // Of 8 k-blocks, with the head of a super-block if there is one.
    static constexpr int SUPER_BYTES = SUPER_HEAD + SUPER / K_BLOCK * K_BLOCK_BYTES;

    DEVICE static int64_t panel_bytes(int64_t n_in) {
        return (n_in + SUPER - 1) / SUPER * SUPER_HEAD + n_in / K_BLOCK * K_BLOCK_BYTES;
    }
    // Where k-block i begins, and where its super-block does.
    template <typename Index>
    DEVICE static const uint8_t* k_block(const uint8_t* panel, Index i) {
        if (!IS_SUPER) return panel + i * K_BLOCK_BYTES;
        constexpr int n = SUPER / K_BLOCK;
        return panel + i / n * SUPER_BYTES + SUPER_HEAD + i % n * K_BLOCK_BYTES;
    }
    template <typename Index>
    DEVICE static const uint8_t* super_block(const uint8_t* panel, Index i) {
        return panel + i / (SUPER / K_BLOCK) * SUPER_BYTES;
    }
};

// Elements of 2 or 4 bytes, 16 rows side by side for each column; BF16 in pairs of columns.
template <Layout L>
struct Plain {
    static constexpr Layout LAYOUT = L;
    DEVICE static int64_t panel_bytes(int64_t n_in) {
        if (L == L_BF16) return (n_in + 1) / 2 * PANEL * 4;
        return n_in * PANEL * (L == L_F32 ? 4 : 2);
    }
};

// Calls f with the format of a layout.
template <typename F>
DEVICE auto with_format(int32_t layout, F f) {
    using S = Scale;
    switch (layout) {
        case L_F16: return f(Plain<L_F16>{});
        case L_BF16: return f(Plain<L_BF16>{});
        case L_Q4_0: return f(Format<4, 32, S::HALVES, false, 8>{});
        case L_Q4_1: return f(Format<4, 32, S::HALVES, true, 0>{});
        case L_Q5_0: return f(Format<5, 32, S::HALVES, false, 16>{});
        case L_Q5_1: return f(Format<5, 32, S::HALVES, true, 0>{});
        case L_Q8_0: return f(Format<8, 32, S::HALVES, false, 0>{});
        case L_IQ4_NL: return f(Format<4, 32, S::HALVES, false, 0, Values::IQ4>{});
        case L_Q2_K: return f(Format<2, 16, S::BYTES, true, 0>{});
        case L_Q3_K: return f(Format<3, 16, S::BYTES, false, 4>{});
        case L_Q4_K: return f(Format<4, 32, S::BYTES, true, 0>{});
        case L_Q5_K: return f(Format<5, 32, S::BYTES, true, 0>{});
        case L_Q6_K: return f(Format<6, 16, S::BYTES, false, 32>{});
        case L_IQ4_XS: return f(Format<4, 32, S::BYTES, false, 0, Values::IQ4>{});
        case L_MXFP4: return f(Format<4, 32, S::POWERS, false, 12, Values::FP4>{});
        case L_NVFP4: return f(Format<4, 16, S::SMALL_FLOATS, false, 12, Values::FP4>{});
        case L_Q1_0: return f(Format<1, 32, S::HALVES, false, 1>{});
        case L_Q2_0: return f(Format<2, 32, S::HALVES, false, 1>{});
        default: return f(Plain<L_F32>{});
    }
}

template <typename F>
DEVICE constexpr bool is_plain(F) {
    return false;
}
template <Layout L>
DEVICE constexpr bool is_plain(Plain<L>) {
    return true;
}

}  // namespace gdn
