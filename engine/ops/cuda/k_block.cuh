// How a warp reads k-blocks of packed weights.
//
// repack.cu has put a k-block's words into the order of fragments of tensor cores, and nibbles of
// tables into that of their columns. Lane 4g + c of a
// warp holds columns 8c … 8c+7 (words 2c and 2c+1) of rows g and g + 8: its piece. It reads its
// words of a plane, and its scales, in one access each. A pair is all columns of rows g and g + 8;
// 8 lanes read 128 contiguous bytes of a pair at a time.
#pragma once

#include "kernel.cuh"
#include "layout.h"

namespace gdn {

// Words of a weight: in global memory, which is read once, or in shared memory.
struct FromGlobal {
    template <typename T>
    DEVICE static T words(const uint8_t* p) {
        return load_stream(reinterpret_cast<const T*>(p));
    }
};
struct FromShared {
    template <typename T>
    DEVICE static T words(const uint8_t* p) {
        return *reinterpret_cast<const T*>(p);
    }
};

// The tables of layout.h, four bytes a word; a nibble counts from the lowest byte of the first.
constexpr uint32_t IQ4_WORDS[4] = {0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535};
constexpr uint32_t FP4_WORDS[4] = {0x0f0e0d0c, 0x18141210, 0x090a0b0c, 0x00040608};

// Part `part` of the table's values for 8 nibbles, which count from the lowest: 4 in each word. Of
// FP4, part 0 has values of the table's first half and 0 in place of the others, part 1 the reverse.
template <Values VALUES>
DEVICE void look_up(uint32_t nibbles, int part, uint32_t (&words)[2]) {
    constexpr bool IS_FP4 = VALUES == Values::FP4;
    constexpr const uint32_t (&T)[4] = IS_FP4 ? FP4_WORDS : IQ4_WORDS;
    const uint32_t low = nibbles & 0x77777777, high = nibbles >> 3 & 0x11111111;
    if (part == 1) nibbles ^= 0x88888888;
    for (int i = 0; i < 2; i++) {
        const int at = 16 * i;
        if (IS_FP4) {
            // Where a nibble's highest bit is set the byte is 0: none in the table has its own.
            words[i] = permute_or_fill(T[2 * part], T[2 * part + 1], nibbles >> at);
        } else {
            const uint32_t mask = permute_bytes(0x0000ff00, 0, high >> at);
            words[i] = (permute_bytes(T[2], T[3], low >> at) & mask) |
                       (permute_bytes(T[0], T[1], low >> at) & ~mask);
        }
    }
}

template <typename F>
struct Piece {
    static constexpr bool IS_BYTES = F::BITS == 8;
    static constexpr int NIBBLE = !IS_BYTES && F::BITS >= 4 ? 4 : 0;
    static constexpr int PAIR = !IS_BYTES && F::BITS % 4 >= 2 ? 2 : 0;
    static constexpr int BIT = F::BITS % 2;
    // Unsigned values whose zero is in their middle are shifted to a byte's highest bits: with the
    // highest one turned round these are signed bytes, UNIT times the values. Of OFFSET formats a
    // multiple of the activations' sum is missing.
    static constexpr bool SHIFTED =
        !F::CODEBOOK && F::BITS > 1 && F::BITS < 8 && F::ZERO > 0 && F::ZERO == 1 << (F::BITS - 1);
    static constexpr int SHIFT = SHIFTED ? 8 - F::BITS : 0, UNIT = 1 << SHIFT;
    static constexpr bool OFFSET = F::HAS_MIN || (F::ZERO > 0 && !SHIFTED);
    // Bytes of scales (and mins) of rows g and g + 8.
    static constexpr int HEAD = F::HEAD_BYTES / 8;
    static constexpr int PAIRS_AT = F::HEAD_BYTES + NIBBLE * WORD_BYTES;
    static constexpr int BITS_AT = PAIRS_AT + PAIR * WORD_BYTES;

    // The indices in `planes` of the planes of 2 bits and of 1 bit.
    static constexpr int PAIRS = NIBBLE ? 2 : 0, BITS = PAIRS + PAIR;

    uint32_t planes[4], head[2];

    template <typename Memory = FromGlobal>
    DEVICE void load(const uint8_t* k_block, int lane, Memory = {}) {
        const int g = lane / 4, c = lane % 4;
        const auto two = [](const uint8_t* p) { return Memory::template words<Words2>(p); };
        const uint8_t* at = k_block + F::HEAD_BYTES;
        if (IS_BYTES) {
            const Words4 v = Memory::template words<Words4>(at + (8 * c + g) * 16);
            for (int i = 0; i < 4; i++) planes[i] = v.w[i];
        }
        if (NIBBLE) put(planes, two(at + (c / 2 * 8 + g) * 16 + c % 2 * 8));
        if (PAIR) put(planes + PAIRS, two(k_block + PAIRS_AT + (2 * g + c / 2) * 8));
        if (BIT) put(planes + BITS, two(k_block + BITS_AT + g * 8));
        at = k_block + g * HEAD;
        if (HEAD == 8) put(head, two(at));
        if (HEAD == 4) head[0] = Memory::template words<uint32_t>(at);
        if (HEAD == 2) head[0] = *reinterpret_cast<const uint16_t*>(at);
    }
    DEVICE static void put(uint32_t* to, Words2 v) { to[0] = v.w[0], to[1] = v.w[1]; }

    DEVICE void clear() {
        for (int i = 0; i < 4; i++) planes[i] = 0;
        head[0] = head[1] = 0;
    }

    // Word 2c of rows g and g + 8, then word 2c + 1 of both: signed bytes, UNIT times the values, or
    // times values and ZERO where the format is OFFSET. They are the sum of PARTS parts, which a
    // product may add up.
    static constexpr int PARTS = F::VALUES == Values::FP4 ? 2 : 1;

    DEVICE void words(int c, uint32_t (&a)[4]) const {
        part(0, c, a);
        if (PARTS == 1) return;
        uint32_t more[4];
        part(1, c, more);
        for (int i = 0; i < 4; i++) a[i] |= more[i];
    }

    DEVICE void part(int number, int c, uint32_t (&a)[4]) const {
        for (int i = 0; i < 2; i++) {
            if (IS_BYTES) {
                a[i] = planes[i], a[i + 2] = planes[i + 2];
                continue;
            }
            a[i] = a[i + 2] = 0;
            if (F::CODEBOOK) {
                uint32_t both[2];
                look_up<F::VALUES>(planes[i], number, both);
                a[i] = both[0], a[i + 2] = both[1];
                continue;
            }
            if (NIBBLE) {
                a[i] = move<4, 0, SHIFT>(planes[i]);
                a[i + 2] = move<4, 4, SHIFT>(planes[i]);
            }
            if (PAIR) {
                const uint32_t v = planes[PAIRS + i] >> 4 * (c % 2);
                a[i] |= move<2, 0, NIBBLE + SHIFT>(v);
                a[i + 2] |= move<2, 2, NIBBLE + SHIFT>(v);
            }
            if (BIT) {
                const uint32_t v = planes[BITS + i] >> 2 * c;
                a[i] |= move<1, 0, NIBBLE + PAIR + F::LOWEST + SHIFT>(v);
                a[i + 2] |= move<1, 1, NIBBLE + PAIR + F::LOWEST + SHIFT>(v);
            }
            if (SHIFT) a[i] ^= 0x80808080, a[i + 2] ^= 0x80808080;
        }
    }

    // WIDTH bits of each byte, from bit FROM on, at bit TO.
    template <int WIDTH, int FROM, int TO>
    DEVICE static uint32_t move(uint32_t v) {
        constexpr uint32_t MASK = (((1u << WIDTH) - 1) << TO) * 0x01010101u;
        return (TO < FROM ? v >> (FROM - TO) % 32 : v << (TO - FROM) % 32) & MASK;
    }

    // Number `at` of the scales and mins, (min · GROUPS + group) · 2 + row / 8, times the unit.
    DEVICE float number(int at, float unit) const {
        if (F::SCALE == Scale::BYTES) {
            // The byte in the lowest bits of 2^23, where signed ones count from -128.
            const uint32_t bytes = F::HAS_MIN ? head[at / 4] : head[at / 4] ^ 0x80808080;
            const float n = float_of(permute_bytes(bytes, 0x4B000000, 0x7650 + at % 4));
            if (F::HAS_MIN) return fmaf(n, unit, -8388608.0f * unit);
            return (n - 8388736.0f) * unit;
        }
        return unit * stored_float(at);
    }
    DEVICE float stored_float(int at) const {
        if (F::SCALE == Scale::HALVES)
            return half_to_float(static_cast<uint16_t>(head[at / 2] >> 16 * (at % 2)));
        const uint32_t byte = head[at / 4] >> 8 * (at % 4) & 0xff;
        if (F::SCALE == Scale::POWERS) return float_of(byte << 23);
        // 2^-8 times: as float16, whose exponent has one bit more and counts 8 less.
        return half_to_float(static_cast<uint16_t>(byte << 7));
    }
};

// All columns of rows g and g + 8 of a k-block: four pieces. K-blocks lie in shared memory.
template <typename F>
struct Pair {
    using P = Piece<F>;
    static constexpr int N_WORDS = P::IS_BYTES ? 16 : 8;

    uint32_t words[N_WORDS], pairs[4], bits[2], head[2];

    DEVICE void load(const uint8_t* k_block, int g) {
        const uint8_t* at = k_block + F::HEAD_BYTES + g * 16;
        if (P::IS_BYTES || P::NIBBLE)
            for (int i = 0; i < N_WORDS / 4; i++) put(words + 4 * i, at + i * 128);
        if (P::PAIR) put(pairs, k_block + P::PAIRS_AT + g * 16);
        if (P::BIT) P::put(bits, *reinterpret_cast<const Words2*>(k_block + P::BITS_AT + g * 8));
        at = k_block + g * P::HEAD;
        if (P::HEAD == 8) P::put(head, *reinterpret_cast<const Words2*>(at));
        if (P::HEAD == 4) head[0] = *reinterpret_cast<const uint32_t*>(at);
        if (P::HEAD == 2) head[0] = *reinterpret_cast<const uint16_t*>(at);
    }
    DEVICE static void put(uint32_t* to, const uint8_t* from) {
        const Words4 v = *reinterpret_cast<const Words4*>(from);
        for (int i = 0; i < 4; i++) to[i] = v.w[i];
    }

    DEVICE void clear() {
        for (int i = 0; i < N_WORDS; i++) words[i] = 0;
        for (int i = 0; i < 4; i++) pairs[i] = 0;
        for (int i = 0; i < 2; i++) bits[i] = head[i] = 0;
    }

    // Columns 8c … 8c+7.
    DEVICE Piece<F> piece(int c) const {
        Piece<F> p;
        for (int i = 0; i < 2; i++) {
            if (P::IS_BYTES) p.planes[i] = words[4 * c + i], p.planes[i + 2] = words[4 * c + i + 2];
            if (P::NIBBLE) p.planes[i] = words[2 * c + i];
            if (P::PAIR) p.planes[P::PAIRS + i] = pairs[c / 2 * 2 + i];
            if (P::BIT) p.planes[P::BITS + i] = bits[i];
            p.head[i] = head[i];
        }
        return p;
    }
};

// The units of a super-block's scales and mins, for rows g and g + 8; 1 without super-blocks.
template <typename F>
struct Super {
    float scale[2], min[2];

    // As they are stored.
    DEVICE static void fetch(const uint8_t* block, int lane, uint32_t (&raw)[2]) {
        if (!F::IS_SUPER) return;
        constexpr int N = F::SUPER_HEAD / 32;
        const auto* at = reinterpret_cast<const uint32_t*>(block) + lane / 4 * N;
        for (int i = 0; i < N; i++) raw[i] = at[i];
    }

    DEVICE explicit Super(const uint32_t (&raw)[2]) {
        for (int i = 0; i < 2; i++) {
            scale[i] = min[i] = 1.0f;
            if (F::SCALE == Scale::SMALL_FLOATS) scale[i] = float_of(raw[i]);
            if (F::SCALE == Scale::BYTES)
                scale[i] = half_to_float(static_cast<uint16_t>(raw[0] >> 16 * i));
            if (F::SCALE == Scale::BYTES && F::HAS_MIN)
                min[i] = half_to_float(static_cast<uint16_t>(raw[1] >> 16 * i));
        }
    }
};

template <typename F>
DEVICE float scale_of(const Piece<F>& piece, const Super<F>& super, int group, int i) {
    return piece.number(group * 2 + i, super.scale[i]);
}
// What is subtracted for each unit of the activations' sum, of OFFSET formats.
template <typename F>
DEVICE float offset_of(const Piece<F>& piece, const Super<F>& super, int group, int i) {
    if (!F::HAS_MIN) return static_cast<float>(F::ZERO) * scale_of(piece, super, group, i);
    return piece.number((F::GROUPS + group) * 2 + i, super.min[i]);
}

// Values of columns 8c … 8c+7 of rows g (i = 0) or g + 8 (i = 1).
template <typename F>
DEVICE void decode(const Piece<F>& piece, const Super<F>& super, int c, int i, float (&v)[8]) {
    uint32_t a[4];
    piece.words(c, a);
    const int group = F::GROUPS == 2 ? c / 2 : 0;
    const float scale = scale_of(piece, super, group, i) * (1.0f / Piece<F>::UNIT);
    const float min = F::HAS_MIN ? offset_of(piece, super, group, i) : 0.0f;
    constexpr bool SIGNED = F::SIGNED || Piece<F>::SHIFTED;
    constexpr int ZERO = Piece<F>::OFFSET ? F::ZERO : 0;
    for (int k = 0; k < 8; k++) {
        const uint32_t byte = a[i + k / 4 * 2] >> 8 * (k % 4);
        const int32_t q = SIGNED ? static_cast<int8_t>(byte) : static_cast<int32_t>(byte & 0xff);
        v[k] = scale * static_cast<float>(q - ZERO) - min;
    }
}

DEVICE const uint8_t* panel_at(const View& w, int64_t p) {
    return w.as<uint8_t>() + p * w.stride[w.rank - 2];
}
DEVICE int n_panels(const View& w) { return (w.shape[w.rank - 2] + PANEL - 1) / PANEL; }

}  // namespace gdn
