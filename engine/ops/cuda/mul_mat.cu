// MUL_MAT of 1 or 2 rows; see product.cuh. Each block quantizes the rows for itself.

#include "product.cuh"

EAGER_KERNEL_FOR(mul_mat_1, 256, 3) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<1>(a, reinterpret_cast<float*>(sums));
}

EAGER_KERNEL_FOR(mul_mat_2, 256, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<2>(a, reinterpret_cast<float*>(sums));
}
