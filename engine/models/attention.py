"""Full-attention layers: the Qwen hybrids' gated attention, and latent attention (MLA)."""

from dataclasses import dataclass

from engine.graph import Tensor
from engine.models.layers import Builder
from engine.ops.attention import ATTENTION
from engine.ops.mla_cache import MLA_CACHE
from engine.ops.mul_mat_heads import MUL_MAT_HEADS
from engine.ops.qk_norm_rope import QK_NORM_ROPE
from engine.ops.rope import RopeScaling


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a full-attention layer: query and KV heads, their size, and the rotated part."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_rot: int
    rope_base: float
    rope_scaling: RopeScaling
    eps: float

    @property
    def widths(self) -> dict[str, int]:
        """Rows of the projections q (with its gate), k and v."""
        kv_dim = self.n_kv_heads * self.d_head
        return {"q": 2 * self.n_heads * self.d_head, "k": kv_dim, "v": kv_dim}


def gated_attention(b: Builder, x: Tensor, shape: AttentionShape) -> Tensor:
    s = shape
    q_gate, k, v = b.mul_mat("attn_qkv", x, "attn_q", "attn_k", "attn_v")
    # Per head: d_head query values, then d_head gate values.
    q_gate = q_gate.unflatten(1, s.n_heads, 2, s.d_head)
    k, v = (t.unflatten(1, s.n_kv_heads, s.d_head) for t in (k, v))
    q, gate = q_gate.select(2, 0), q_gate.select(2, 1)
    placed = {name: b.cache(name, s.n_kv_heads, s.d_head) for name in ("k_cache", "v_cache")}
    placed |= b.paged
    norms = {name: b.weight(f"attn_{name}.weight") for name in ("q_norm", "k_norm")}
    rope = {"n_rot": s.n_rot, "rope_base": s.rope_base, "rope_scaling": s.rope_scaling}
    (q,) = b.add(QK_NORM_ROPE, q=q, k=k, v=v, **norms, **placed, **rope, eps=s.eps)
    (o,) = b.add(ATTENTION, q=q, gate=gate, **placed, scale=s.d_head**-0.5)
    return b.mul_mat("attn_output", o.flatten(1))[0]


@dataclass(frozen=True)
class LatentShape:
    """Sizes of an MLA layer: heads, latent rank, a key's part from it and the shared one.

    `rope`: how many entries of the shared part turn, base and scaling. `q_rank`: of queries with
    low-rank matrices, otherwise 0. `gated`: whether every head has a gate.
    """

    n_heads: int
    rank: int
    d_nope: int
    d_pe: int
    d_v: int
    # Whether attn_k_b is [H, d_nope, rank], as rows of an attn_kv_b are.
    transposed: bool = False
    rope: tuple[int, float, RopeScaling] = (0, 1.0, RopeScaling())
    q_rank: int = 0
    gated: bool = False
    # transformers hard-codes it for the norms of low-rank matrices, whatever the model's eps is.
    eps: float = 1e-6


def latent_attention(b: Builder, x: Tensor, shape: LatentShape) -> Tensor:
    """Multi-head latent attention; projections absorbed into queries and output."""
    s = shape
    names = ["attn_q_a" if s.q_rank else "attn_q", "attn_kv_a_mqa", *["attn_gate"] * s.gated]
    q, kv, *gates = b.mul_mat("attn_q_kv", x, *names)
    if s.q_rank:
        q, _ = b.norm("attn_q_a_norm", q, None, s.eps)
        (q,) = b.mul_mat("attn_q_b", q)
    q_head = s.d_nope + s.d_pe
    q = q.unflatten(1, s.n_heads, q_head)
    nope, pe = q.slice(2, 0, s.d_nope), q.slice(2, s.d_nope, q_head)
    cache, norm = b.cache("k_cache", 1, s.rank + s.d_pe), b.weight("attn_kv_a_norm.weight")
    rope = dict(zip(("n_rot", "rope_base", "rope_scaling"), s.rope, strict=True))
    latents = {"kv": kv, "norm": norm, "k_cache": cache, "q_pe": pe if s.rope[0] else None}
    (pe,) = b.add(MLA_CACHE, **latents, **b.paged, **rope, eps=s.eps) or (pe,)
    k_b, v_b = b.weight("attn_k_b.weight"), b.weight("attn_v_b.weight")
    (q,) = b.add(MUL_MAT_HEADS, "attn_k_b", x=nope, weight=k_b, tail=pe, transposed=s.transposed)
    caches, scale = {"k_cache": cache, "v_cache": cache.slice(3, 0, s.rank)}, q_head**-0.5
    # A head's gate may as well scale what attn_v_b multiplies.
    gate = gates[0] if gates else None
    (o,) = b.add(ATTENTION, q=q, gate=gate, **caches, **b.paged, scale=scale)
    (v,) = b.add(MUL_MAT_HEADS, "attn_v_b", x=o, weight=v_b, transposed=False)
    return b.mul_mat("attn_output", v.flatten(1))[0]
