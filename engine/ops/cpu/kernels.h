// The list of all kernels. A new one is declared and listed here; it is defined in <op>.cpp, in
// the file of the op that it is a part of, or in fused/.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace gdn {

extern const Kernel add_rms_norm, attention, attention_join, gated_delta_net, gdn_gate, get_rows,
    l2_norm, mla_cache, mul_mat, mul_mat_heads, mul_mat_id, mul_mat_swiglu, peak_probe,
    qk_norm_rope, quantize_rows, read_probe, rms_norm_gated, round_rows, router, sort_by_expert,
    ssm_conv, swiglu, sum_experts;

constexpr const Kernel* KERNELS[] = {
    &add_rms_norm, &attention,      &attention_join, &gated_delta_net, &gdn_gate,
    &get_rows,     &l2_norm,        &mla_cache,      &mul_mat,         &mul_mat_heads,
    &mul_mat_id,   &mul_mat_swiglu, &peak_probe,     &qk_norm_rope,    &quantize_rows,
    &read_probe,   &rms_norm_gated, &round_rows,     &router,          &sort_by_expert,
    &ssm_conv,     &swiglu,         &sum_experts,
};

}  // namespace gdn
