"""Ops: one module each, with contract, shape inference, numpy reference, cost and test cases."""

from engine.graph import Op
from engine.ops.add_rms_norm import ADD_RMS_NORM
from engine.ops.attention import ATTENTION
from engine.ops.gated_delta_net import GATED_DELTA_NET
from engine.ops.gdn_gate import GDN_GATE
from engine.ops.get_rows import GET_ROWS
from engine.ops.l2_norm import L2_NORM
from engine.ops.mul_mat import MUL_MAT
from engine.ops.qk_norm_rope import QK_NORM_ROPE
from engine.ops.rms_norm_gated import RMS_NORM_GATED
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
        MUL_MAT,
        QK_NORM_ROPE,
        RMS_NORM_GATED,
        SSM_CONV,
        SWIGLU,
    )
}
