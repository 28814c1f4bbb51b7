// MUL_MAT of 1 or 2 rows; see product.cuh. Each block quantizes the rows for itself.

#include "product.cuh"

// With registers for all it wants: where all blocks are there at once, a block's own latency counts.
EAGER_KERNEL_FOR(mul_mat_1_roomy, 320, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<1>(a, reinterpret_cast<float*>(sums));
}

// With so many blocks at a time that weights keep coming.
EAGER_KERNEL_FOR(mul_mat_1, 256, 3) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<1>(a, reinterpret_cast<float*>(sums));
}

EAGER_KERNEL_FOR(mul_mat_2, 256, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<2>(a, reinterpret_cast<float*>(sums));
}
