"""The reference backend: every op by its numpy definition.

It defines the results of the other backends. Weights are decoded to float32 (or float64, for tests)
and cached up to a byte limit; states keep their stored type, so that writing to them rounds.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engine.backends import base
from engine.backends.base import Array, Backend, Instruction, Limits, Split, Support
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native.states import ArrayStates
from engine.formats.quants import I32, dequantize, numpy_dtype
from engine.graph import Kind, Live, Node, Tensor

# Of decoded weights that are kept between steps; others are decoded again at each use.
DEFAULT_CACHE_BYTES = 16 << 30


class ReferenceBackend(Backend):
    """Runs everything. `dtype`: float32, or float64 for tests against a higher precision."""

    name = "reference"
    traits = base.Traits(cache_type="f32")
    states: ArrayStates

    def __init__(self, dtype: type = np.float32, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.dtype = np.dtype(dtype)
        self.detail = f"numpy, {self.dtype}"
        self._weights = _WeightCache(self.dtype, cache_bytes)
        self.states = ArrayStates()
        self._values: dict[Tensor, Array] = {}

    def supports(self, node: Node) -> Support:
        return Support(True)

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Decoded weights, as far as they are kept."""
        decoded = sum(math.prod(t.shape) for t in _weights_of(nodes)) * self.dtype.itemsize
        return min(decoded, self._weights.limit)

    def load_weights(self, nodes: Sequence[Node], source: base.WeightSource) -> None:
        """Remember the source: a weight is read and decoded when a node needs it."""
        for tensor in _weights_of(nodes):
            self._weights.add(tensor, source)

    def compile(self, split: Split) -> ReferenceProgram:
        return ReferenceProgram(self, split)

    def write(self, tensor: Tensor, values: Array) -> None:
        self._values[tensor] = np.ascontiguousarray(values, self._computed(tensor))

    def read(self, tensor: Tensor) -> Array:
        return self._values[tensor]

    def measure_limits(self) -> Limits:
        return replace(CpuBackend().measure_limits(), unit_of={})

    def release(self) -> None:
        self._weights, self.states = _WeightCache(self.dtype, self._weights.limit), ArrayStates()
        self._values.clear()

    def array(self, tensor: Tensor, live: Live) -> Array:
        """The live part of an operand as ops see it, views resolved."""
        if tensor.kind is Kind.WEIGHT:
            owned = self._weights.get(tensor.base)
        elif tensor.kind is Kind.STATE:
            owned = self.states.arrays[tensor.base]
        else:
            owned = self._values[tensor.base]
        if tensor.view_of is None:
            return owned
        assert owned.flags.c_contiguous, tensor
        strides = tuple(s * owned.itemsize for s in tensor.strides)
        return as_strided(owned.reshape(-1)[tensor.offset :], live.shape(tensor.shape), strides)

    def store(self, tensor: Tensor, values: Array, live: Live) -> None:
        assert values.shape == live.shape(tensor.shape), (tensor, values.shape)
        self._values[tensor] = np.ascontiguousarray(values, self._computed(tensor))

    def _computed(self, tensor: Tensor) -> np.dtype[Any]:
        """The type of a tensor's values here: int32, or the backend's floats."""
        return numpy_dtype(I32) if tensor.dtype is I32 else self.dtype

    def forget(self, tensor: Tensor) -> None:
        self._values.pop(tensor, None)


class ReferenceProgram:
    """Runs a split node by node, and drops activations after their last use."""

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
        ends = [time.perf_counter()]
        self.run(live, lambda *_: ends.append(time.perf_counter()))
        return [end - start for start, end in pairwise(ends)]

    def run(self, live: Live, watch: base.Watch | None = None) -> None:
        backend = self._backend
        for node in self._nodes:
            operands = {name: backend.array(t, live) for name, t in node.inputs.items()}
            # The engine's finite check reports values that are not finite.
            with np.errstate(all="ignore"):
                outputs = node.op.reference(**operands, **node.attrs)
            for tensor, values in zip(node.outputs, outputs, strict=True):
                backend.store(tensor, values, live)
            if watch is not None:
                watch(node, [backend.read(t) for t in node.outputs])
            for tensor in self._release.get(node, ()):
                backend.forget(tensor)


class _WeightCache:
    """Weights by tensor, read and decoded on demand; least recently used ones are dropped first."""

    def __init__(self, dtype: np.dtype[Any], limit: int) -> None:
        self._dtype, self.limit, self._bytes = dtype, limit, 0
        self._sources: dict[Tensor, base.WeightSource] = {}
        self._decoded: OrderedDict[Tensor, Array] = OrderedDict()

    def add(self, tensor: Tensor, source: base.WeightSource) -> None:
        self._sources[tensor] = source
        if (old := self._decoded.pop(tensor, None)) is not None:
            self._bytes -= old.nbytes

    def get(self, tensor: Tensor) -> Array:
        if tensor in self._decoded:
            self._decoded.move_to_end(tensor)
            return self._decoded[tensor]
        source = self._sources[tensor]
        raw, factors = source.raw(tensor.name), source.factors(tensor.name)
        values = dequantize(tensor.dtype, raw, tensor.shape, factors)
        decoded: Array = values.astype(self._dtype, copy=False)
        self._decoded[tensor] = decoded
        self._bytes += decoded.nbytes
        while self._bytes > self.limit:
            _, dropped = self._decoded.popitem(last=False)
            self._bytes -= dropped.nbytes
        return decoded


def _weights_of(nodes: Sequence[Node]) -> list[Tensor]:
    operands = (t for node in nodes for t in node.inputs.values())
    return list(dict.fromkeys(t.base for t in operands if t.kind is Kind.WEIGHT))


REGISTRATION = base.Registration(
    "reference",
    ReferenceBackend.traits,
    make=lambda options: ReferenceBackend(),
    missing=lambda: "",
    describe=lambda: "reference",
)
