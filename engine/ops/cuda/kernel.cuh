// The argument of every CUDA kernel, and device functions that many kernels use.
//
// A launch has operands (`View`s: the outputs, then the inputs in the order of the op's
// `operands`, which the kernel's enum repeats; an absent one has data == nullptr), attributes, and
// the live counts of the batch. These lie in device memory, so a captured launch serves every batch
// up to the sizes of its capture: grids are sized for the most rows, and thread blocks past the
// live rows return at once.
//
// Kernels are plain CUDA C++17 for NVRTC without system headers. Code that needs PTX is a function
// of primitives.cuh, so that tests can run kernels without a GPU.
#pragma once

#include "primitives.cuh"
#include "view.h"

namespace gdn {

// A row-major array or a strided part of one; strides count elements. A weight in a packed layout
// has dtype PACKED, its layout's number, and the layout's strides in bytes (see layout.h); the last
// stride is that of a batch of k-blocks, and `head` the bytes of a super-block's head.
struct View {
    char* data;
    int32_t shape[MAX_RANK];
    int32_t stride[MAX_RANK];
    int8_t rank, dtype, dim, layout;
    int32_t head;

    template <typename T>
    DEVICE T* as() const {
        return reinterpret_cast<T*>(data);
    }
    // The address of entry i of the first axis, or of entry j of its second axis.
    DEVICE float* row(int64_t i) const { return as<float>() + i * stride[0]; }
    DEVICE float* row(int64_t i, int64_t j) const { return row(i) + j * stride[1]; }
    DEVICE explicit operator bool() const { return data != nullptr; }
};

struct Args {
    View v[MAX_VIEWS];
    float attr[MAX_ATTRS];
    const int32_t* live;  // [N_DIMS]

    // The live size of a view's first axis.
    DEVICE int32_t rows(const View& view) const {
        return view.dim ? live[view.dim] : view.shape[0];
    }
};

static_assert(sizeof(View) == VIEW_BYTES && sizeof(Args) == ARGS_BYTES, "as in args.py");
// Dynamic shared memory of kernel NAME, whose size is the same for every launch.
#define KERNEL_SHARED(NAME, MEMORY, BYTES)                                              \
    static_assert((BYTES) == gdn::SHARED_##NAME, "bytes of shared memory, kernels.py"); \
    DYNAMIC_SHARED(MEMORY)

// The sequence that row t belongs to.
DEVICE int32_t sequence_of(const int32_t* seq_starts, int32_t n_seqs, int32_t t) {
    int32_t low = 0, high = n_seqs;
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (seq_starts[middle] <= t ? low : high) = middle;
    }
    return low;
}

DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uint64_t>(p) % 16 == 0; }
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp_fast(-fmaxf(x, -80.0f))); }
DEVICE float silu(float x) { return x * sigmoid(x); }

// The sum over a warp, in every lane; always added in the same order.
DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// The sum over a thread block, in every thread; `shared` has 32 floats. Begins and ends with a
// barrier.
DEVICE float block_sum(float x, float* shared) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    const int n_warps = (blockDim.x + 31) / 32;
    float total = 0.0f;
    for (int i = 0; i < n_warps; i++) total += shared[i];
    return total;
}

}  // namespace gdn
