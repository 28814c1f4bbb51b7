"""Full-attention layers: gated attention of the Qwen hybrids, and Kimi's latent attention (MLA)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.graph import Tensor
from engine.models.layers import Builder
from engine.ops.attention import attention
from engine.ops.mla_cache import mla_cache
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


def gated_attention(b: Builder, x: Tensor, shape: AttentionShape) -> Tensor:
    """Full attention whose query projection also makes a gate."""
    s, g = shape, b.graph
    q_gate, k, v = b.mul_mat("attn_qkv", x, "attn_q", "attn_k", "attn_v")
    # Per head: d_head query values, then d_head gate values.
    q_gate = q_gate.unflatten(1, s.n_heads, 2, s.d_head)
    k, v = (t.unflatten(1, s.n_kv_heads, s.d_head) for t in (k, v))
    caches = b.k_cache(s.n_kv_heads, s.d_head), b.v_cache(s.n_kv_heads, s.d_head)
    operands = {"q": q_gate.select(2, 0), "k": k, "v": v}
    operands |= {name: b.weight(f"attn_{name}.weight") for name in ("q_norm", "k_norm")}
    operands |= {"k_cache": caches[0], "v_cache": caches[1], **b.paged}
    name, base = b.name("qk_norm_rope"), s.rope_base
    q = qk_norm_rope(g, name, operands, eps=s.eps, n_rot=s.n_rot, rope_base=base)
    gate, scale = q_gate.select(2, 1), s.d_head**-0.5
    o = attention(g, b.name("attention"), q, caches, gate, b.paged, scale=scale)
    return b.mul_mat("attn_output", o.flatten(1))[0]


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


def latent_attention(b: Builder, x: Tensor, shape: LatentShape) -> Tensor:
    """Multi-head latent attention without rope; projections absorbed into queries and output."""
    s, g = shape, b.graph
    q, kv = b.mul_mat("attn_q_kv", x, "attn_q", "attn_kv_a_mqa")
    cache = b.k_cache(1, s.rank + s.d_pe)
    norm = b.weight("attn_kv_a_norm.weight")
    mla_cache(g, b.name("mla_cache"), kv, norm, cache, b.paged, s.eps)
    q = q.unflatten(1, s.n_heads, s.d_nope + s.d_pe)
    nope, pe = q.slice(2, 0, s.d_nope), q.slice(2, s.d_nope, s.d_nope + s.d_pe)
    k_b, v_b = b.weight("attn_k_b.weight"), b.weight("attn_v_b.weight")
    q = mul_mat_heads(g, b.name("attn_k_b"), nope, k_b, pe, s.transposed)
    caches, scale = (cache, cache.slice(3, 0, s.rank)), (s.d_nope + s.d_pe) ** -0.5
    o = attention(g, b.name("attention"), q, caches, None, b.paged, scale=scale)
    v = mul_mat_heads(g, b.name("attn_v_b"), o, v_b)
    return b.mul_mat("attn_output", v.flatten(1))[0]
