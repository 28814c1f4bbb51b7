// MUL_MAT of up to 4 rows.

#include "mul_mat_rows.cuh"

REHEARSED_KERNEL(mul_mat_rows_4, 1, 1) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_rows<4, 1>(a, shared, rehearsal == 0);
}
