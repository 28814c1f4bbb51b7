// MUL_MAT of up to 16 rows.

#include "mul_mat_rows.cuh"

EAGER_KERNEL_FOR(mul_mat_rows_16, 1) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_rows<2>(a, shared);
}
