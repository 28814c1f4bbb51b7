// Each primitive on data of the host, for a test to compare with.

#include "kernel.cuh"

namespace gdn {

enum { OUT, IN, MORE };

}  // namespace gdn

// Rows of OUT: shuffles of IN, ballot of its sign, the warp's sum, highest and lowest bits.
KERNEL_OF(warps, 64) {
    using namespace gdn;
    const int i = threadIdx.x, lane = i % 32;
    const float x = a.v[IN].row(0)[i];
    float rows[8] = {shuffle_xor(x, 5), shuffle(x, 31 - lane), shuffle_down(x, 3),
                     shuffle_up(x, 3),  warp_sum(x),           warp_max(x)};
    rows[6] = static_cast<float>(ballot(x < 0.0f) >> lane & 1);
    rows[7] = __uint_as_float(warp_highest(__float_as_uint(x)) - warp_lowest(__float_as_uint(x)));
    for (int r = 0; r < 8; r++) a.v[OUT].row(r)[i] = rows[r];
}

// OUT = IN · MOREᵀ, [16, 16] and [8, 16] bfloat16, through shared memory and load_matrices; then
// the same from transposed matrices; then both in half.
KERNEL_OF(matrices, 32) {
    using namespace gdn;
    __shared__ __align__(16) uint16_t x[2][16][24], y[2][16][24];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        const uint16_t v = a.v[IN].as<uint16_t>()[i];
        x[0][i / 16][i % 16] = x[1][i % 16][i / 16] = v;
        if (i < 128) {
            const uint16_t w = a.v[MORE].as<uint16_t>()[i];
            y[0][i / 16][i % 16] = y[1][i % 16][i / 16] = w;
        }
    }
    sync_warp();
    for (int turned = 0; turned < 2; turned++) {
        uint32_t m[4], n[4];
        const int r = lane % 8, k = lane / 8;
        if (turned) {
            load_matrices_transposed(m, &x[1][r + k / 2 * 8][k % 2 * 8]);
            load_matrices_transposed(n, &y[1][r + k % 2 * 8][0]);
        } else {
            load_matrices(m, &x[0][r + k % 2 * 8][k / 2 * 8]);
            load_matrices(n, &y[0][r][k % 2 * 8]);
        }
        for (int half = 0; half < 2; half++) {
            float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
            half ? multiply_half(d, m, n[0], n[1]) : multiply_bf16(d, m, n[0], n[1]);
            float* out = a.v[OUT].row(2 * turned + half);
            for (int e = 0; e < 4; e++)
                out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
        }
    }
}

// A sum over the block; the thread's number turned around through shared memory.
KERNEL_OF(blocks, 1024) {
    using namespace gdn;
    __shared__ float sums[32];
    DYNAMIC_SHARED(bytes);
    float* turned = reinterpret_cast<float*>(bytes);
    const int i = threadIdx.x, n = blockDim.x;
    turned[n - 1 - i] = a.v[IN].row(0)[i];
    __syncthreads();
    float* out = a.v[OUT].row(blockIdx.x) + blockIdx.y * 2 * n;
    out[i] = turned[i];
    out[n + i] = block_sum(turned[i], sums);
}

// float16 and bfloat16 of each IN, and back.
KERNEL_OF(conversions, 128) {
    using namespace gdn;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.v[IN].shape[0]) return;
    const float x = a.v[IN].as<float>()[i];
    const uint16_t h = float_to_half(x), b = float_to_bf16(x);
    a.v[OUT].as<uint32_t>()[i] = h | static_cast<uint32_t>(b) << 16;
    a.v[MORE].row(0)[i] = half_to_float(h);
    a.v[MORE].row(1)[i] = bf16_to_float(b);
}

// Dot products of bytes, and copies in two groups.
KERNEL_OF(bytes, 32) {
    using namespace gdn;
    __shared__ __align__(16) int32_t words[32][8];
    const int lane = threadIdx.x;
    const int32_t* in = a.v[IN].as<int32_t>() + 8 * lane;
    copy_async(&words[lane][0], in);
    fence_copies();
    copy_async(&words[lane][4], in + 4, lane % 2 == 0);
    fence_copies();
    wait_copies<1>();
    int32_t* out = a.v[OUT].as<int32_t>() + 4 * lane;
    out[0] = dot4(words[lane][0], words[lane][1], words[lane][2]);
    out[1] = dot4_unsigned(words[lane][0], words[lane][1], words[lane][2]);
    out[2] = words[lane][4];
    wait_copies<0>();
    out[3] = words[lane][4];
}
