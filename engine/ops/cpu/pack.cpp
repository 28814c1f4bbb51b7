// GGUF blocks into packed panels (see ../layout.h), and rows of panels back into float32.

#include "pack.h"

#include <algorithm>

#include "blocks.h"
#include "k_block.h"

namespace gdn {
namespace {

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
            out[i * K_BLOCK + k] = fma(scale, static_cast<float>(q - F::ZERO), -min);
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
