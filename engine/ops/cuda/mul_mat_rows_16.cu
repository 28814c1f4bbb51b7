// MUL_MAT of up to 16 rows.

#include "mul_mat_rows.cuh"

REHEARSED_KERNEL(mul_mat_rows_16, 1, 1) {
    DYNAMIC_SHARED(shared);
    gdn::mul_mat_rows<8, 2>(a, shared, rehearsal == 0);
}
