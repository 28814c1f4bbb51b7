// Weights to bfloat16, in float32 arithmetic and rounded once.

#include "expand.h"

#include "record.h"

namespace gdn {

namespace {

// Byte j of every lane as float32.
template <typename F, int J>
GDN_INLINE vf byte_of(vi word) {
    return to_float(F::SIGNED ? word << (24 - 8 * J) >> 24 : word >> 8 * J & 255);
}

// Group G's words of a record: q · scale + offset, two columns a store.
template <typename F, int G>
GDN_INLINE void expand_group(const uint8_t* record, const vf* super, int p, bf16* tile) {
    constexpr int N = WORDS / F::GROUPS;
    const vf scale = scale_of<F, G>(record, p) * super[0];
    vf offset = scale * -static_cast<float>(F::ZERO);
    if constexpr (F::HAS_MIN) offset -= min_of<F, G>(record, p) * super[1];
    const auto value = [&](vf q) { return F::ZERO || F::HAS_MIN ? q * scale + offset : q * scale; };
    for_constants<G * N, (G + 1) * N>([&](auto i) __attribute__((always_inline)) {
        const vi w = word<F, i>(record + F::HEAD_BYTES, p);
        bf16* to = tile + i * 4 * ROWS + p * 2 * W;
        const vi first = bf16_pairs(value(byte_of<F, 0>(w)), value(byte_of<F, 1>(w)));
        const vi second = bf16_pairs(value(byte_of<F, 2>(w)), value(byte_of<F, 3>(w)));
        std::memcpy(to, &first, sizeof(vi));
        std::memcpy(to + 2 * ROWS, &second, sizeof(vi));
    });
}

template <typename F>
const bf16* expand_records(F, const uint8_t* panel, int64_t begin, int64_t end, bf16* room) {
    for (int64_t i = begin; i < end; i++) {
        const uint8_t *record = F::record(panel, i), *block = F::super_block(panel, i);
        bf16* tile = room + (i - begin) * TILE_SIZE;
        for (int b = 0; b < F::RECORD_BYTES; b += 64) __builtin_prefetch(record + b + AHEAD);
        for (int p = 0; p < PARTS; p++) {
            vf super[2] = {super_of<F>(block, p), vf{}};
            if constexpr (F::HAS_MIN) super[1] = super_of<F>(block, PARTS + p);
            expand_group<F, 0>(record, super, p, tile);
            if constexpr (F::GROUPS == 2) expand_group<F, 1>(record, super, p, tile);
        }
    }
    return room;
}

template <Layout L>
const bf16* expand_records(Plain<L>, const uint8_t* panel, int64_t begin, int64_t, bf16*) {
    return reinterpret_cast<const bf16*>(panel) + begin * TILE_SIZE;
}

}  // namespace

const bf16* expand(int32_t layout, const uint8_t* panel, int64_t begin, int64_t end, bf16* room) {
    return with_format(layout, [&](auto f) { return expand_records(f, panel, begin, end, room); });
}

}  // namespace gdn
