"""Delta-net layers: one decay per head (GDA, Qwen) or one per key row (KDA, Kimi and Ling)."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.graph import Tensor
from engine.models.layers import Builder
from engine.ops.decomposed import delta_net_decomposed
from engine.ops.gated_delta_net import GATED_DELTA_NET
from engine.ops.gdn_gate import GDN_GATE
from engine.ops.l2_norm import L2_NORM
from engine.ops.rms_norm_gated import RMS_NORM_GATED
from engine.ops.ssm_conv import SSM_CONV

# transformers hard-codes it for the norm of queries and keys, whatever the model's eps is.
L2_EPS = 1e-6


@dataclass(frozen=True)
class DeltaNetShape:
    """Sizes of a delta-net layer: key and value heads, their sizes, taps of the convolution.

    `lower_bound`: of log decays (see GDN_GATE), 0 for none.
    """

    n_k_heads: int
    n_v_heads: int
    d_k: int
    d_v: int
    n_taps: int
    head_map: str
    eps: float
    lower_bound: float = 0.0

    @property
    def key_dim(self) -> int:
        return self.n_k_heads * self.d_k

    @property
    def value_dim(self) -> int:
        return self.n_v_heads * self.d_v

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim


def delta_net(b: Builder, x: Tensor, shape: DeltaNetShape) -> Tensor:
    """Gated delta net with one decay per head (GDA), as in Qwen3.5."""
    names = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")
    qkv, z, beta, alpha = b.mul_mat("delta_net_in", x, *names)
    heads = _convolved(b, [(qkv, b.weight("ssm_conv1d.weight"))], shape)
    o = _delta_rule(b, heads, alpha, beta, shape)
    return b.mul_mat("ssm_out", _gated_norm(b, o, z, "silu", shape))[0]


def kimi_delta(b: Builder, x: Tensor, shape: DeltaNetShape) -> Tensor:
    """Kimi delta attention: a decay per key row. Its matrix and the output gate's are products of
    two small ones, or full."""
    names = ("attn_q", "attn_k", "attn_v", "ssm_f_a", "ssm_g_a", "ssm_beta")
    q, k, v, f, gate, beta = b.mul_mat("delta_net_in", x, *names)
    taps = [b.weight(f"ssm_conv1d_{part}.weight") for part in "qkv"]
    heads = _convolved(b, list(zip((q, k, v), taps, strict=True)), shape)
    if b.has("ssm_f_b.weight"):
        (f,), (gate,) = b.mul_mat("ssm_f_b", f), b.mul_mat("ssm_g_b", gate)
    alpha = f.unflatten(1, shape.n_k_heads, shape.d_k)
    o = _delta_rule(b, heads, alpha, beta, shape)
    return b.mul_mat("attn_output", _gated_norm(b, o, gate, "sigmoid", shape))[0]


def _convolved(
    b: Builder, parts: Sequence[tuple[Tensor, Tensor]], s: DeltaNetShape
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (normalised) and v as heads, after the convolution of `parts` (projection, taps)."""
    operands = {"state": b.slots("conv_state", s.n_taps - 1, s.conv_dim), **b.recurrent}
    for i, (x, taps) in enumerate(parts):
        operands |= {f"x{i or ''}": x, f"weight{i or ''}": taps}
    (u,) = b.add(SSM_CONV, **operands)
    qk = u.slice(1, 0, 2 * s.key_dim).unflatten(1, 2 * s.n_k_heads, s.d_k)
    v = u.slice(1, 2 * s.key_dim, s.conv_dim).unflatten(1, s.n_v_heads, s.d_v)
    (qk,) = b.add(L2_NORM, x=qk, eps=L2_EPS)
    return qk.slice(1, 0, s.n_k_heads), qk.slice(1, s.n_k_heads, 2 * s.n_k_heads), v


def _delta_rule(
    b: Builder, heads: tuple[Tensor, Tensor, Tensor], alpha: Tensor, beta: Tensor, s: DeltaNetShape
) -> Tensor:
    """The recurrence of q, k and v as one fused node, or decomposed if the options say so."""
    q, k, v = heads
    gates = {"a": b.weight("ssm_a"), "dt": b.weight("ssm_dt.bias")}
    decay, step = b.add(GDN_GATE, alpha=alpha, beta=beta, **gates, lower_bound=s.lower_bound)
    state = b.slots("delta_state", s.n_v_heads, s.d_v, s.d_k)
    operands = {"q": q, "k": k, "v": v, "g": decay, "beta": step, "state": state, **b.recurrent}
    attrs = {"head_map": s.head_map, "scale": s.d_k**-0.5}
    if b.options.gdn == "decomposed":
        return delta_net_decomposed(b.graph, b.name("gated_delta_net"), operands, **attrs)
    return b.add(GATED_DELTA_NET, **operands, **attrs, algorithm=b.options.gdn)[0]


def _gated_norm(b: Builder, o: Tensor, z: Tensor, act: str, s: DeltaNetShape) -> Tensor:
    gate, weight = z.unflatten(1, s.n_v_heads, s.d_v), b.weight("ssm_norm.weight")
    (y,) = b.add(RMS_NORM_GATED, x=o, gate=gate, weight=weight, eps=s.eps, act=act)
    return y.flatten(1)
