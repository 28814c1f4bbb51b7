// Packed weights: the panels of engine/ops/cpu/layout.h, which draws them, as the GPU reads them.
//
// A panel has PANEL rows. A k-block is K_BLOCK of its columns: scales (and mins), then words of 4
// columns of all rows, in planes of 4, 2 and 1 bits. A value is scale · (q - ZERO) - min.
#pragma once

#include "kernel.cuh"

namespace gdn {

constexpr int WORDS = K_BLOCK / 4, WORD_BYTES = PANEL * 4;

// The numbers of engine/ops/cpu/layout.h.
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
    static constexpr bool SIGNED = BITS == 8 || CODEBOOK;
    static constexpr int GROUPS = K_BLOCK / GROUP;
    static constexpr int SCALE_BYTES = PANEL * GROUPS * (IS_SUPER ? 1 : 2);
    static constexpr int HEAD_BYTES = SCALE_BYTES * (HAS_MIN ? 2 : 1);
    static constexpr int K_BLOCK_BYTES = HEAD_BYTES + PANEL * K_BLOCK * BITS / 8;
    static constexpr int SUPER_HEAD = IS_SUPER ? PANEL * 2 * (HAS_MIN ? 2 : 1) : 0;
    // Of BATCH k-blocks, with the head of a super-block.
    static constexpr int SUPER_BYTES = SUPER_HEAD + BATCH * K_BLOCK_BYTES;

    // The address of k-block i, and of its super-block.
    DEVICE static const uint8_t* k_block(const uint8_t* panel, int i) {
        if (!IS_SUPER) return panel + i * K_BLOCK_BYTES;
        return super_block(panel, i) + SUPER_HEAD + i % BATCH * K_BLOCK_BYTES;
    }
    DEVICE static const uint8_t* super_block(const uint8_t* panel, int i) {
        return panel + i / BATCH * SUPER_BYTES;
    }
};

// Elements of 2 or 4 bytes, 16 rows side by side for each column; BF16 in pairs of columns.
template <Layout L>
struct Plain {
    static constexpr Layout LAYOUT = L;
};

// Calls f with the format of a layout.
template <typename F>
DEVICE auto with_format(int32_t layout, F f) {
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
DEVICE constexpr bool is_plain(F) {
    return false;
}
template <Layout L>
DEVICE constexpr bool is_plain(Plain<L>) {
    return true;
}

}  // namespace gdn
