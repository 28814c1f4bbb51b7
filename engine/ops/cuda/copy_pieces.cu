// Copies pieces of memory, of the device or pinned on the host: [n, 3] 64-bit (target, source,
// bytes), at least one byte each and multiples of 4. Not an op: what the prefix cache keeps on the
// host goes there, and comes back, in one launch over all layers.

#include "vectors.cuh"

// Grid: (n, 1, 1).
KERNEL(copy_pieces) {
    using namespace gdn;
    const uint64_t* piece = a.v[0].as<const uint64_t>() + 3 * static_cast<int64_t>(blockIdx.x);
    const uint64_t to = piece[0], from = piece[1], n = piece[2];
    if ((to | from | n) % sizeof(Words4)) {
        auto* target = reinterpret_cast<uint32_t*>(to);
        const auto* source = reinterpret_cast<const uint32_t*>(from);
        for (uint64_t i = threadIdx.x; i < n / 4; i += blockDim.x) target[i] = source[i];
        return;
    }
    auto* target = reinterpret_cast<Words4*>(to);
    const auto* source = reinterpret_cast<const Words4*>(from);
    const uint64_t n_words = n / sizeof(Words4);
    // Several loads under way: the host's memory answers after a microsecond.
    constexpr int IN_FLIGHT = 4;
    for (uint64_t i = threadIdx.x; i < n_words; i += IN_FLIGHT * blockDim.x) {
        Words4 words[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const uint64_t at = i + k * blockDim.x;
            if (at < n_words) words[k] = source[at];
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const uint64_t at = i + k * blockDim.x;
            if (at < n_words) target[at] = words[k];
        }
    }
}
