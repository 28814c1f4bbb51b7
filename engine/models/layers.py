"""Layers that several architectures share, as functions that append nodes to a graph.

Each takes the hidden rows [T, E] after their norm and gives what is added to the residual. Weights
are named as in the GGUF file, under a layer's prefix `blk.<i>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.gguf import TensorInfo
from engine.graph import Capacity, Dim, Graph, Shape, Tensor
from engine.ops.add_rms_norm import add_rms_norm
from engine.ops.attention import attention
from engine.ops.decomposed import delta_net_decomposed
from engine.ops.gated_delta_net import gated_delta_net
from engine.ops.gdn_gate import gdn_gate
from engine.ops.get_rows import get_rows
from engine.ops.l2_norm import l2_norm
from engine.ops.mul_mat import mul_mat
from engine.ops.qk_norm_rope import qk_norm_rope
from engine.ops.rms_norm_gated import rms_norm_gated
from engine.ops.ssm_conv import ssm_conv
from engine.ops.swiglu import swiglu
from engine.quants import F16, DType

# transformers hard-codes it for the norm of queries and keys, whatever the model's eps is.
L2_EPS = 1e-6


@dataclass(frozen=True)
class BuildOptions:
    """What a graph is built for. `gdn`: auto, scan, chunk (one node) or decomposed."""

    capacity: Capacity
    type_k: DType = F16
    type_v: DType = F16
    gdn: str = "auto"


class Model(Protocol):
    """An architecture's hyper-parameters and graph, with the file's tensors validated."""

    name: str
    n_ctx_train: int
    n_vocab: int

    def build(self, options: BuildOptions) -> Graph:
        """The compute graph: outputs `logits` [n_outputs, n_vocab]."""


class Builder:
    """A graph under construction: its inputs, and access to weights and states by name."""

    def __init__(self, tensors: Mapping[str, TensorInfo], options: BuildOptions) -> None:
        self.graph, self.options, self._tensors = Graph(options.capacity), options, tensors
        cap = options.capacity
        n_tokens, n_seqs = Dim(cap.n_tokens, "n_tokens"), Dim(cap.n_seqs, "n_seqs")
        declare = self.graph.input
        self.tokens = declare("tokens", (n_tokens,))
        self.output_rows = declare("output_rows", (Dim(cap.n_outputs, "n_outputs"),))
        seq_starts = declare("seq_starts", (Dim(cap.n_seqs + 1, "n_seqs + 1"),))
        self.recurrent = {
            "seq_starts": seq_starts,
            "state_src": declare("state_src", (n_seqs,)),
            "state_dst": declare("state_dst", (n_seqs,)),
            "snapshot_dst": declare("snapshot_dst", (n_seqs, cap.n_snapshots)),
        }
        self.paged = {
            "positions": declare("positions", (n_tokens,)),
            "seq_starts": seq_starts,
            "block_tables": declare("block_tables", (n_seqs, cap.n_blocks)),
        }

    def has(self, name: str) -> bool:
        """Whether the file has a weight."""
        return name in self._tensors

    def weight(self, name: str) -> Tensor:
        """A weight of the file."""
        info = self._tensors[name]
        return self.graph.weight(name, info.shape, info.dtype)

    def slots(self, name: str, *shape: int) -> Tensor:
        """A recurrent state of this shape per slot."""
        return self.graph.state(name, (Dim(self.options.capacity.n_slots, "n_slots"), *shape))

    def kv_cache(self, prefix: str, n_heads: int, d_k: int, d_v: int) -> tuple[Tensor, Tensor]:
        """A layer's paged keys and values."""
        cap = self.options.capacity
        shape: Shape = (Dim(cap.n_blocks, "n_blocks"), n_heads, cap.block_size)
        k = self.graph.state(f"{prefix}.k_cache", (*shape, d_k), self.options.type_k)
        v = self.graph.state(f"{prefix}.v_cache", (*shape, d_v), self.options.type_v)
        return k, v


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
    conv_state = b.slots(f"{prefix}.conv_state", s.n_taps - 1, s.conv_dim)
    conv_weight = b.weight(f"{prefix}.ssm_conv1d.weight")
    u = ssm_conv(g, f"{prefix}.ssm_conv", qkv, conv_weight, conv_state, b.recurrent)
    qk = u.slice(1, 0, 2 * s.key_dim).unflatten(1, 2 * s.n_k_heads, s.d_k)
    v = u.slice(1, 2 * s.key_dim, s.conv_dim).unflatten(1, s.n_v_heads, s.d_v)
    qk = l2_norm(g, f"{prefix}.l2_norm", qk, L2_EPS)
    q, k = qk.slice(1, 0, s.n_k_heads), qk.slice(1, s.n_k_heads, 2 * s.n_k_heads)
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


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a full-attention layer: query and KV heads, their size, and the rotated part."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_rot: int
    rope_base: float
    eps: float


def gated_attention(b: Builder, prefix: str, x: Tensor, shape: AttentionShape) -> Tensor:
    """Full attention whose query projection also makes a gate; q, k, v may be one weight."""
    s, g = shape, b.graph
    q_dim, kv_dim = 2 * s.n_heads * s.d_head, s.n_kv_heads * s.d_head
    if b.has(f"{prefix}.attn_qkv.weight"):
        (qkv,) = mul_mat(g, f"{prefix}.attn_qkv", x, b.weight(f"{prefix}.attn_qkv.weight"))
        q_gate = qkv.slice(1, 0, q_dim)
        k, v = (qkv.slice(1, q_dim + i * kv_dim, q_dim + (i + 1) * kv_dim) for i in range(2))
    else:
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


def dense_ffn(b: Builder, prefix: str, x: Tensor) -> Tensor:
    """SwiGLU feed-forward."""
    weights = [b.weight(f"{prefix}.ffn_{name}.weight") for name in ("gate", "up")]
    gate, up = mul_mat(b.graph, f"{prefix}.ffn_gate_up", x, *weights)
    hidden = swiglu(b.graph, f"{prefix}.swiglu", gate, up)
    return mul_mat(b.graph, f"{prefix}.ffn_down", hidden, b.weight(f"{prefix}.ffn_down.weight"))[0]


Layer = Callable[[Builder, str, Tensor], Tensor]


def trunk(
    b: Builder, layers: Sequence[tuple[str, Layer]], ffn: Layer, ffn_norm: str, eps: float
) -> Graph:
    """Embedding, layers (kind, mixer) with a feed-forward each, and the head; fills the graph."""
    g = b.graph
    x = get_rows(g, "token_embd", b.weight("token_embd.weight"), b.tokens)
    delta = None
    for i, (kind, mix) in enumerate(layers):
        prefix = f"blk.{i}"
        g.layer_kinds[prefix] = kind
        norm = b.weight(f"{prefix}.attn_norm.weight")
        h, x = add_rms_norm(g, f"{prefix}.attn_norm", x, delta, norm, eps)
        delta = mix(b, prefix, h)
        norm = b.weight(f"{prefix}.{ffn_norm}.weight")
        h, x = add_rms_norm(g, f"{prefix}.{ffn_norm}", x, delta, norm, eps)
        delta = ffn(b, prefix, h)
    h, _ = add_rms_norm(g, "output_norm", x, delta, b.weight("output_norm.weight"), eps)
    rows = get_rows(g, "output_rows", h, b.output_rows)
    head = "output.weight" if b.has("output.weight") else "token_embd.weight"
    g.outputs["logits"] = mul_mat(g, "output", rows, b.weight(head))[0]
    return g
