// MUL_MAT of up to 8 rows.

#include "mul_mat_rows.cuh"

EAGER_KERNEL_FOR(mul_mat_rows_8, 1) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_rows<1>(a, shared);
}
