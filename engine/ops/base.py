"""Shared by the ops: activation functions, ragged sequences, paged rows, shape checks, costs.

Sequence s of a batch has the rows seq_starts[s] … seq_starts[s + 1] - 1; it may have none. Its
recurrent state starts as slot `state_src[s]` (-1: zeros) and is written to slot `state_dst[s]`
(-1: not written). Of its n tokens, slot `snapshot_dst[s, j]` (j < K) gets the state after token
n - K + j, if neither the slot nor that is negative. No sequence uses a slot that another writes.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Cost, Dims, Inputs, Kind, Live, Node, ShapeError, Tensor, match_shapes

Array = NDArray[Any]

# Operands that place a batch's sequences in state slots, and in cache blocks, with their shapes.
RECURRENT = {"seq_starts": "S1", "state_src": "S", "state_dst": "S", "snapshot_dst": "S K"}
PAGED = {"positions": "T", "seq_starts": "S1", "block_tables": "S M"}


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(1 / (1 + np.exp(-np.maximum(x, -80))))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)); x itself above 20, as PyTorch has it."""
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def rms_norm(x: Array, eps: float) -> Array:
    return np.asarray(x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps))


def expect(fits: bool, what: str, expected: str, got: object) -> None:
    """Raise ShapeError unless `fits`; `what` is an operand or an attribute."""
    if not fits:
        raise ShapeError(f"{what}: expected {expected}, got {got}")


def match_placed(inputs: Inputs, placed: Mapping[str, str], **patterns: str) -> Dims:
    """`match_shapes`, with the operands of RECURRENT or PAGED."""
    dims = match_shapes(inputs, **patterns, **placed)
    expect(dims.S1 == dims.S + 1, "operand seq_starts", f"[{dims.S + 1}]", [int(dims.S1)])
    return dims


def require_contiguous_rows(inputs: Inputs, *operands: str, from_axis: int = 1) -> None:
    """Raise ShapeError if operands that are present are strided at or after `from_axis`."""
    for operand in operands:
        tensor = inputs.get(operand)
        if tensor is not None:
            expected = f"axes from {from_axis} on without gaps"
            got = f"strides {list(tensor.strides)} for {list(map(int, tensor.shape))}"
            expect(tensor.is_contiguous(from_axis), f"operand {operand}", expected, got)


def with_stem(inputs: Inputs, stem: str) -> dict[str, Tensor]:
    """The operands whose names start with `stem`: the times that a repeated one comes."""
    return {name: t for name, t in inputs.items() if name.startswith(stem)}


def numbered(operands: Mapping[str, Any], first: str, second: str) -> list[tuple[str, str]]:
    """Names of operands that come in pairs: first and second, then first1 and second1, …"""
    pairs = ((f"{first}{i or ''}", f"{second}{i or ''}") for i in range(len(operands)))
    return [pair for pair in pairs if pair[0] in operands]


def spans(seq_starts: Array) -> Iterator[tuple[int, slice]]:
    """(sequence, its rows) for every sequence of the batch that has rows."""
    for s, (start, stop) in enumerate(pairwise(seq_starts)):
        if start < stop:
            yield s, slice(int(start), int(stop))


def initial_state(state: Array, slot: int, dtype: Any) -> Array:
    if slot < 0:
        return np.zeros(state.shape[1:], dtype)
    return np.asarray(state[slot], dtype).copy()


def write_rows(cache: Array, rows: Array, placed: Mapping[str, Array]) -> None:
    """Write each token's row [T, H, D] at its position of the cache; `placed`: PAGED."""
    for s, span in spans(placed["seq_starts"]):
        block, row = np.divmod(placed["positions"][span], cache.shape[2])
        cache[placed["block_tables"][s, block], :, row] = rows[span]


def live_bytes(tensor: Tensor, live: Live) -> int:
    """Bytes of a tensor's live part; a weight's are its bytes in the file."""
    return tensor.dtype.nbytes(live.shape(tensor.shape))


def bytes_moved(node: Node, live: Live) -> int:
    """Live bytes of all operands and outputs but states, of which each op counts its own part."""
    inputs = [t for t in node.inputs.values() if t.kind is not Kind.STATE]
    return sum(live_bytes(t, live) for t in (*inputs, *node.outputs))


def elementwise_cost(flops: int) -> Any:
    """Cost function of an op that does `flops` operations an element of its outputs."""

    def cost(node: Node, live: Live) -> Cost:
        elems = sum(math.prod(live.shape(t.shape)) for t in node.outputs)
        return Cost(flops * elems, bytes_moved(node, live))

    return cost


def state_bytes(state: Tensor, live: Live) -> int:
    """Bytes of the live sequences' states, each read once and written once."""
    return 2 * live.n_seqs * state.dtype.nbytes(state.shape[1:])


def written_bytes(cache: Tensor, live: Live) -> int:
    """Bytes that the batch's tokens write to a cache."""
    return live.n_tokens * cache.shape[1] * cache.dtype.row_bytes(cache.shape[3])
