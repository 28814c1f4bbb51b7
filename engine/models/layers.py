"""Layers that several architectures share, as functions that append nodes to a graph.

Each takes the hidden rows [T, E] after their norm and gives what is added to the residual. Weights
are named as in the GGUF file, under a layer's prefix `blk.<i>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.formats.quants import F16, DType
from engine.graph import Capacity, Dim, Graph, Shape, Tensor
from engine.models.weights import Weights
from engine.ops.add_rms_norm import add_rms_norm
from engine.ops.get_rows import get_rows
from engine.ops.mul_mat import mul_mat
from engine.ops.swiglu import swiglu


@dataclass(frozen=True)
class BuildOptions:
    """What a graph is built for. `gdn`: auto, scan, chunk (one node) or decomposed."""

    capacity: Capacity
    type_k: DType = F16
    type_v: DType = F16
    gdn: str = "auto"


class Model(Protocol):
    """An architecture's hyper-parameters, its weights and its graph."""

    name: str
    n_ctx_train: int
    n_vocab: int
    weights: Weights

    def build(self, options: BuildOptions) -> Graph:
        """The compute graph: outputs `logits` [n_outputs, n_vocab]."""


class Builder:
    """A graph under construction: its inputs, and access to weights and states by name."""

    def __init__(self, weights: Weights, options: BuildOptions) -> None:
        self.graph, self.options = Graph(options.capacity), options
        self._tensors = weights.tensors
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
        """Whether the model has a weight."""
        return name in self._tensors

    def weight(self, name: str) -> Tensor:
        """A weight of the model."""
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

    def latent_cache(self, prefix: str, width: int) -> Tensor:
        """A layer's paged latents, one row of `width` a position."""
        cap = self.options.capacity
        shape = (Dim(cap.n_blocks, "n_blocks"), 1, cap.block_size, width)
        return self.graph.state(f"{prefix}.k_cache", shape, self.options.type_k)


def dense_weights(n_embd: int, n_ff: int) -> dict[str, Shape]:
    """The tensors of a dense feed-forward."""
    return {
        "ffn_gate.weight": (n_ff, n_embd),
        "ffn_up.weight": (n_ff, n_embd),
        "ffn_down.weight": (n_embd, n_ff),
    }


def dense_ffn(b: Builder, prefix: str, x: Tensor) -> Tensor:
    """SwiGLU feed-forward."""
    weights = [b.weight(f"{prefix}.ffn_{name}.weight") for name in ("gate", "up")]
    gate, up = mul_mat(b.graph, f"{prefix}.ffn_gate_up", x, *weights)
    (hidden,) = swiglu(b.graph, f"{prefix}.swiglu", (gate, up))
    return mul_mat(b.graph, f"{prefix}.ffn_down", hidden, b.weight(f"{prefix}.ffn_down.weight"))[0]


Layer = Callable[[Builder, str, Tensor], Tensor]


def trunk(
    b: Builder, layers: Sequence[tuple[str, Layer, Layer]], ffn_norm: str, eps: float
) -> Graph:
    """Embedding, layers (kind, mixer, feed-forward) and the head; fills the graph."""
    g = b.graph
    x = get_rows(g, "token_embd", b.weight("token_embd.weight"), b.tokens)
    delta = None
    for i, (kind, mix, ffn) in enumerate(layers):
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
