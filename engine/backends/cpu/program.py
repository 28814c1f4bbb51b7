"""A split on the CPU: instructions with their addresses, run by one native call per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from engine.backends.base import Array, Instruction, Split
from engine.backends.cpu.lower import PACKED_KERNELS, Lowering, Step
from engine.backends.cpu.weights import CpuWeights
from engine.backends.native.buffers import Arena, Ref, Scratch
from engine.backends.native.fusion import Uses
from engine.backends.native.library import Library
from engine.backends.native.program import NativeProgram
from engine.backends.native.states import ArrayStates
from engine.backends.native.views import (
    F32_CODE,
    I32_CODE,
    INSTRUCTION,
    VIEW,
    tensor_view,
    view,
)
from engine.formats.quants import F32, I32, numpy_dtype
from engine.graph import Kind, Live, Node, Tensor


class Host(Protocol):
    """What a program needs of its backend."""

    library: Library
    weights: CpuWeights
    states: ArrayStates
    matrix: bool

    def fixed(self, tensor: Tensor) -> Array:
        """The memory of a tensor that outlives programs."""

    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that outlives programs."""

    def run(self, instructions: Array, live: Live, seconds: Array | None = None) -> None:
        """Run some instructions of a program."""


class CpuProgram(NativeProgram):
    """A compiled split; nodes are `fused` where one kernel computes several."""

    def __init__(self, backend: Host, split: Split, fused: bool = True) -> None:
        super().__init__(split, fused)
        self._backend = backend
        lowering = Lowering(Uses.of(split.nodes, split.keeps), backend.matrix)
        lowering.add_all(split.nodes, fused)
        arena: Arena[Any] = Arena()
        lowering.place(arena, self.outside)
        self._arena, self._offsets = np.empty(arena.size + 64, np.uint8), arena.offsets
        self._base = -(-self._arena.ctypes.data // 64) * 64
        self._lay_out(lowering.steps)

    def _lay_out(self, steps: list[Step]) -> None:
        views = [self._view(step, ref) for step in steps for ref in step.operands]
        self._views = np.array(views, VIEW) if views else np.zeros(0, VIEW)
        self._attrs = np.array([x for step in steps for x in step.attrs], np.float64)
        self._program = np.zeros(len(steps), INSTRUCTION)
        n_views = n_attrs = 0
        for i, step in enumerate(steps):
            self._program[i] = (
                self._backend.library.kernel_address(step.kernel),
                self._views.ctypes.data + n_views * VIEW.itemsize,
                self._attrs.ctypes.data + n_attrs * 8,
                i > 0 and step.phase != steps[i - 1].phase,
            )
            n_views += len(step.operands)
            n_attrs += len(step.attrs)
        self.instructions = [Instruction(step.kernel, tuple(step.nodes)) for step in steps]
        for i, step in enumerate(steps):
            first = self._spans.get(step.nodes[0], range(i, i)).start
            self._spans[step.nodes[0]] = range(first, i + 1)

    def _view(self, step: Step, ref: Ref) -> Array:
        backend = self._backend
        if ref is None:
            return np.zeros((), VIEW)
        if isinstance(ref, Scratch):
            strides = [int(np.prod(ref.shape[i + 1 :])) for i in range(len(ref.shape))]
            codes = {F32: F32_CODE, I32: I32_CODE}
            code = ref.dtype if isinstance(ref.dtype, int) else codes[ref.dtype]
            return view(self._base + self._offsets[ref], ref.shape, strides, code)
        if ref.kind is Kind.WEIGHT:
            if step.kernel in PACKED_KERNELS:
                return backend.weights.packed_view(ref)
            return backend.weights.plain_view(ref)
        if ref.kind is Kind.STATE:
            return tensor_view(ref, backend.states.arrays[ref.base].ctypes.data)
        if ref.base in self.outside:
            return tensor_view(ref, backend.fixed(ref.base).ctypes.data)
        return tensor_view(ref, self._base + self._offsets[ref.base])

    def _compile_unfused(self) -> CpuProgram:
        return CpuProgram(self._backend, self._split, fused=False)

    def _run_all(self, live: Live) -> None:
        self._backend.run(self._program, live)

    def _run_node(self, node: Node, steps: range, live: Live) -> None:
        self._backend.run(self._program[steps.start : steps.stop], live)

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`; the seconds of each instruction, with a barrier after each."""
        seconds = np.zeros(len(self._program))
        self._backend.run(self._program, live, seconds)
        times: list[float] = seconds.tolist()
        return times

    def _output(self, tensor: Tensor, live: Live) -> Array:
        if tensor in self.outside:
            return self._backend.read(tensor)
        shape, dtype = live.shape(tensor.shape), numpy_dtype(tensor.dtype)
        start = self._base - self._arena.ctypes.data + self._offsets[tensor]
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        return self._arena[start : start + n_bytes].view(dtype).reshape(shape)
