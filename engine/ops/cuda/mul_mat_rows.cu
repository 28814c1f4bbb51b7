// MUL_MAT of up to 32 rows, which QUANTIZE_ROWS has quantized; see product.cuh.

#include "product.cuh"

EAGER_KERNEL_FOR(mul_mat_16, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<2>(a, reinterpret_cast<float*>(sums));
}

EAGER_KERNEL_FOR(mul_mat_32, 2) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<4>(a, reinterpret_cast<float*>(sums));
}
