"""The CPU backend: kernels of the best instruction set that the machine has, on a team of threads.

A split becomes one flat array of instructions, which one native call runs: no Python between nodes.
Results do not depend on the number of threads, nor a sequence's on what else is in the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cpu.lower import PACKED_KERNELS, Lowering, Step
from engine.backends.cpu.weights import CpuWeights
from engine.backends.native import library as cpu_library
from engine.backends.native.buffers import Arena
from engine.backends.native.fusion import Uses
from engine.backends.native.signatures import (
    DIMS,
    F32_CODE,
    I32_CODE,
    INSTRUCTION,
    MAX_RANK,
    SIGNATURES,
    VIEW,
    Ref,
    Scratch,
    tensor_view,
    used_packed,
    view,
)
from engine.backends.native.states import ArrayStates
from engine.formats.quants import F32, I32, numpy_dtype
from engine.graph import Kind, Live, Node, Tensor
from engine.placement.place import Instruction, Split, Support, Watch, WeightSource

Array = NDArray[Any]
_MAX_HEAD, _MAX_LATENT = 256, 1024
# Head sizes of the delta rule's chunks are multiples of this (has_chunk_form in the kernels).
_CHUNK_SIZES = 32
_KERNELS = {*SIGNATURES, "MUL_MAT", "MUL_MAT_ID"}


class CpuBackend:
    """Runs on `n_threads` threads (None: all cores) with the kernels of `isa` (None: the best).

    `matrix`: whether blocks of rows are multiplied as bfloat16 tiles (None: where there are matrix
    units; elsewhere it is slow, and for tests).
    """

    name = "cpu"

    def __init__(
        self, n_threads: int | None = None, isa: str | None = None, matrix: bool | None = None
    ) -> None:
        self.library = cpu_library.load(isa)
        self.matrix = self.library.isa == "amx" if matrix is None else matrix
        self.n_threads = n_threads or cpu_library.n_cores()
        threads = "1 thread" if self.n_threads == 1 else f"{self.n_threads} threads"
        self.detail = f"{self.library.isa} kernels, {threads}"
        self.team = self.library.team_create(self.n_threads)
        self.states = ArrayStates()
        self.weights = CpuWeights(self.library, self.n_threads)
        self._source: WeightSource | None = None
        self._fixed: dict[Tensor, Array] = {}
        self._live: Live | None = None

    def __del__(self) -> None:
        if team := getattr(self, "team", None):
            self.library.team_free(team)

    def supports(self, node: Node) -> Support:
        """All ops of the models, head sizes up to 256; chunks of the delta rule by matrix units."""
        if node.op.name not in _KERNELS:
            return Support(False, f"no kernel for {node.op.name}")
        if any(len(t.shape) > MAX_RANK for t in (*node.inputs.values(), *node.outputs)):
            return Support(False, f"more than {MAX_RANK} dimensions")
        if node.op.name == "GATED_DELTA_NET":
            d_v, d_k = node.inputs["state"].shape[2:]
            if max(d_k, d_v) > _MAX_HEAD:
                return Support(False, f"head size {max(d_k, d_v)} above {_MAX_HEAD}")
            if node.attrs["algorithm"] == "chunk" and (reason := self._no_chunks(node)):
                return Support(False, reason)
        if node.op.name == "ATTENTION" and node.inputs["q"].shape[2] > _MAX_LATENT:
            return Support(False, f"head size {node.inputs['q'].shape[2]} above {_MAX_LATENT}")
        return Support(True)

    def _no_chunks(self, node: Node) -> str:
        """Why the delta rule's node can't be computed in chunk form, if so."""
        d_v, d_k = node.inputs["state"].shape[2:]
        if not self.matrix:
            return "no matrix units"
        if d_k % _CHUNK_SIZES or d_v % _CHUNK_SIZES:
            return f"no chunked kernel for heads of {d_k} and {d_v}, no multiples of {_CHUNK_SIZES}"
        return ""

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Packed weights, and those decoded to float32."""
        packed, plain = used_packed(nodes)
        decoded = sum(math.prod(t.shape) for t in plain) * 4
        return sum(self.weights.packed_bytes(t) for t in packed) + decoded

    def free_bytes(self) -> int | None:
        """It uses the machine's memory."""
        return None

    def load_weights(self, weights: Sequence[Tensor], source: WeightSource) -> None:
        """Weights are packed when it is known what reads them: by `compile`."""
        self._source = source

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        """States as arrays of their stored type."""
        self.states.allocate(states)

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Nothing to do: each input has memory of its own."""

    def compile(self, split: Split) -> CpuProgram:
        """Load the split's weights and lay out its program."""
        packed, plain = used_packed(split.nodes)
        assert self._source is not None or not (packed or plain)
        if self._source is not None:
            self.weights.load(packed, plain, self._source)
        return CpuProgram(self, split)

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of a tensor."""
        target = self.fixed(tensor)
        target.reshape(-1)[: values.size] = np.ravel(values)

    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that is kept."""
        assert self._live is not None
        shape = self._live.shape(tensor.shape)
        values = self._fixed[tensor].reshape(-1)[: int(np.prod(shape))]
        return values.reshape(shape).copy()

    def release(self) -> None:
        """Forget weights, states and activations."""
        self.weights, self.states = CpuWeights(self.library, self.n_threads), ArrayStates()
        self._fixed.clear()

    def fixed(self, tensor: Tensor) -> Array:
        """The memory of a tensor that outlives programs; made at its first use."""
        if tensor not in self._fixed:
            self._fixed[tensor] = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
        return self._fixed[tensor]

    def run(self, instructions: Array, live: Live, seconds: Array | None = None) -> None:
        """Run some instructions of a program."""
        self._live = live
        blocks = live.blocks if self.matrix else ()
        dims = [live.dim(name) or 0 for name in DIMS]
        counts = np.array([*dims, len(blocks), *itertools.chain(*blocks)], np.int64)
        times = None if seconds is None else seconds.ctypes.data
        self.library.run(
            self.team, instructions.ctypes.data, len(instructions), counts.ctypes.data, times
        )

    def read_probe(self, rows: Array) -> None:
        """Read float32 rows [n, a multiple of 64] once, with all threads; for timing."""
        words = np.empty(len(rows), np.int32)
        views = np.array(
            [
                view(words.ctypes.data, words.shape, (1,), I32_CODE),
                view(rows.ctypes.data, rows.shape, (rows.shape[1], 1), F32_CODE),
            ],
            VIEW,
        )
        program = np.zeros(1, INSTRUCTION)
        program[0] = (self.library.kernel_address("READ_PROBE"), views.ctypes.data, 0, 0)
        self.library.run(
            self.team, program.ctypes.data, 1, np.zeros(len(DIMS) + 1, np.int64).ctypes.data, None
        )


class CpuProgram:
    """A compiled split; nodes are `fused` where one kernel computes several."""

    def __init__(self, backend: CpuBackend, split: Split, fused: bool = True) -> None:
        self._backend, self._split, self._is_fused = backend, split, fused
        self._unfused: CpuProgram | None = None
        lowering = Lowering(Uses.of(split.nodes, split.keeps), backend.matrix)
        lowering.add_all(split.nodes, fused)
        made = {t for node in split.nodes for t in node.outputs}
        used = {t.base for node in split.nodes for t in node.inputs.values()}
        given = {t for t in used if t.kind is Kind.ACTIVATION and t not in made}
        self._fixed = given | set(split.keeps) | {t for t in used if t.kind is Kind.INPUT}
        arena: Arena[Any] = Arena()
        lowering.place(arena, self._fixed)
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
        self._spans: dict[Node, tuple[int, int]] = {}
        for i, step in enumerate(steps):
            first, _ = self._spans.get(step.nodes[0], (i, i))
            self._spans[step.nodes[0]] = (first, i + 1)

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
        if ref.base in self._fixed:
            return tensor_view(ref, backend.fixed(ref.base).ctypes.data)
        return tensor_view(ref, self._base + self._offsets[ref.base])

    def run(self, live: Live, watch: Watch | None = None) -> None:
        """Run the nodes on the live rows of their operands."""
        if watch is None:
            self._backend.run(self._program, live)
            return
        if self._is_fused:
            self._unfused = self._unfused or CpuProgram(self._backend, self._split, fused=False)
            self._unfused.run(live, watch)
            return
        for node, (begin, end) in self._spans.items():
            self._backend.run(self._program[begin:end], live)
            watch(node, [self._output(t, live) for t in node.outputs])

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`; the seconds of each instruction, with a barrier after each."""
        seconds = np.zeros(len(self._program))
        self._backend.run(self._program, live, seconds)
        times: list[float] = seconds.tolist()
        return times

    def _output(self, tensor: Tensor, live: Live) -> Array:
        """A node's output right after the node ran."""
        if tensor in self._fixed:
            return self._backend.read(tensor)
        shape, dtype = live.shape(tensor.shape), numpy_dtype(tensor.dtype)
        start = self._base - self._arena.ctypes.data + self._offsets[tensor]
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        return self._arena[start : start + n_bytes].view(dtype).reshape(shape)
