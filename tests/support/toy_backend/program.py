"""A compiled split of the toy backend, and its three kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from engine.backends.base import Array, Instruction, Split, Watch
from engine.graph import Live, Tensor

Operands = Mapping[str, Array]


class Host(Protocol):
    """What a program needs of its backend."""

    def operand(self, tensor: Tensor, live: Live) -> Array:
        """The live rows of a tensor."""

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of a tensor."""

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Drop tensors that nothing reads any more."""


def mul_mat(x: Operands, attrs: Mapping[str, Any]) -> list[Array]:
    """y_i = x · w_iᵀ, or add + sigmoid(gate) · y with one weight."""
    products = [x["x"] @ w.T for name, w in x.items() if name.startswith("weight")]
    if "gate" in x:
        products = [y / (1 + np.exp(-x["gate"])) for y in products]
    return [y + x["add"] for y in products] if "add" in x else products


def add_rms_norm(x: Operands, attrs: Mapping[str, Any]) -> list[Array]:
    """s = x + delta; s / sqrt(mean(s²) + eps) · weight; and s itself, where there is a delta."""
    total = x["x"] + x.get("delta", np.float32(0))
    root = np.sqrt(np.square(total).mean(axis=-1, keepdims=True) + np.float32(attrs["eps"]))
    norm = total / root * x["weight"]
    return [norm, total] if "delta" in x else [norm]


def swiglu(x: Operands, attrs: Mapping[str, Any]) -> list[Array]:
    """silu(gate) · up, for each pair of operands gate, up; gate1, up1; …, both within its limit."""
    names = [name for name in x if name.startswith("gate")]
    outputs = []
    for name, limit in zip(names, attrs["limits"], strict=True):
        gate, up, most = x[name], x[name.replace("gate", "up")], np.float32(limit or np.inf)
        # exp overflows to infinity for a strong negative gate, and x / infinity is the right limit.
        with np.errstate(over="ignore"):
            activated = gate / (1 + np.exp(-gate))
        outputs.append(np.minimum(activated, most) * np.clip(up, -most, most))
    return outputs


Kernel = Callable[[Operands, Mapping[str, Any]], list[Array]]
KERNELS: dict[str, Kernel] = {"MUL_MAT": mul_mat, "ADD_RMS_NORM": add_rms_norm, "SWIGLU": swiglu}


class ToyProgram:
    """Runs one kernel for each node, in order."""

    def __init__(self, backend: Host, split: Split) -> None:
        self._backend, self._nodes = backend, split.nodes
        outputs = {t for node in split.nodes for t in node.outputs}
        self._temporary = [*(outputs - set(split.keeps)), *split.copies]
        self.instructions = [Instruction(node.op.name, (node,)) for node in split.nodes]

    def run(self, live: Live, watch: Watch | None = None) -> None:
        for node in self._nodes:
            operands = {name: self._backend.operand(t, live) for name, t in node.inputs.items()}
            outputs = KERNELS[node.op.name](operands, node.attrs)
            for tensor, values in zip(node.outputs, outputs, strict=True):
                self._backend.write(tensor, values)
            if watch is not None:
                watch(node, outputs)
        self._backend.forget(self._temporary)

    def run_timed(self, live: Live) -> Sequence[float]:
        ends = [time.perf_counter()]
        self.run(live, lambda *_: ends.append(time.perf_counter()))
        return [end - start for start, end in pairwise(ends)]
