"""Ops: one module each, with its contract, shape inference, numpy reference and cost."""

from engine.graph import Op
from engine.ops.add_rms_norm import ADD_RMS_NORM
from engine.ops.attention import ATTENTION
from engine.ops.gated_delta_net import GATED_DELTA_NET
from engine.ops.gdn_gate import GDN_GATE
from engine.ops.get_rows import GET_ROWS
from engine.ops.l2_norm import L2_NORM
from engine.ops.mla_cache import MLA_CACHE
from engine.ops.mul_mat import MUL_MAT
from engine.ops.mul_mat_heads import MUL_MAT_HEADS
from engine.ops.mul_mat_id import MUL_MAT_ID
from engine.ops.qk_norm_rope import QK_NORM_ROPE
from engine.ops.rms_norm_gated import RMS_NORM_GATED
from engine.ops.router import ROUTER
from engine.ops.ssm_conv import SSM_CONV
from engine.ops.swiglu import SWIGLU

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        ADD_RMS_NORM,
        ATTENTION,
        GATED_DELTA_NET,
        GDN_GATE,
        GET_ROWS,
        L2_NORM,
        MLA_CACHE,
        MUL_MAT,
        MUL_MAT_HEADS,
        MUL_MAT_ID,
        QK_NORM_ROPE,
        RMS_NORM_GATED,
        ROUTER,
        SSM_CONV,
        SWIGLU,
    )
}
