// REPACK: puts the k-blocks of an uploaded weight into the order that k_block.cuh reads, in place.

#include "k_block.cuh"

namespace gdn {

// Where element `at` of the reordered scales and mins comes from.
template <typename F>
DEVICE int head_source(int at) {
    constexpr int PER_LANE = 2 * F::GROUPS * (F::HAS_MIN ? 2 : 1);
    const int g = at / PER_LANE, kind = at % PER_LANE / 2, high = at % 2;
    return kind * PANEL + g + 8 * high;
}

// Where word `at` of the reordered planes comes from.
template <typename F>
DEVICE int word_source(int at) {
    using P = Piece<F>;
    const int g = at / 4 % 8, c = at / 32;
    if (P::IS_BYTES) return (2 * c + at % 4 / 2) * PANEL + g + 8 * (at % 2);
    if (at < P::NIBBLE * PANEL) return (2 * c + at % 4 / 2) * PANEL + g + 8 * (at % 2);
    int base = P::NIBBLE * PANEL, i = at - base;
    if (i < P::PAIR * PANEL) return base + i / 2 % 2 * PANEL + i / 4 + 8 * (i % 2);
    base += P::PAIR * PANEL, i = at - base;
    return base + i / 2 + 8 * (i % 2);
}

// The nibbles of the lower halves of bytes, and above them those of the upper halves.
DEVICE uint32_t apart(uint32_t word) {
    uint32_t half[2];
    for (int i = 0; i < 2; i++) {
        uint32_t v = word >> 4 * i & 0x0f0f0f0f;
        v = (v | v >> 4) & 0x00ff00ff;
        half[i] = (v | v >> 8) & 0xffff;
    }
    return half[0] | half[1] << 16;
}

// Reorders the n halves or bytes of a head; called by all threads of the block.
template <typename F, typename T>
DEVICE void reorder_head(T* head, int n) {
    const int i = threadIdx.x;
    T value{};
    if (i < n) value = head[head_source<F>(i)];
    __syncthreads();
    if (i < n) head[i] = value;
}

template <typename F>
DEVICE void reorder(F, uint8_t* panel, int i) {
    uint8_t* k_block = const_cast<uint8_t*>(F::k_block(panel, i));
    constexpr int N_WORDS = (F::K_BLOCK_BYTES - F::HEAD_BYTES) / 4;
    auto* words = reinterpret_cast<uint32_t*>(k_block + F::HEAD_BYTES);
    uint32_t word = 0;
    const int at = threadIdx.x;
    if (at < N_WORDS) word = words[word_source<F>(at)];
    __syncthreads();
    if (at < N_WORDS) words[at] = F::CODEBOOK ? apart(word) : word;
    if (F::SCALE == Scale::HALVES)
        reorder_head<F>(reinterpret_cast<uint16_t*>(k_block), F::HEAD_BYTES / 2);
    else
        reorder_head<F>(k_block, F::HEAD_BYTES);
    if (!F::IS_SUPER || i % BATCH != 0) return;
    uint8_t* block = const_cast<uint8_t*>(F::super_block(panel, i));
    // A super-block's scale and min per row are ordered like those of one group.
    using One = Format<8, K_BLOCK, Scale::BYTES, F::HAS_MIN, 0>;
    if (F::UNIT_BYTES == 4)
        reorder_head<One>(reinterpret_cast<uint32_t*>(block), F::SUPER_HEAD / 4);
    else
        reorder_head<One>(reinterpret_cast<uint16_t*>(block), F::SUPER_HEAD / 2);
}

template <Layout L>
DEVICE void reorder(Plain<L>, uint8_t*, int) {}

}  // namespace gdn

// Grid: (k-blocks, panels, matrices).
KERNEL(repack) {
    using namespace gdn;
    const View& w = a.v[0];
    uint8_t* matrix = w.as<uint8_t>();
    if (w.rank == 3) matrix += static_cast<int64_t>(blockIdx.z) * w.stride[0];
    uint8_t* panel = matrix + static_cast<int64_t>(blockIdx.y) * w.stride[w.rank - 2];
    with_format(w.layout, [&](auto f) { reorder(f, panel, blockIdx.x); });
}
