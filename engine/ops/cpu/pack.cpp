// GGUF blocks into packed panels (see ../layout.h), and rows of panels back into float32.
//
// Blocks have the bytes of GGUF files, as ggml defines them.

#include "pack.h"

#include <algorithm>

#include "k_block.h"

namespace gdn {
namespace {

uint16_t u16(const uint8_t* p) { return load_as<uint16_t>(p); }

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
void nibbles(const uint8_t* qs, uint8_t* q) {
    typedef uint64_t Half __attribute__((vector_size(16)));
    const auto bytes = load_as<Half>(qs);
    const auto both = __builtin_shufflevector(bytes, bytes >> 4, 0, 1, 2, 3) & 0x0f0f0f0f0f0f0f0f;
    std::memcpy(q, &both, K_BLOCK);
}

// 6-bit scale and min i of Q4_K and Q5_K, of which 8 each lie in 12 bytes.
void k_scale(const uint8_t* s, int i, uint8_t& scale, uint8_t& min) {
    if (i < 4) {
        scale = s[i] & 63, min = s[i + 4] & 63;
    } else {
        scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
        min = s[i + 4] >> 4 | (s[i] >> 6) << 4;
    }
}

// Q3_K's 6-bit scale i of 16 in 12 bytes, which counts from -32.
int q3_scale(const uint8_t* s, int i) {
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

void q8_0(const uint8_t* b, int, Columns& c) {
    c.flat[0] = u16(b);
    std::memcpy(c.q, b + 2, K_BLOCK);
}

void q2_k(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b + 80), c.d_min = u16(b + 82);
    const uint8_t* qs = b + 16 + i / 4 * 32;
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = qs[j] >> 2 * (i % 4) & 3;
    for (int g = 0; g < 2; g++) c.scale[g] = b[2 * i + g] & 15, c.min[g] = b[2 * i + g] >> 4;
}

void q3_k(const uint8_t* b, int i, Columns& c) {
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

void q6_k(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b + 208);
    const int half = i / 4, quarter = i % 4;
    const uint8_t* low = b + half * 64 + quarter % 2 * 32;
    const uint8_t* high = b + 128 + half * 32;
    for (int j = 0; j < K_BLOCK; j++)
        c.q[j] = (quarter < 2 ? low[j] & 15 : low[j] >> 4) | (high[j] >> 2 * quarter & 3) << 4;
    c.scale[0] = b[192 + 2 * i], c.scale[1] = b[193 + 2 * i];
}

void iq4_xs(const uint8_t* b, int i, Columns& c) {
    c.d = u16(b);
    const int low = b[4 + i / 2] >> 4 * (i % 2) & 15, high = u16(b + 2) >> 2 * i & 3;
    c.scale[0] = static_cast<uint8_t>((low | high << 4) - 32);
    nibbles(b + 8 + 16 * i, c.q);
}

// FP4 with the exponent of a power of two. The two smallest powers, which are no normal float32,
// become 0, as kernels take such numbers.
void mxfp4(const uint8_t* b, int, Columns& c) {
    c.scale[0] = b[0] < 2 ? 0 : b[0] - 1;
    nibbles(b + 1, c.q);
}

// FP4 with an 8-bit float for each 16 columns, of which 0x7f is 0 and the sign does not count.
void nvfp4(const uint8_t* b, int i, Columns& c) {
    for (int g = 0; g < 2; g++) {
        const uint8_t scale = b[2 * i + g] & 0x7f, *qs = b + 4 + 8 * (2 * i + g);
        c.scale[g] = scale == 0x7f ? 0 : scale;
        for (int j = 0; j < 16; j++) c.q[16 * g + j] = j < 8 ? qs[j] & 15 : qs[j - 8] >> 4;
    }
}

void q1_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b);
    const auto bits = load_as<uint32_t>(b + 2 + 4 * i);
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = bits >> j & 1;
}

void q2_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b);
    for (int j = 0; j < K_BLOCK; j++) c.q[j] = b[2 + 8 * i + j / 4] >> 2 * (j % 4) & 3;
}

// Digit n, the highest being 0, of a fraction of 256 in base 3.
uint8_t ternary_digit(uint8_t fraction, int n) {
    for (; n > 0; n--) fraction = static_cast<uint8_t>(fraction * 3);
    return static_cast<uint8_t>(fraction * 3 >> 8);
}

// Five digits a byte: digit n of 32 bytes is columns 32n and so on, then that of 16 bytes; at last
// four digits of 4 bytes.
void tq1_0(const uint8_t* b, int i, Columns& c) {
    c.flat[0] = u16(b + 52);
    for (int j = 0; j < K_BLOCK; j++) {
        const int k = i * K_BLOCK + j;
        c.q[j] = k < 160   ? ternary_digit(b[k % 32], k / 32)
                 : k < 240 ? ternary_digit(b[32 + k % 16], (k - 160) / 16)
                           : ternary_digit(b[48 + k % 4], (k - 240) / 4);
    }
}

void tq2_0(const uint8_t* b, int i, Columns& c) {
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

const Source* source_of(int ggml_id) {
    for (const Source& s : SOURCES)
        if (s.ggml_id == ggml_id) return &s;
    return nullptr;
}

void put(uint8_t* dst, uint32_t word) { std::memcpy(dst, &word, 4); }

// The planes of one row's 32 values.
template <typename F>
void put_planes(const uint8_t* q, int row, uint8_t* planes) {
    uint32_t w[WORDS];
    std::memcpy(w, q, K_BLOCK);
    uint8_t* dst = planes + row * 4;
    if (F::BITS == 8) {
        for (int i = 0; i < WORDS; i++) put(dst + i * WORD_BYTES, w[i]);
        return;
    }
    int shift = 0;
    if (F::BITS >= 4) {
        for (int c = 0; c < 4; c++, dst += WORD_BYTES)
            put(dst, (w[2 * c] & 0x0f0f0f0f) | (w[2 * c + 1] & 0x0f0f0f0f) << 4);
        shift = 4;
    }
    if (F::BITS % 4 >= 2) {
        for (int h = 0; h < 2; h++, dst += WORD_BYTES) {
            uint32_t word = 0;
            for (int f = 0; f < 4; f++) word |= (w[4 * h + f] >> shift & 0x03030303) << 2 * f;
            put(dst, word);
        }
        shift += 2;
    }
    if (F::BITS % 2) {
        uint32_t word = 0;
        for (int i = 0; i < WORDS; i++) word |= (w[i] >> shift & 0x01010101) << i;
        put(dst, word);
    }
}

// The scales of one row, in front of a k-block's planes.
template <typename F>
void put_scales(const Columns& c, int row, uint8_t* k_block) {
    for (int g = 0; g < F::GROUPS; g++) {
        if (F::SCALE == Scale::HALVES) {
            uint8_t* scale = k_block + (g * PANEL + row) * 2;
            std::memcpy(scale, &c.flat[g], 2);
            if (F::HAS_MIN) std::memcpy(scale + F::SCALE_BYTES, &c.flat_min[g], 2);
        } else {
            uint8_t* scale = k_block + g * PANEL + row;
            scale[0] = c.scale[g];
            if (F::HAS_MIN) scale[F::SCALE_BYTES] = c.min[g];
        }
    }
}

// The units of one row, in front of a super-block. Values of FP4 are stored twofold, and their
// scales 2^-8 times.
template <typename F>
void put_units(const Columns& c, float factor, int row, uint8_t* head) {
    if (F::SCALE == Scale::SMALL_FLOATS) {
        const float unit = 128.0f * factor;
        std::memcpy(head + 4 * row, &unit, 4);
        return;
    }
    std::memcpy(head + 2 * row, &c.d, 2);
    if (F::HAS_MIN) std::memcpy(head + 2 * (PANEL + row), &c.d_min, 2);
}

// K-block by k-block, so that a panel is written once and in order.
template <typename F>
void pack_panel(F, const Source& s, const uint8_t* const* rows, int n_rows, int64_t n_in,
                float factor, uint8_t* panel) {
    if (n_rows < PANEL) std::memset(panel, 0, F::panel_bytes(n_in));
    const int per_block = s.block_elems / K_BLOCK;
    Columns c[PANEL];
    for (int64_t i = 0; i < n_in / K_BLOCK; i++) {
        const int64_t block = i / per_block;
        uint8_t* k_block = const_cast<uint8_t*>(F::k_block(panel, i));
        uint8_t* head = const_cast<uint8_t*>(F::super_block(panel, i));
        s.decode(rows, n_rows, block * s.block_bytes, static_cast<int>(i - block * per_block), c);
        for (int r = 0; r < n_rows; r++) {
            put_scales<F>(c[r], r, k_block);
            put_planes<F>(c[r].q, r, k_block + F::HEAD_BYTES);
            if (F::IS_SUPER && i % (SUPER / K_BLOCK) == 0) put_units<F>(c[r], factor, r, head);
        }
    }
}

// Columns of T of 16 rows side by side; rows that are not there are zeros.
template <typename T>
void interleave(const uint8_t* const* rows, int n_rows, int64_t n, uint8_t* panel) {
    T column[PANEL]{};
    for (int64_t k = 0; k < n; k++, panel += sizeof(column)) {
        for (int r = 0; r < n_rows; r++) column[r] = load_as<T>(rows[r] + k * sizeof(T));
        std::memcpy(panel, column, sizeof(column));
    }
}

template <Layout L>
void pack_panel(Plain<L>, const Source&, const uint8_t* const* rows, int n_rows, int64_t n_in,
                float, uint8_t* panel) {
    if (L == L_F32) return interleave<uint32_t>(rows, n_rows, n_in, panel);
    if (L == L_F16) return interleave<uint16_t>(rows, n_rows, n_in, panel);
    interleave<uint32_t>(rows, n_rows, n_in / 2, panel);
    if (n_in % 2 == 0) return;
    // The last column has no second one.
    for (int r = 0; r < PANEL; r++)
        put(panel + (n_in / 2 * PANEL + r) * 4, r < n_rows ? u16(rows[r] + (n_in - 1) * 2) : 0);
}

int stored_value(const uint8_t* planes, int bits, int row, int k) {
    const int word = k / 4, byte = row * 4 + k % 4;
    if (bits == 8) return planes[word * WORD_BYTES + byte];
    int value = 0, shift = 0;
    if (bits >= 4) {
        value = planes[word / 2 * WORD_BYTES + byte] >> 4 * (word % 2) & 15;
        planes += 4 * WORD_BYTES, shift = 4;
    }
    if (bits % 4 >= 2) {
        value |= (planes[word / 4 * WORD_BYTES + byte] >> 2 * (word % 4) & 3) << shift;
        planes += 2 * WORD_BYTES, shift += 2;
    }
    if (bits % 2) value |= (planes[byte] >> word & 1) << shift;
    return value;
}

float half_at(const uint8_t* p) { return half_to_float(u16(p)); }

template <typename F>
void decode(F, const uint8_t* panel, int row, int64_t n_in, float* out) {
    for (int64_t i = 0; i < n_in / K_BLOCK; i++) {
        const uint8_t *k_block = F::k_block(panel, i), *head = F::super_block(panel, i);
        for (int k = 0; k < K_BLOCK; k++) {
            const int at = k / F::GROUP * PANEL + row;
            float scale, min = 0;
            if (F::SCALE == Scale::BYTES) {
                const float s = F::HAS_MIN ? k_block[at] : static_cast<int8_t>(k_block[at]);
                scale = half_at(head + 2 * row) * s;
                if (F::HAS_MIN)
                    min = half_at(head + 2 * (PANEL + row)) * k_block[F::SCALE_BYTES + at];
            } else if (F::SCALE == Scale::SMALL_FLOATS) {
                const auto half = static_cast<uint16_t>(k_block[at] << 7);
                scale = half_to_float(half) * load_as<float>(head + 4 * row);
            } else if (F::SCALE == Scale::POWERS) {
                const uint32_t bits = static_cast<uint32_t>(k_block[at]) << 23;
                scale = load_as<float>(&bits);
            } else {
                scale = half_at(k_block + 2 * at);
                if (F::HAS_MIN) min = half_at(k_block + F::SCALE_BYTES + 2 * at);
            }
            int q = stored_value(k_block + F::HEAD_BYTES, F::BITS, row, k) << F::LOWEST;
            if (F::CODEBOOK)
                q = table_of<F>()[q];
            else if (F::SIGNED)
                q = static_cast<int8_t>(q);
            out[i * K_BLOCK + k] = scale * static_cast<float>(q - F::ZERO) - min;
        }
    }
}

template <Layout L>
void decode(Plain<L>, const uint8_t* panel, int row, int64_t n_in, float* out) {
    for (int64_t k = 0; k < n_in; k++) {
        if (L == L_F32) {
            out[k] = load_as<float>(panel + (k * PANEL + row) * 4);
        } else if (L == L_F16) {
            out[k] = half_at(panel + (k * PANEL + row) * 2);
        } else {
            const uint32_t high = u16(panel + (k / 2 * PANEL * 2 + row * 2 + k % 2) * 2);
            const uint32_t word = high << 16;
            std::memcpy(out + k, &word, 4);
        }
    }
}

}  // namespace

void decode_row(int32_t layout, const uint8_t* panel, int row, int64_t n_in, float* out) {
    with_format(layout, [&](auto f) { decode(f, panel, row, n_in, out); });
}

int64_t panel_bytes(int32_t layout, int64_t n_in) {
    return with_format(layout, [&](auto f) { return f.panel_bytes(n_in); });
}

int32_t layout_of(int ggml_id) {
    const Source* s = source_of(ggml_id);
    return s ? s->layout : -1;
}

void pack_rows(int ggml_id, const uint8_t* src, int64_t n_rows, int64_t n_in, float factor,
               uint8_t* dst, int64_t begin, int64_t end) {
    const Source& s = *source_of(ggml_id);
    const int64_t row_bytes = n_in / s.block_elems * s.block_bytes;
    with_format(s.layout, [&](auto f) {
        for (int64_t p = begin; p < end; p++) {
            const uint8_t* rows[PANEL];
            const int n = static_cast<int>(std::min<int64_t>(PANEL, n_rows - p * PANEL));
            for (int r = 0; r < n; r++) rows[r] = src + (p * PANEL + r) * row_bytes;
            pack_panel(f, s, rows, n, n_in, factor, dst + p * f.panel_bytes(n_in));
        }
    });
}

}  // namespace gdn
