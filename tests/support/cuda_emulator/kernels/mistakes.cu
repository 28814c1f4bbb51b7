// What must not be done, one kernel each; a launch of any must end with an error.

#include "kernel.cuh"

KERNEL_OF(return_before_barrier, 64) {
    if (threadIdx.x == 7) return;
    __syncthreads();
}

KERNEL_OF(return_before_shuffle, 64) {
    if (threadIdx.x % 32 < 16) return;
    a.v[0].row(0)[threadIdx.x] = gdn::shuffle_xor(1.0f, 1);
}

KERNEL_OF(divergent_shuffles, 64) {
    const float x = threadIdx.x % 2 ? gdn::shuffle_xor(1.0f, 1) : gdn::shuffle_down(1.0f, 1);
    a.v[0].row(0)[threadIdx.x] = x;
}

KERNEL_OF(divergent_barriers, 64) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

KERNEL_OF(barrier_and_shuffle, 32) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        gdn::sync_warp();
}

KERNEL_OF(beyond_dynamic, 64) {
    DYNAMIC_SHARED(bytes);
    bytes[threadIdx.x] = 0;
}

KERNEL_OF(beyond_static, 64) {
    __shared__ float words[63];
    words[threadIdx.x] = 0.0f;
    a.v[0].row(0)[threadIdx.x] = words[threadIdx.x];
}

KERNEL_OF(beyond_memory, 64) { a.v[0].row(0)[64 + threadIdx.x] = 0.0f; }

KERNEL_OF(rehearsal_that_writes, 64) {
    if (threadIdx.x == 7) a.v[0].row(0)[7] = 1.0f;
    __syncthreads();
    gdn::wait_for_inputs();
}

KERNEL_OF(misaligned, 64) {
    a.v[0].row(0)[threadIdx.x] = reinterpret_cast<const float4*>(a.v[1].row(0) + threadIdx.x)->x;
}

KERNEL_OF(misaligned_stream, 64) {
    using namespace gdn;
    const auto* p = reinterpret_cast<const Words2*>(a.v[1].as<uint32_t>() + threadIdx.x);
    a.v[0].as<uint32_t>()[threadIdx.x] = load_stream(p).w[0];
}

KERNEL_OF(absent, 64) { a.v[5].row(0)[threadIdx.x] = 0.0f; }

KERNEL_OF(wild, 64) { a.v[0].row(int64_t{1} << 40)[threadIdx.x] = 0.0f; }

KERNEL_OF(matrix_from_global, 32) {
    uint32_t m[4];
    gdn::load_matrices(m, a.v[1].data);
    a.v[0].as<uint32_t>()[threadIdx.x] = m[0];
}

// No error, but NaN: nothing was written before it is read.
KERNEL_OF(unwritten, 64) {
    __shared__ float words[64];
    DYNAMIC_SHARED(bytes);
    words[0] = 0.0f;
    if (a.attr[0] != 0.0f) words[threadIdx.x] = a.attr[0];
    a.v[0].row(0)[threadIdx.x] =
        words[(threadIdx.x + 1) % 64] + reinterpret_cast<float*>(bytes)[threadIdx.x];
}

// The order of threads and blocks shows.
KERNEL_OF(order, 64) {
    int32_t* counter = a.v[1].as<int32_t>();
    a.v[0].as<int32_t>()[blockIdx.x * 64 + threadIdx.x] = gdn::add_atomic(counter, 1);
}
