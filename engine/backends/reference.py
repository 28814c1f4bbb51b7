"""The reference backend: every op by its numpy definition.

It defines what the other backends must compute. Stored types are decoded to float32 (or float64,
for tests) before an op sees them, with decoded weights cached up to a byte limit; states keep their
stored type, so that writing to them rounds.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from engine.backends.base import Array, Instruction, Split, Support, Watch, WeightSource
from engine.backends.native.states import ArrayStates
from engine.formats.quants import I32, dequantize, numpy_dtype
from engine.graph import Kind, Live, Node, Tensor

# Decoded weights kept between steps; above it they are decoded again at each use.
DEFAULT_CACHE_BYTES = 16 << 30


class ReferenceBackend:
    """Runs everything. `dtype`: float32, or float64 for tests against a higher precision."""

    name = "reference"

    def __init__(self, dtype: type = np.float32, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.dtype = np.dtype(dtype)
        self.detail = f"numpy, {self.dtype}"
        self._weights = _WeightCache(self.dtype, cache_bytes)
        self.states = ArrayStates()
        self._values: dict[Tensor, Array] = {}

    def supports(self, node: Node) -> Support:
        """Always yes."""
        return Support(True)

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Decoded weights, as far as they are kept."""
        used = {t.base for node in nodes for t in node.inputs.values() if t.kind is Kind.WEIGHT}
        decoded = sum(math.prod(t.shape) for t in used) * self.dtype.itemsize
        return min(decoded, self._weights.limit)

    def free_bytes(self) -> int | None:
        """It uses the machine's memory."""
        return None

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        """Nothing is read before a node needs it."""
        used = (t.base for node in nodes for t in node.inputs.values() if t.kind is Kind.WEIGHT)
        for tensor in dict.fromkeys(used):
            self._weights.add(tensor, source.raw(tensor.name))

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        """States as numpy arrays of their stored type."""
        self.states.allocate(states)

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Nothing to do: inputs are kept as they are given."""

    def compile(self, split: Split) -> ReferenceProgram:
        """A list of nodes, and after each the tensors that nobody needs any more."""
        return ReferenceProgram(self, split)

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set a tensor's live rows."""
        self._values[tensor] = np.ascontiguousarray(values, self._computed(tensor))

    def read(self, tensor: Tensor) -> Array:
        """A tensor's live rows."""
        return self._values[tensor]

    def release(self) -> None:
        """Forget weights, states and activations."""
        self._weights, self.states = _WeightCache(self.dtype, self._weights.limit), ArrayStates()
        self._values.clear()

    def array(self, tensor: Tensor, live: Live) -> Array:
        """The live part of an operand as ops see it, views resolved."""
        if tensor.kind is Kind.WEIGHT:
            base = self._weights.get(tensor.base)
        elif tensor.kind is Kind.STATE:
            base = self.states.arrays[tensor.base]
        else:
            base = self._values[tensor.base]
        if tensor.view_of is None:
            return base
        assert base.flags.c_contiguous, tensor
        strides = tuple(s * base.itemsize for s in tensor.strides)
        return as_strided(base.reshape(-1)[tensor.offset :], live.shape(tensor.shape), strides)

    def keep(self, tensor: Tensor, values: Array, live: Live) -> None:
        """Store an output of a node."""
        assert values.shape == live.shape(tensor.shape), (tensor, values.shape)
        self._values[tensor] = np.ascontiguousarray(values, self._computed(tensor))

    def _computed(self, tensor: Tensor) -> np.dtype[Any]:
        """The type that a tensor's values have here: integers, or the type computed in."""
        return numpy_dtype(I32) if tensor.dtype is I32 else self.dtype

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Release activations."""
        for tensor in tensors:
            self._values.pop(tensor, None)


class ReferenceProgram:
    """Runs a split node by node."""

    def __init__(self, backend: ReferenceBackend, split: Split) -> None:
        self._backend, self._nodes = backend, split.nodes
        passing = {t for node in split.nodes for t in node.outputs} - set(split.keeps)
        passing |= set(split.copies)
        last_use: dict[Tensor, Node] = {}
        for node in split.nodes:
            used = (*node.outputs, *(t.base for t in node.inputs.values()))
            last_use |= dict.fromkeys(used, node)
        self._release: dict[Node, list[Tensor]] = {}
        for tensor in passing:
            self._release.setdefault(last_use[tensor], []).append(tensor)
        self.instructions = [Instruction(node.op.name, (node,)) for node in split.nodes]

    def run_timed(self, live: Live) -> list[float]:
        """As `run`; the seconds of each node."""
        ends = [time.perf_counter()]
        self.run(live, lambda *_: ends.append(time.perf_counter()))
        return [end - start for start, end in pairwise(ends)]

    def run(self, live: Live, watch: Watch | None = None) -> None:
        """Run the nodes on the live rows of their operands."""
        backend = self._backend
        for node in self._nodes:
            operands = {name: backend.array(t, live) for name, t in node.inputs.items()}
            # What is not finite is the engine's guard's to find and name.
            with np.errstate(all="ignore"):
                outputs = node.op.reference(**operands, **node.attrs)
            for tensor, values in zip(node.outputs, outputs, strict=True):
                backend.keep(tensor, values, live)
            if watch is not None:
                watch(node, [backend.read(t) for t in node.outputs])
            backend.forget(self._release.get(node, ()))


class _WeightCache:
    """Stored weights by tensor, decoded on demand; the least recently used go first."""

    def __init__(self, dtype: np.dtype[Any], limit: int) -> None:
        self._dtype, self.limit, self._size = dtype, limit, 0
        self._raw: dict[Tensor, NDArray[np.uint8]] = {}
        self._decoded: OrderedDict[Tensor, Array] = OrderedDict()

    def add(self, tensor: Tensor, raw: NDArray[np.uint8]) -> None:
        self._raw[tensor] = raw
        if (stale := self._decoded.pop(tensor, None)) is not None:
            self._size -= stale.nbytes

    def get(self, tensor: Tensor) -> Array:
        if tensor in self._decoded:
            self._decoded.move_to_end(tensor)
            return self._decoded[tensor]
        values = dequantize(tensor.dtype, self._raw[tensor], tensor.shape)
        decoded: Array = values.astype(self._dtype, copy=False)
        self._size += decoded.nbytes
        self._decoded[tensor] = decoded
        while self._size > self.limit and self._decoded:
            _, dropped = self._decoded.popitem(last=False)
            self._size -= dropped.nbytes
        return decoded
