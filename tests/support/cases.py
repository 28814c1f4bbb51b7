"""Test cases of ops: operands with random values, for any backend.

tests/ops/cases lists each op's `Case`s. `single_node_graph` makes a graph of one node of a case, at
a capacity above its live counts, so that tests see a backend that reads or writes padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.formats.quants import F16, F32, I32, DType
from engine.graph import Capacity, Dim, Graph, Kind, Live, Op, Tensor

Rng = np.random.Generator


@dataclass(frozen=True)
class Operand:
    """A value for an operand; `dim` names its first dimension if that one varies."""

    kind: Kind
    values: NDArray[Any]
    dtype: DType = F32
    dim: str = ""


@dataclass(frozen=True)
class Case:
    """`make(rng)` gives the operands; activations in float64, which the test rounds."""

    name: str
    make: Callable[[Rng], dict[str, Operand]]
    attrs: dict[str, Any]


def case(make: Callable[..., dict[str, Operand]], attrs: dict[str, Any], **params: Any) -> Case:
    """A case named after the parameters with which `make(rng, **params)` is called."""
    name = " ".join(f"{key}={value}" for key, value in (params | attrs).items())
    return Case(name.replace("'", ""), partial(make, **params), attrs)


def activation(values: NDArray[Any], dim: str = "n_tokens") -> Operand:
    """Rows computed by an earlier node; integers stay integers."""
    dtype = I32 if values.dtype.kind == "i" else F32
    return Operand(Kind.ACTIVATION, values, dtype, dim)


def weight(values: NDArray[Any], dtype: DType = F32) -> Operand:
    """A constant, stored in `dtype` (the test encodes it)."""
    return Operand(Kind.WEIGHT, values, dtype)


def integers(values: Sequence[Any] | NDArray[Any], dim: str) -> Operand:
    """An INPUT operand."""
    return Operand(Kind.INPUT, np.asarray(values, np.int32), I32, dim)


def slots(values: NDArray[Any]) -> Operand:
    """Recurrent states, one per slot."""
    return Operand(Kind.STATE, values, dim="n_slots")


def blocks(values: NDArray[Any], dtype: DType = F16) -> Operand:
    """KV cache blocks."""
    return Operand(Kind.STATE, values, dtype, "n_blocks")


def recurrent_operands(
    lengths: Sequence[int], fresh: Sequence[int] = (), n_snapshots: int = 0
) -> dict[str, Operand]:
    """Sequences of these lengths: s starts from slot 2s (zeros if in `fresh`), ends in 2s + 1.

    Per-token states go to the slots after those; those of tokens before the batch go nowhere.
    """
    n = len(lengths)
    src = [-1 if s in fresh else 2 * s for s in range(n)]
    snapshots = np.arange(2 * n, 2 * n + n * n_snapshots).reshape(n, n_snapshots)
    for s, length in enumerate(lengths):
        snapshots[s, : max(0, n_snapshots - length)] = -1
    return {
        "seq_starts": integers(np.cumsum([0, *lengths]), "n_seqs + 1"),
        "state_src": integers(src, "n_seqs"),
        "state_dst": integers(2 * np.arange(n) + 1, "n_seqs"),
        "snapshot_dst": integers(snapshots, "n_seqs"),
    }


def paged_operands(
    rng: Rng, pasts: Sequence[int], lengths: Sequence[int], block_size: int
) -> tuple[dict[str, Operand], int]:
    """Sequences with `pasts` cached positions and `lengths` new ones, in shuffled blocks.

    Returns positions, seq_starts and block_tables, and the number of blocks of the cache.
    """
    need = [-(-(p + n) // block_size) for p, n in zip(pasts, lengths, strict=True)]
    n_blocks = sum(need) + 2
    order = iter(rng.permutation(n_blocks).tolist())
    tables = np.full((len(need), max(need) + 1), -1)
    for s, n in enumerate(need):
        tables[s, :n] = [next(order) for _ in range(n)]
    positions = np.concatenate([np.arange(p, p + n) for p, n in zip(pasts, lengths, strict=True)])
    return {
        "positions": integers(positions, "n_tokens"),
        "seq_starts": integers(np.cumsum([0, *lengths]), "n_seqs + 1"),
        "block_tables": integers(tables, "n_seqs"),
    }, n_blocks


def live_counts(operands: dict[str, Operand]) -> Live:
    """The live counts that a case's operands have."""
    sizes = {o.dim: len(o.values) for o in operands.values() if o.dim}
    n_seqs = sizes.get("n_seqs + 1", 1) - 1
    positions = operands.get("positions")
    kv_rows = kv_pairs = 0
    if positions is not None:
        visible = positions.values + 1
        kv_pairs = int(visible.sum())
        kv_rows = int(visible[operands["seq_starts"].values[1:] - 1].sum())
    n_tokens, n_outputs = sizes.get("n_tokens", 0), sizes.get("n_outputs", 0)
    return Live(n_tokens, n_seqs, n_outputs, kv_rows, kv_pairs)


def single_node_graph(
    op: Op, case: Case, operands: dict[str, Operand], spare: int = 3, strided: bool = False
) -> tuple[Graph, dict[str, Tensor]]:
    """A graph of one node, with `spare` rows of capacity above the live counts.

    With `strided`, activations are views of wider rows, to be filled through their base.
    Returns the graph and the tensor of each operand.
    """
    graph = Graph(Capacity(0))
    tensors: dict[str, Tensor] = {}
    for name, operand in operands.items():
        shape = operand.values.shape
        if operand.dim:
            extra = 0 if operand.kind is Kind.STATE else spare
            shape = (Dim(shape[0] + extra, operand.dim), *shape[1:])
        match operand.kind:
            case Kind.WEIGHT:
                tensors[name] = graph.weight(f"test.{name}.weight", shape, operand.dtype)
            case Kind.INPUT:
                tensors[name] = graph.input(name, shape)
            case Kind.STATE:
                tensors[name] = graph.state(f"test.{name}", shape, operand.dtype)
            case Kind.ACTIVATION if strided:
                tensors[name] = _strided_activation(name, shape, operand.dtype)
            case Kind.ACTIVATION:
                tensors[name] = Tensor(f"test.{name}", shape, operand.dtype, Kind.ACTIVATION)
    outputs = graph.add(op, f"test.{op.name.lower()}", tensors, **case.attrs)
    graph.outputs = {f"out{i}": t for i, t in enumerate(outputs)}
    return graph, tensors


def _strided_activation(name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """Rows that lie inside wider ones: 3 elements before them, 5 behind."""
    width = int(np.prod(shape[1:]))
    base = Tensor(f"test.{name}", (shape[0], width + 8), dtype, Kind.ACTIVATION)
    return base.slice(1, 3, 3 + width).unflatten(1, *shape[1:])
