"""Full-attention layers: gated attention of the Qwen hybrids, and Kimi's latent attention (MLA)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.graph import Tensor
from engine.models.layers import Builder
from engine.ops.attention import attention
from engine.ops.mla_cache import mla_cache
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_heads import mul_mat_heads
from engine.ops.qk_norm_rope import qk_norm_rope


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a full-attention layer: query and KV heads, their size, and the rotated part."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_rot: int
    rope_base: float
    eps: float

    @property
    def widths(self) -> dict[str, int]:
        """Rows of the projections q (with its gate), k and v."""
        kv_dim = self.n_kv_heads * self.d_head
        return {"q": 2 * self.n_heads * self.d_head, "k": kv_dim, "v": kv_dim}


def gated_attention(b: Builder, prefix: str, x: Tensor, shape: AttentionShape) -> Tensor:
    """Full attention whose query projection also makes a gate."""
    s, g = shape, b.graph
    weights = [b.weight(f"{prefix}.attn_{name}.weight") for name in "qkv"]
    q_gate, k, v = mul_mat(g, f"{prefix}.attn_qkv", x, *weights)
    # Per head: d_head query values, then d_head gate values.
    q_gate = q_gate.unflatten(1, s.n_heads, 2, s.d_head)
    k, v = (t.unflatten(1, s.n_kv_heads, s.d_head) for t in (k, v))
    caches = b.kv_cache(prefix, s.n_kv_heads, s.d_head, s.d_head)
    q = qk_norm_rope(
        g,
        f"{prefix}.qk_norm_rope",
        q_gate.select(2, 0),
        k,
        v,
        b.weight(f"{prefix}.attn_q_norm.weight"),
        b.weight(f"{prefix}.attn_k_norm.weight"),
        caches,
        b.paged,
        eps=s.eps,
        n_rot=s.n_rot,
        rope_base=s.rope_base,
    )
    gate, scale = q_gate.select(2, 1), s.d_head**-0.5
    o = attention(g, f"{prefix}.attention", q, caches, gate, b.paged, scale=scale)
    weight = b.weight(f"{prefix}.attn_output.weight")
    return mul_mat(g, f"{prefix}.attn_output", o.flatten(1), weight)[0]


@dataclass(frozen=True)
class LatentShape:
    """Sizes of an MLA layer: heads, latent rank, a key's part from it and the shared one."""

    n_heads: int
    rank: int
    d_nope: int
    d_pe: int
    d_v: int
    # Whether attn_k_b is [H, d_nope, rank], as rows of an attn_kv_b are.
    transposed: bool
    # transformers hard-codes it for the latent's norm, whatever the model's eps is.
    eps: float = 1e-6


def latent_attention(b: Builder, prefix: str, x: Tensor, shape: LatentShape) -> Tensor:
    """Multi-head latent attention without rope; projections absorbed into queries and output."""
    s, g = shape, b.graph
    weights = [b.weight(f"{prefix}.{name}.weight") for name in ("attn_q", "attn_kv_a_mqa")]
    q, kv = mul_mat(g, f"{prefix}.attn_q_kv", x, *weights)
    cache = b.latent_cache(prefix, s.rank + s.d_pe)
    norm = b.weight(f"{prefix}.attn_kv_a_norm.weight")
    mla_cache(g, f"{prefix}.mla_cache", kv, norm, cache, b.paged, s.eps)
    q = q.unflatten(1, s.n_heads, s.d_nope + s.d_pe)
    nope, pe = q.slice(2, 0, s.d_nope), q.slice(2, s.d_nope, s.d_nope + s.d_pe)
    k_b = b.weight(f"{prefix}.attn_k_b.weight")
    q = mul_mat_heads(g, f"{prefix}.attn_k_b", nope, k_b, pe, s.transposed)
    caches, scale = (cache, cache.slice(3, 0, s.rank)), (s.d_nope + s.d_pe) ** -0.5
    o = attention(g, f"{prefix}.attention", q, caches, None, b.paged, scale=scale)
    v = mul_mat_heads(g, f"{prefix}.attn_v_b", o, b.weight(f"{prefix}.attn_v_b.weight"))
    weight = b.weight(f"{prefix}.attn_output.weight")
    return mul_mat(g, f"{prefix}.attn_output", v.flatten(1), weight)[0]
