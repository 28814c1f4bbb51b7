"""A backend that runs three ops in numpy: what the contract of engine/backends/base.py asks for.

It holds decoded weights, and the live rows of tensors from one step to the next. None of its ops
has state, so its StateStore is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engine.backends.base import Array, Backend, Limits, Split, Support, Traits, WeightSource
from engine.formats.quants import dequantize, numpy_dtype
from engine.graph import Kind, Live, Node, Tensor
from tests.support.toy_backend.program import KERNELS, ToyProgram


class NoStates:
    """A StateStore without a tensor."""

    def allocate(self, states: Sequence[Tensor], extra: Mapping[str, int]) -> None:
        assert not states, states

    def zero(self, dim: str, index: int) -> None:
        pass

    def copy(self, dim: str, source: int, target: int) -> None:
        pass

    def read(self, tensor: Tensor, indices: Sequence[int], buffer: Any) -> Any:
        raise NotImplementedError

    def write(self, tensor: Tensor, indices: Sequence[int], values: Any) -> None:
        raise NotImplementedError

    def give_back(self, dim: str, indices: Sequence[int]) -> None:
        pass


class ToyBackend(Backend):
    """Runs the ops of KERNELS. `loaded` has the names of the weights that it was given."""

    name, detail = "toy", "numpy, three ops"
    traits = Traits(n_ubatch=64)

    def __init__(self) -> None:
        self.states = NoStates()
        self.loaded: list[str] = []
        self._values: dict[Tensor, Array] = {}

    def supports(self, node: Node) -> Support:
        if node.op.name in KERNELS:
            return Support(True)
        return Support(False, f"no kernel for {node.op.name}")

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        return sum(4 * math.prod(t.shape) for t in _weights(nodes))

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        for t in _weights(nodes):
            self._values[t] = dequantize(t.dtype, source.raw(t.name), t.shape)
            self.loaded.append(t.name)

    def compile(self, split: Split) -> ToyProgram:
        return ToyProgram(self, split)

    def write(self, tensor: Tensor, values: Array) -> None:
        self._values[tensor] = np.ascontiguousarray(values, numpy_dtype(tensor.dtype))

    def read(self, tensor: Tensor) -> Array:
        return self._values[tensor]

    def measure_limits(self) -> Limits:
        return Limits(1e10, {"numpy": 1e10}, "a guess")

    def release(self) -> None:
        self._values.clear()

    def operand(self, tensor: Tensor, live: Live) -> Array:
        """The live rows of a tensor; a view looks into the array of its base."""
        base = self._values[tensor.base]
        strides = [base.itemsize * stride for stride in tensor.strides]
        return as_strided(base.reshape(-1)[tensor.offset :], live.shape(tensor.shape), strides)

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Drop activations that nothing reads any more."""
        for tensor in tensors:
            self._values.pop(tensor, None)


def _weights(nodes: Sequence[Node]) -> list[Tensor]:
    """The weights that some nodes read, each once."""
    operands = (t for node in nodes for t in node.inputs.values())
    return list(dict.fromkeys(t.base for t in operands if t.kind is Kind.WEIGHT))
