// MUL_MAT of more rows, which QUANTIZE_ROWS has quantized; see product.cuh.

#include "product.cuh"

KERNEL(mul_mat_8, 512) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<1>(a, reinterpret_cast<float*>(sums));
}

KERNEL(mul_mat_16, 512) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<2>(a, reinterpret_cast<float*>(sums));
}

KERNEL(mul_mat_32, 512) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<4>(a, reinterpret_cast<float*>(sums));
}

KERNEL(mul_mat_64, 512) {
    DYNAMIC_SHARED(sums);
    gdn::mul_mat_quantized<8>(a, reinterpret_cast<float*>(sums));
}
