// Blocks of GGUF files, with the bytes that ggml defines, as columns of k-blocks.
#pragma once

#include "../layout.h"
#include "simd.h"

namespace gdn {

inline uint16_t u16(const uint8_t* p) { return load_as<uint16_t>(p); }

// One k-block's columns of one row: stored values, scales and mins of each group, and the
// super-block's scales of those.
struct Columns {
    uint8_t q[K_BLOCK];
    uint16_t flat[2], flat_min[2];
    uint8_t scale[2], min[2];
    uint16_t d, d_min;
};

// 16 bytes as 32 nibbles. They are joined in a register: a load of 32 bytes would wait for two
// stores.
inline void nibbles(const uint8_t* qs, uint8_t* q) {
    typedef uint64_t Half __attribute__((vector_size(16)));
    const auto bytes = load_as<Half>(qs);
    const auto both = __builtin_shufflevector(bytes, bytes >> 4, 0, 1, 2, 3) & 0x0f0f0f0f0f0f0f0f;
    std::memcpy(q, &both, K_BLOCK);
}

// 6-bit scale and min i of Q4_K and Q5_K, of which 8 each lie in 12 bytes.
inline void k_scale(const uint8_t* s, int i, uint8_t& scale, uint8_t& min) {
    if (i < 4) {
        scale = s[i] & 63, min = s[i + 4] & 63;
    } else {
        scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
        min = s[i + 4] >> 4 | (s[i] >> 6) << 4;
    }
}

// Q3_K's 6-bit scale i of 16 in 12 bytes, which counts from -32.
inline int q3_scale(const uint8_t* s, int i) {
    const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
    return (low | (s[8 + i % 4] >> 2 * (i / 4) & 3) << 4) - 32;
}

using Decode = void (*)(const uint8_t* block, int k_block, Columns& c);

// Q4_0 and Q5_0 have a scale, Q4_1 and Q5_1 also a min, which GGUF adds and panels subtract.
template <int BITS, bool MIN>
void q45(const uint8_t* b, int, Columns& c) {
    c.flat[0] = u16(b), b += 2;
    if (MIN) c.flat_min[0] = u16(b) ^ 0x8000, b += 2;
    nibbles(b + (BITS == 5 ? 4 : 0), c.q);
    if (BITS == 4) return;
    const auto high = load_as<uint32_t>(b);
    for (int j = 0; j < K_BLOCK; j++) c.q[j] |= (high >> j & 1) << 4;
}

inline void q8_0(const uint8_t* b, int, Columns& c) {
    c.flat[0] = u16(b);
    std::memcpy(c.q, b + 2, K_BLOCK);
}

inline void q2_k(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b + 80), c.d_min = u16(b + 82);
    const uint8_t* qs = b + 16 + i / 4 * 32;
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = qs[j] >> 2 * (i % 4) & 3;
    for (int g = 0; g < 2; g++) c.scale[g] = b[2 * i + g] & 15, c.min[g] = b[2 * i + g] >> 4;
}

inline void q3_k(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b + 108);
    const uint8_t* qs = b + 32 + i / 4 * 32;
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = (qs[j] >> 2 * (i % 4) & 3) | (b[j] >> i & 1) << 2;
    for (int g = 0; g < 2; g++) c.scale[g] = static_cast<uint8_t>(q3_scale(b + 96, 2 * i + g));
}

template <int BITS>
void q45_k(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b), c.d_min = u16(b + 2);
    k_scale(b + 4, i, c.scale[0], c.min[0]);
    const uint8_t* qs = b + (BITS == 5 ? 48 : 16) + i / 2 * 32;
    for (int j = 0; j < K_BLOCK; j++) {
        c.q[j] = i % 2 ? qs[j] >> 4 : qs[j] & 15;
        if (BITS == 5) c.q[j] |= (b[16 + j] >> i & 1) << 4;
    }
}

inline void q6_k(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b + 208);
    const int half = i / 4, quarter = i % 4;
    const uint8_t* low = b + half * 64 + quarter % 2 * 32;
    const uint8_t* high = b + 128 + half * 32;
    for (int j = 0; j < K_BLOCK; j++)
        c.q[j] = (quarter < 2 ? low[j] & 15 : low[j] >> 4) | (high[j] >> 2 * quarter & 3) << 4;
    c.scale[0] = b[192 + 2 * i], c.scale[1] = b[193 + 2 * i];
}

inline void iq4_xs(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b);
    const int low = b[4 + i / 2] >> 4 * (i % 2) & 15, high = u16(b + 2) >> 2 * i & 3;
    c.scale[0] = static_cast<uint8_t>((low | high << 4) - 32);
    nibbles(b + 8 + 16 * i, c.q);
}

// FP4 with the exponent of a power of two. The two smallest powers, which are no normal float32,
// become 0, as kernels take such numbers.
inline void mxfp4(const uint8_t* b, int, Columns& c) {
    c.scale[0] = b[0] < 2 ? 0 : b[0] - 1;
    nibbles(b + 1, c.q);
}

// FP4 with an 8-bit float for each 16 columns, of which 0x7f is 0 and the sign does not count.
inline void nvfp4(const uint8_t* b, int i, Columns& c) {
    for (int g = 0; g < 2; g++) {
        const uint8_t scale = b[2 * i + g] & 0x7f, *qs = b + 4 + 8 * (2 * i + g);
        c.scale[g] = scale == 0x7f ? 0 : scale;
        for (int j = 0; j < 16; j++) c.q[16 * g + j] = j < 8 ? qs[j] & 15 : qs[j - 8] >> 4;
    }
}

inline void q1_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b);
    const auto bits = load_as<uint32_t>(b + 2 + 4 * i);
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = bits >> j & 1;
}

inline void q2_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b);
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = b[2 + 8 * i + j / 4] >> 2 * (j % 4) & 3;
}

// Digit n, the highest being 0, of a fraction of 256 in base 3.
inline uint8_t ternary_digit(uint8_t fraction, int n) {
    for (; n > 0; n--) fraction = static_cast<uint8_t>(fraction * 3);
    return static_cast<uint8_t>(fraction * 3 >> 8);
}

// Five digits a byte: digit n of 32 bytes is columns 32n and so on, then that of 16 bytes; at last
// four digits of 4 bytes.
inline void tq1_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b + 52);
    for (int j = 0; j < K_BLOCK; j++) {
        const int k = i * K_BLOCK + j;
        c.q[j] = k < 160   ? ternary_digit(b[k % 32], k / 32)
                 : k < 240 ? ternary_digit(b[32 + k % 16], (k - 160) / 16)
                           : ternary_digit(b[48 + k % 4], (k - 240) / 4);
    }
}

inline void tq2_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b + 64);
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = b[i / 4 * 32 + j] >> 2 * (i % 4) & 3;
}

// The columns of one k-block of some rows, from the block at an offset in each of them.
using DecodeRows = void (*)(const uint8_t* const* rows, int n_rows, int64_t offset, int k_block,
                            Columns* c);

template <Decode DECODE>
void each_row(const uint8_t* const* rows, int n_rows, int64_t offset, int k_block, Columns* c) {
    for (int r = 0; r < n_rows; r++) DECODE(rows[r] + offset, k_block, c[r]);
}

struct Source {
    int ggml_id;
    Layout layout;
    DecodeRows decode;
    int block_elems, block_bytes;
};

constexpr Source SOURCES[] = {
    {0, L_F32, nullptr, 1, 4},
    {1, L_F16, nullptr, 1, 2},
    {30, L_BF16, nullptr, 1, 2},
    {2, L_Q4_0, each_row<q45<4, false>>, 32, 18},
    {3, L_Q4_1, each_row<q45<4, true>>, 32, 20},
    {6, L_Q5_0, each_row<q45<5, false>>, 32, 22},
    {7, L_Q5_1, each_row<q45<5, true>>, 32, 24},
    {8, L_Q8_0, each_row<q8_0>, 32, 34},
    {20, L_IQ4_NL, each_row<q45<4, false>>, 32, 18},
    {10, L_Q2_K, each_row<q2_k>, 256, 84},
    {11, L_Q3_K, each_row<q3_k>, 256, 110},
    {12, L_Q4_K, each_row<q45_k<4>>, 256, 144},
    {13, L_Q5_K, each_row<q45_k<5>>, 256, 176},
    {14, L_Q6_K, each_row<q6_k>, 256, 210},
    {23, L_IQ4_XS, each_row<iq4_xs>, 256, 136},
    {39, L_MXFP4, each_row<mxfp4>, 32, 17},
    {40, L_NVFP4, each_row<nvfp4>, 64, 36},
    {41, L_Q1_0, each_row<q1_0>, 128, 18},
    {42, L_Q2_0, each_row<q2_0>, 64, 18},
    {34, L_Q2_0, each_row<tq1_0>, 256, 54},
    {35, L_Q2_0, each_row<tq2_0>, 256, 66},
};

inline const Source* source_of(int ggml_id) {
    for (const Source& s : SOURCES)
        if (s.ggml_id == ggml_id) return &s;
    return nullptr;
}

}  // namespace gdn
