// MUL_MAT of up to 4 rows, and of 8, which QUANTIZE_ROWS has quantized; see product.cuh.

#include "product.cuh"

EAGER_KERNEL_FOR(mul_mat_4, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_floats<4>(a, reinterpret_cast<float*>(sums));
}

EAGER_KERNEL_FOR(mul_mat_8, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<1>(a, reinterpret_cast<float*>(sums));
}
