// MUL_MAT of 2 to 8 rows by plain weights; see product.cuh.

#include "product.cuh"

EAGER_KERNEL_FOR(mul_mat_floats_2, 2) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_floats<2>(a, shared);
}

EAGER_KERNEL_FOR(mul_mat_floats_4, 2) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_floats<4>(a, shared);
}

EAGER_KERNEL_FOR(mul_mat_floats_8, 2) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_floats<8>(a, shared);
}
