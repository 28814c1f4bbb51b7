"""A split on the CPU: instructions with their addresses, run by one native call per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from engine.backends.base import Array, Split
from engine.backends.cpu.fusion import FUSIONS
from engine.backends.cpu.lower import Lowering, Step
from engine.backends.cpu.weights import CpuWeights
from engine.backends.native.buffers import ALIGNMENT
from engine.backends.native.library import Library
from engine.backends.native.program import NativeProgram, write_operand
from engine.backends.native.states import ArrayStates
from engine.backends.native.views import INSTRUCTION, VIEW
from engine.formats.quants import numpy_dtype
from engine.graph import Live, Node, Tensor


class Host(Protocol):
    """What a program needs of its backend."""

    library: Library
    weights: CpuWeights
    states: ArrayStates
    matrix: bool

    def fixed(self, tensor: Tensor) -> int:
        """The address of a tensor that outlives programs."""

    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that outlives programs."""

    def run(self, instructions: Array, live: Live, seconds: Array | None = None) -> None:
        """Run some instructions of a program."""


class CpuProgram(NativeProgram[Host]):
    """A compiled split; nodes are `fused` where one kernel computes several."""

    def __init__(self, host: Host, split: Split, fused: bool = True) -> None:
        super().__init__(host, split, fused)
        lowering = Lowering(host.library, self._readers, host.matrix)
        self._lower(lowering, FUSIONS, Lowering.add)
        self._place(lowering.steps, (step.phase for step in lowering.steps))
        self._lay_out(lowering.steps)

    def _allocate(self, n_bytes: int) -> int:
        self._arena = np.empty(n_bytes + ALIGNMENT, np.uint8)
        return -(-self._arena.ctypes.data // ALIGNMENT) * ALIGNMENT

    def _lay_out(self, steps: Sequence[Step]) -> None:
        """Write the steps' instructions, with their views and attributes."""
        self._views = np.zeros(sum(len(step.operands) for step in steps), VIEW)
        self._attrs = np.array([x for step in steps for x in step.attrs], np.float64)
        self._program = np.zeros(len(steps), INSTRUCTION)
        n_views = n_attrs = phase = 0
        for instruction, step in zip(self._program, steps, strict=True):
            instruction["kernel"] = self._host.library.kernel_address(step.kernel)
            instruction["views"] = self._views.ctypes.data + n_views * VIEW.itemsize
            instruction["attrs"] = self._attrs.ctypes.data + n_attrs * self._attrs.itemsize
            instruction["barrier"], phase = step.phase != phase, step.phase
            for ref in step.operands:
                record, address = self._views[n_views], self._address(ref)
                write_operand(record, ref, step.nodes, address, self._host.weights)
                n_views += 1
            n_attrs += len(step.attrs)

    def _run_all(self, live: Live) -> None:
        self._host.run(self._program, live)

    def _run_node(self, node: Node, steps: range, live: Live) -> None:
        self._host.run(self._program[steps.start : steps.stop], live)

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`; the seconds of each instruction, with a barrier after each."""
        seconds = np.zeros(len(self._program))
        self._host.run(self._program, live, seconds)
        times: list[float] = seconds.tolist()
        return times

    def _output(self, tensor: Tensor, live: Live) -> Array:
        if tensor in self.outside:
            return self._host.read(tensor)
        shape, dtype = live.shape(tensor.shape), numpy_dtype(tensor.dtype)
        start = self._addresses[tensor] - self._arena.ctypes.data
        stop = start + math.prod(shape) * dtype.itemsize
        return self._arena[start:stop].view(dtype).reshape(shape)
