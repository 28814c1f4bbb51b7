"""Builds graphs: inputs, weights and states by name, the dense feed-forward, and the trunk.

A layer is a function that appends nodes: it takes the hidden rows [T, E] after their norm and
returns what is added to the residual. The Builder puts `blk.<i>.` before a layer's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from engine.formats.quants import F16, DType
from engine.graph import Capacity, Dim, Graph, Op, Shape, Tensor
from engine.models.weights import Weights
from engine.ops.add_rms_norm import add_rms_norm
from engine.ops.get_rows import GET_ROWS
from engine.ops.mul_mat import mul_mat
from engine.ops.swiglu import swiglu


@dataclass(frozen=True)
class BuildOptions:
    """What a graph is built for. `gdn`: auto, scan, chunk (one node) or decomposed."""

    capacity: Capacity
    type_k: DType = F16
    type_v: DType = F16
    gdn: str = "auto"


class Builder:
    """A graph under construction, seen from the trunk or from one layer.

    `recurrent` and `paged` are the operands that place sequences (see engine.ops.base).
    """

    def __init__(self, weights: Weights, options: BuildOptions) -> None:
        self.graph, self.options = Graph(options.capacity), options
        self._tensors, self._prefix = weights.tensors, ""
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

    def layer(self, i: int) -> Builder:
        builder = copy(self)
        builder._prefix = f"blk.{i}."
        return builder

    def name(self, name: str) -> str:
        """The full name of a node, weight or state."""
        return self._prefix + name

    def has(self, name: str) -> bool:
        return self.name(name) in self._tensors

    def weight(self, name: str) -> Tensor:
        info = self._tensors[self.name(name)]
        return self.graph.weight(self.name(name), info.shape, info.dtype)

    def add(self, op: Op, name: str = "", /, **given: Any) -> tuple[Tensor, ...]:
        """A node with the operands and attributes `given`, named as its op if not otherwise."""
        attrs = {key: given.pop(key) for key in op.attrs}
        return self.graph.add(op, self.name(name or op.name.lower()), given, **attrs)

    def mul_mat(
        self, name: str, x: Tensor, *weights: str, **fused: Tensor | None
    ) -> tuple[Tensor, ...]:
        """A MUL_MAT node `name` of x with `weights`, named without `.weight`; by default `name`.

        `fused`: its operands gate and add.
        """
        tensors = [self.weight(f"{weight}.weight") for weight in weights or (name,)]
        return mul_mat(self.graph, self.name(name), x, *tensors, **fused)

    def norm(self, name: str, x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """An ADD_RMS_NORM node `name`, whose weight has its name: (normalised sum, sum)."""
        weight = self.weight(f"{name}.weight")
        return add_rms_norm(self.graph, self.name(name), x, delta, weight, eps)

    def slots(self, name: str, *shape: int) -> Tensor:
        first = Dim(self.options.capacity.n_slots, "n_slots")
        return self.graph.state(self.name(name), (first, *shape))

    def cache(self, name: str, n_heads: int, d_head: int) -> Tensor:
        """A layer's paged rows [n_blocks, n_heads, block_size, d_head]; `k_cache` or `v_cache`."""
        options, cap = self.options, self.options.capacity
        shape = (Dim(cap.n_blocks, "n_blocks"), n_heads, cap.block_size, d_head)
        dtype = options.type_k if name == "k_cache" else options.type_v
        return self.graph.state(self.name(name), shape, dtype)


def dense_weights(n_embd: int, n_ff: int) -> dict[str, Shape]:
    return {
        "ffn_gate.weight": (n_ff, n_embd),
        "ffn_up.weight": (n_ff, n_embd),
        "ffn_down.weight": (n_embd, n_ff),
    }


def dense_ffn(b: Builder, x: Tensor, limit: float = 0.0) -> Tensor:
    gate, up = b.mul_mat("ffn_gate_up", x, "ffn_gate", "ffn_up")
    (hidden,) = swiglu(b.graph, b.name("swiglu"), (gate, up), limits=(limit,))
    return b.mul_mat("ffn_down", hidden)[0]


Layer = Callable[[Builder, Tensor], Tensor]


def trunk(
    b: Builder, layers: Sequence[tuple[str, Layer, Layer]], ffn_norm: str, eps: float
) -> Graph:
    """The graph with the embedding, the layers (kind, mixer, feed-forward) and the head."""
    g = b.graph
    (x,) = b.add(GET_ROWS, "token_embd", table=b.weight("token_embd.weight"), ids=b.tokens)
    delta = None
    for i, (kind, mix, ffn) in enumerate(layers):
        layer = b.layer(i)
        g.layer_kinds[f"blk.{i}"] = kind
        h, x = layer.norm("attn_norm", x, delta, eps)
        delta = mix(layer, h)
        h, x = layer.norm(ffn_norm, x, delta, eps)
        delta = ffn(layer, h)
    h, _ = b.norm("output_norm", x, delta, eps)
    (rows,) = b.add(GET_ROWS, "output_rows", table=h, ids=b.output_rows)
    head = "output" if b.has("output.weight") else "token_embd"
    g.outputs["logits"] = b.mul_mat("output", rows, head)[0]
    return g
