// The codes in a View, the record of an operand, for the CPU's kernels and the GPU's. Who includes
// it has the integer types: from <cstdint>, or from CUDA's primitives.cuh.
#pragma once

namespace gdn {

// The live count that View::dim names; FIXED: the first axis always has its capacity.
enum Dim : int32_t { FIXED, N_TOKENS, N_SEQS, N_SEQS_1, N_OUTPUTS, N_DIMS };

// View::dtype; PACKED: a weight in a layout of layout.h.
enum DType : int32_t { F32, F16, I32, I8, PACKED, BF16 };

}  // namespace gdn
