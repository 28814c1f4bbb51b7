"""Delta-net layers: gated delta net with one decay per head (GDA), and Kimi's per key row (KDA)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.graph import Tensor
from engine.models.layers import Builder
from engine.ops.decomposed import delta_net_decomposed
from engine.ops.gated_delta_net import gated_delta_net
from engine.ops.gdn_gate import gdn_gate
from engine.ops.l2_norm import l2_norm
from engine.ops.mul_mat import mul_mat
from engine.ops.rms_norm_gated import rms_norm_gated
from engine.ops.ssm_conv import ssm_conv

# transformers hard-codes it for the norm of queries and keys, whatever the model's eps is.
L2_EPS = 1e-6


@dataclass(frozen=True)
class DeltaNetShape:
    """Sizes of a delta-net layer: key and value heads, their sizes, taps of the convolution."""

    n_k_heads: int
    n_v_heads: int
    d_k: int
    d_v: int
    n_taps: int
    head_map: str
    eps: float

    @property
    def key_dim(self) -> int:
        """Width of q, and of k."""
        return self.n_k_heads * self.d_k

    @property
    def value_dim(self) -> int:
        """Width of v, and of z."""
        return self.n_v_heads * self.d_v

    @property
    def conv_dim(self) -> int:
        """Width of q, k and v together."""
        return 2 * self.key_dim + self.value_dim


def delta_net(b: Builder, prefix: str, x: Tensor, shape: DeltaNetShape) -> Tensor:
    """Gated delta net with one decay per head (GDA), as in Qwen3.5."""
    s, g = shape, b.graph
    names = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")
    weights = [b.weight(f"{prefix}.{name}.weight") for name in names]
    qkv, z, beta, alpha = mul_mat(g, f"{prefix}.delta_net_in", x, *weights)
    taps = b.weight(f"{prefix}.ssm_conv1d.weight")
    q, k, v = _convolved(b, prefix, [(qkv, taps)], s)
    a, dt = b.weight(f"{prefix}.ssm_a"), b.weight(f"{prefix}.ssm_dt.bias")
    decay, step = gdn_gate(g, f"{prefix}.gdn_gate", alpha, beta, a, dt)
    state = b.slots(f"{prefix}.delta_state", s.n_v_heads, s.d_v, s.d_k)
    o = delta_rule(b, f"{prefix}.gated_delta_net", q, k, v, decay, step, state, s.head_map)
    gate = z.unflatten(1, s.n_v_heads, s.d_v)
    norm = b.weight(f"{prefix}.ssm_norm.weight")
    y = rms_norm_gated(g, f"{prefix}.rms_norm_gated", o, gate, norm, s.eps, "silu")
    return mul_mat(g, f"{prefix}.ssm_out", y.flatten(1), b.weight(f"{prefix}.ssm_out.weight"))[0]


def delta_rule(
    b: Builder,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    step: Tensor,
    state: Tensor,
    head_map: str,
) -> Tensor:
    """The recurrence as one fused node, or decomposed if the options say so."""
    g, batch, algorithm = b.graph, b.recurrent, b.options.gdn
    if algorithm == "decomposed":
        return delta_net_decomposed(g, name, q, k, v, decay, step, state, batch, head_map=head_map)
    return gated_delta_net(
        g, name, q, k, v, decay, step, state, batch, head_map=head_map, algorithm=algorithm
    )


def kimi_delta(b: Builder, prefix: str, x: Tensor, shape: DeltaNetShape) -> Tensor:
    """Kimi delta attention: a decay per key row; it and the output gate come from low ranks."""
    s, g = shape, b.graph
    names = ("attn_q", "attn_k", "attn_v", "ssm_f_a", "ssm_g_a", "ssm_beta")
    weights = [b.weight(f"{prefix}.{name}.weight") for name in names]
    q, k, v, f, gate, beta = mul_mat(g, f"{prefix}.delta_net_in", x, *weights)
    taps = [b.weight(f"{prefix}.ssm_conv1d_{name}.weight") for name in "qkv"]
    parts = list(zip((q, k, v), taps, strict=True))
    q, k, v = _convolved(b, prefix, parts, s)
    alpha = mul_mat(g, f"{prefix}.ssm_f_b", f, b.weight(f"{prefix}.ssm_f_b.weight"))[0]
    a, dt = b.weight(f"{prefix}.ssm_a"), b.weight(f"{prefix}.ssm_dt.bias")
    alpha = alpha.unflatten(1, s.n_k_heads, s.d_k)
    decay, step = gdn_gate(g, f"{prefix}.gdn_gate", alpha, beta, a, dt)
    state = b.slots(f"{prefix}.delta_state", s.n_v_heads, s.d_v, s.d_k)
    name = f"{prefix}.gated_delta_net"
    o = delta_rule(b, name, q, k, v, decay, step, state, s.head_map)
    z = mul_mat(g, f"{prefix}.ssm_g_b", gate, b.weight(f"{prefix}.ssm_g_b.weight"))[0]
    z, norm = z.unflatten(1, s.n_v_heads, s.d_v), b.weight(f"{prefix}.ssm_norm.weight")
    y = rms_norm_gated(g, f"{prefix}.rms_norm_gated", o, z, norm, s.eps, "sigmoid")
    weight = b.weight(f"{prefix}.attn_output.weight")
    return mul_mat(g, f"{prefix}.attn_output", y.flatten(1), weight)[0]


def _convolved(
    b: Builder, prefix: str, parts: list[tuple[Tensor, Tensor]], s: DeltaNetShape
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (normalised) and v as heads, after the convolution of their projections."""
    g = b.graph
    state = b.slots(f"{prefix}.conv_state", s.n_taps - 1, s.conv_dim)
    u = ssm_conv(g, f"{prefix}.ssm_conv", parts, state, b.recurrent)
    qk = u.slice(1, 0, 2 * s.key_dim).unflatten(1, 2 * s.n_k_heads, s.d_k)
    v = u.slice(1, 2 * s.key_dim, s.conv_dim).unflatten(1, s.n_v_heads, s.d_v)
    qk = l2_norm(g, f"{prefix}.l2_norm", qk, L2_EPS)
    return qk.slice(1, 0, s.n_k_heads), qk.slice(1, s.n_k_heads, 2 * s.n_k_heads), v
