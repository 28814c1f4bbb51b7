// Weights to bfloat16, in float32 arithmetic and rounded once.
//
// A value's bits go into the mantissa of a float, which then is the value plus a constant; the
// constant is subtracted together with the zero and the min. The result is exact where scales are
// float16 and there are no mins, else off by at most 2^-8 of a step.

#include "expand.h"

#include "k_block.h"

namespace gdn {
namespace {

// Positions of values' bits in the mantissas: of a word's bytes 0 and 2, which are shifted together
// with the next byte's, and of bytes 1 and 3.
template <typename F>
constexpr int EVEN = 23 - 8 - F::LOWEST - F::WIDTH;
template <typename F>
constexpr int ODD = EVEN<F> + 8;

// The constant that `mantissa` adds to a value whose bits lie at AT.
template <typename F, int AT>
constexpr int BIAS = (1 << (23 - AT)) + (F::SIGNED ? 128 : 0);

// BIAS + a value as float32, of the bits at AT of each lane.
template <typename F, int AT>
GDN_INLINE vf mantissa(vi v) {
    constexpr int SIGN = F::SIGNED ? 128 : 0, MASK = ((1 << F::WIDTH) - 1) << F::LOWEST;
    constexpr int EXPONENT = 127 + 23 - AT;
    return from_bits((v & MASK << AT) ^ (EXPONENT << 23 | SIGN << AT));
}

// Word I with its bytes' values from bit FIRST_BIT of each byte on; other bits are not cleared.
template <typename F, int I>
constexpr int FIRST_BIT = 8 % F::BITS || F::CODEBOOK ? 0 : F::BITS * I % 8 - F::LOWEST;

template <typename F, int I>
GDN_INLINE vi rough_word(const uint8_t* planes, int p) {
    constexpr int BITS = F::BITS;
    if constexpr (F::CODEBOOK) return word<F, I>(planes, p);
    planes += p * 4 * W;
    if constexpr (8 % BITS == 0) {
        return load_as<vi>(planes + I * BITS / 8 * WORD_BYTES);
    } else {
        // The larger plane, and above its bits those of the smaller one.
        constexpr int LOW = BITS >= 4 ? 4 : 2, HIGH = BITS - LOW;
        const auto* low = planes + I * LOW / 8 * WORD_BYTES;
        const auto* high = planes + (LOW + I * HIGH / 8) * WORD_BYTES;
        const vi mask = splat(((1 << HIGH) - 1) * 0x01010101 << LOW);
        return select_bits(mask, shifted<LOW - I * HIGH % 8>(load_as<vi>(high)),
                           shifted<-(I * LOW % 8)>(load_as<vi>(low)));
    }
}

// Group G's words of a k-block: q · scale + offset, two columns a store.
template <typename F, int G>
GDN_INLINE void expand_group(const uint8_t* k_block, const vf* super, int p, bf16* tile) {
    constexpr int N = WORDS / F::GROUPS;
    const vf scale = scale_of<F, G>(k_block, p) * super[0];
    vf min{};
    if constexpr (F::HAS_MIN) min = min_of<F, G>(k_block, p) * super[1];
    const auto offset = [&](int bias) {
        return fma(scale, splat(-static_cast<float>(bias + F::ZERO)), -min);
    };
    const vf even = offset(BIAS<F, EVEN<F>>), odd = offset(BIAS<F, ODD<F>>);
    const auto put_pair = [&](bf16* to, vi v) __attribute__((always_inline)) {
        const vi pairs = bf16_pairs(fma(mantissa<F, EVEN<F>>(v), scale, even),
                                    fma(mantissa<F, ODD<F>>(v), scale, odd));
        std::memcpy(to, &pairs, sizeof(vi));
    };
    for_constants<G * N, (G + 1) * N>([&](auto i) __attribute__((always_inline)) {
        constexpr int SHIFT = EVEN<F> - FIRST_BIT<F, i>;
        const vi w = rough_word<F, i>(k_block + F::HEAD_BYTES, p);
        bf16* to = tile + i * 4 * PANEL + p * 2 * W;
        put_pair(to, shifted<SHIFT>(w));
        put_pair(to + 2 * PANEL, shifted<SHIFT - 16>(w));
    });
}

template <typename F>
const bf16* expand_k_blocks(F, const uint8_t* panel, int64_t begin, int64_t end, bf16* room) {
    vf super[PARTS][2] = {};
    for (int64_t i = begin; i < end; i++) {
        const uint8_t *k_block = F::k_block(panel, i), *block = F::super_block(panel, i);
        bf16* tile = room + (i - begin) * TILE_SIZE;
        prefetch_ahead<F::K_BLOCK_BYTES>(k_block);
        for (int p = 0; p < PARTS; p++) {
            if (i == begin || i % (SUPER / K_BLOCK) == 0) {
                super[p][0] = super_of<F>(block, p);
                if constexpr (F::HAS_MIN) super[p][1] = super_of<F>(block, PARTS + p);
            }
            expand_group<F, 0>(k_block, super[p], p, tile);
            if constexpr (F::GROUPS == 2) expand_group<F, 1>(k_block, super[p], p, tile);
        }
    }
    return room;
}

template <Layout L>
const bf16* expand_k_blocks(Plain<L>, const uint8_t* panel, int64_t begin, int64_t, bf16*) {
    return reinterpret_cast<const bf16*>(panel) + begin * TILE_SIZE;
}

}  // namespace

const bf16* expand(int32_t layout, const uint8_t* panel, int64_t begin, int64_t end, bf16* room) {
    return with_format(layout, [&](auto f) { return expand_k_blocks(f, panel, begin, end, room); });
}

}  // namespace gdn
