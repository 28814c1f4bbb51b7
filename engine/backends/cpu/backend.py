"""The CPU backend: kernels of the best instruction set that the machine has, on a team of threads.

A split becomes one flat array of instructions, which one native call runs: no Python between nodes.
Results do not depend on the number of threads, nor a sequence's on what else is in the batch.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from engine.backends.base import Array, Limits, Split, Traits
from engine.backends.cpu import limits
from engine.backends.cpu.fusion import FUSIONS
from engine.backends.cpu.lower import CpuCall, Lowering
from engine.backends.cpu.weights import CpuWeights
from engine.backends.native import library as cpu_library
from engine.backends.native import views
from engine.backends.native.backend import NativeBackend
from engine.backends.native.buffers import ALIGNMENT
from engine.backends.native.program import NativeProgram, write_operand
from engine.backends.native.signatures import SIGNATURES
from engine.backends.native.states import ArrayStates
from engine.backends.native.views import INSTRUCTION, VIEW, write_view
from engine.errors import NotEnoughMemoryError, thread_refused
from engine.formats.quants import numpy_dtype
from engine.graph import Kind, Live, Node, Tensor
from engine.threads import n_cores

# Head size of ATTENTION, at most.
_MAX_LATENT = 1024
# How long a step runs before signals are handled, or until the tasks at hand are done.
PIECE_SECONDS = 0.05
# Tasks of a probe for each thread, so that one that is held up leaves some to the others.
_PROBE_TASKS = 8
# Fewer rows of a sequence are computed one by one, others as row tiles.
_MIN_TILE_ROWS = 16


class CpuProgram(NativeProgram["CpuBackend"]):
    """A compiled split; nodes are `fused` where one kernel computes several."""

    def __init__(self, backend: CpuBackend, split: Split, fused: bool = True) -> None:
        super().__init__(backend, split, fused)
        lowering = Lowering(backend.library, self._readers, backend.matrix, backend.has_fine)
        self._lower(lowering, FUSIONS, Lowering.add)
        self._place(self._arena_of(lowering.calls, (call.phase for call in lowering.calls)))
        self._lay_out(lowering.calls)

    def _allocate(self, n_bytes: int) -> int:
        self._arena = np.empty(n_bytes + ALIGNMENT, np.uint8)
        return -(-self._arena.ctypes.data // ALIGNMENT) * ALIGNMENT

    def _lay_out(self, calls: Sequence[CpuCall]) -> None:
        self._views = np.zeros(sum(len(call.operands) for call in calls), VIEW)
        self._attrs = np.array([x for call in calls for x in call.attrs], np.float64)
        self._program = np.zeros(len(calls), INSTRUCTION)
        n_views = n_attrs = phase = 0
        for instruction, call in zip(self._program, calls, strict=True):
            instruction["kernel"] = self._backend.library.kernel_address(call.kernel)
            instruction["views"] = self._views.ctypes.data + n_views * VIEW.itemsize
            instruction["attrs"] = self._attrs.ctypes.data + n_attrs * self._attrs.itemsize
            instruction["barrier"], phase = call.phase != phase, call.phase
            for ref in call.operands:
                record, address = self._views[n_views], self._address(ref)
                write_operand(record, ref, call.nodes, address, self._backend.weights)
                n_views += 1
            n_attrs += len(call.attrs)

    def _run_all(self, live: Live) -> None:
        self._backend.run(self._program, live)

    def _run_node(self, node: Node, calls: range, live: Live) -> None:
        self._backend.run(self._program[calls.start : calls.stop], live)

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`; the seconds of each instruction, with a barrier after each."""
        seconds = np.zeros(len(self._program))
        self._backend.run(self._program, live, seconds)
        return list(map(float, seconds))

    def _output(self, tensor: Tensor, live: Live) -> Array:
        if tensor in self.outside:
            return self._backend.read(tensor)
        shape, dtype = live.shape(tensor.shape), numpy_dtype(tensor.dtype)
        start = self._addresses[tensor] - self._arena.ctypes.data
        stop = start + math.prod(shape) * dtype.itemsize
        return self._arena[start:stop].view(dtype).reshape(shape)


class CpuBackend(NativeBackend):
    """Runs on `n_threads` threads (None: all cores) with the kernels of `isa` (None: the best).
    `matrix`: whether row tiles are multiplied as bfloat16 tiles (None: where there are matrix
    units; elsewhere it is slow, and for tests). `activations`: bits of the integers that rows
    outside row tiles become where weights are quantized, 8 or 15 (None: 8)."""

    name = "cpu"
    traits = Traits(activations=(8, 15))
    kernels = frozenset((*SIGNATURES, "MUL_MAT", "MUL_MAT_ID"))
    states: ArrayStates
    weights: CpuWeights

    def __init__(
        self, n_threads: int | None = None, isa: str | None = None, matrix: bool | None = None,
        activations: int | None = None,
    ) -> None:  # fmt: skip
        self.library = cpu_library.load(isa)
        self.matrix = self.library.isa == "amx" if matrix is None else matrix
        self.has_fine = activations == 15
        self.n_threads = n_threads or n_cores()
        threads = "1 thread" if self.n_threads == 1 else f"{self.n_threads} threads"
        self.detail = f"{self.library.isa} kernels, {threads}"
        self.team: int | None = self.library.team_create(self.n_threads)
        if self.team is None:
            raise thread_refused(threads, os.strerror(ctypes.get_errno()))
        self.states = ArrayStates()
        self.weights = CpuWeights(self.library, self.n_threads)
        self._fixed: dict[Tensor, Array] = {}
        self._live: Live | None = None

    def __del__(self) -> None:
        if team := getattr(self, "team", None):
            self.library.team_free(team)

    def refusal(self, node: Node) -> str:
        """Sizes of heads that are too large; chunks of the delta rule without matrix units."""
        if node.op.name == "GATED_DELTA_NET":
            d_v, d_k = node.inputs["state"].shape[2:]
            largest, multiple = map(self.library.constant, ("max_head", "tile_depth"))
            is_chunk = node.attrs["algorithm"] == "chunk"
            if max(d_v, d_k) > largest:
                return f"head size {max(d_v, d_k)} above {largest}"
            if is_chunk and not self.matrix:
                return "no matrix units"
            if is_chunk and (d_k % multiple or d_v % multiple):
                return f"no chunked kernel for heads of {d_k} and {d_v}, no multiples of {multiple}"
        if node.op.name == "ATTENTION" and node.inputs["q"].shape[2] > _MAX_LATENT:
            return f"head size {node.inputs['q'].shape[2]} above {_MAX_LATENT}"
        return ""

    def compile(self, split: Split) -> CpuProgram:
        return CpuProgram(self, split)

    def write(self, tensor: Tensor, values: Array) -> None:
        target = self._array(tensor)
        target.reshape(-1)[: values.size] = np.ravel(values)

    def read(self, tensor: Tensor) -> Array:
        assert self._live is not None
        shape = self._live.shape(tensor.shape)
        return self._fixed[tensor].reshape(-1)[: math.prod(shape)].reshape(shape).copy()

    def after_fork(self) -> None:
        self.team = None  # To free it would be to wait for threads that are not there.

    def release(self) -> None:
        self.weights, self.states = CpuWeights(self.library, self.n_threads), ArrayStates()
        self._fixed.clear()

    def _array(self, tensor: Tensor) -> Array:
        if tensor.kind is Kind.STATE:
            return self.states.arrays[tensor]
        if tensor not in self._fixed:
            self._fixed[tensor] = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
        return self._fixed[tensor]

    def fixed(self, tensor: Tensor) -> int:
        return self._array(tensor).ctypes.data

    def run(self, instructions: Array, live: Live, seconds: Array | None = None) -> None:
        """Pack the live counts and row tiles, then run some instructions of a program."""
        self._live = live
        n_positions = self.library.constant("max_tile_rows")
        # Where rows are alike, no row tile makes a difference.
        is_uniform = not (self.matrix or self.has_fine)
        tiles = [] if is_uniform else _row_tiles(live.chunks, n_positions)
        self._run(instructions, self._counts(live, tiles), seconds)

    def _counts(self, live: Live, tiles: Sequence[tuple[int, int]] = ()) -> Array:
        """The counts of a step's rows that StepRows (executor.cpp) reads, int64."""
        dims = [live.dim(name) or 0 for name in views.DIMS]
        kinds = (self.matrix, self.has_fine, len(tiles))
        return np.array([*dims, *kinds, *itertools.chain(*tiles)], np.int64)

    def _run(self, instructions: Array, counts: Array, seconds: Array | None = None) -> None:
        times = None if seconds is None else seconds.ctypes.data
        program, n, live = instructions.ctypes.data, len(instructions), counts.ctypes.data
        at = -1
        while at < n:
            # Between two pieces the interpreter handles signals.
            at = self.library.run(self.team, program, n, live, times, at, PIECE_SECONDS)
            if at < 0:
                raise NotEnoughMemoryError("out of memory: a step could not begin")

    def measure_limits(self) -> Limits:
        return limits.measure(self.library.isa, self.read_probe, self.peak_probe)

    def read_probe(self, rows: Array) -> None:
        """Read float32 rows [n, a multiple of 64] once, with all threads; for timing."""
        words, probed = np.empty(len(rows), np.int32), np.zeros(2, VIEW)
        write_view(probed[0], words.ctypes.data, words.shape, (1,), views.I32_CODE)
        write_view(probed[1], rows.ctypes.data, rows.shape, (rows.shape[1], 1), views.F32_CODE)
        self._probe("READ_PROBE", probed)

    def peak_probe(self, unit: int, turns: int) -> tuple[float, float]:
        """Have all threads multiply and add with a unit of limits.UNITS, so many turns for each of
        a few tasks; returns the number of operations, 0 if there is no such unit, and seconds."""
        done, probed = np.empty((self.n_threads * _PROBE_TASKS, 2), np.float32), np.zeros(1, VIEW)
        write_view(probed[0], done.ctypes.data, done.shape, (2, 1), views.F32_CODE)
        seconds = self._probe("PEAK_PROBE", probed, unit, turns)
        return float(done[:, 1].sum(dtype=np.float64)), seconds

    def _probe(self, kernel: str, probed: Array, *attrs: float) -> float:
        """Run one kernel that no op has; returns its seconds."""
        program, seconds = np.zeros(1, INSTRUCTION), np.zeros(1)
        numbers = np.array(attrs, np.float64)
        address = self.library.kernel_address(kernel)
        program[0] = (address, probed.ctypes.data, numbers.ctypes.data, 0)
        self._run(program, self._counts(Live(0, 0, 0)), seconds)
        return float(seconds[0])


def _row_tiles(chunks: Iterable[tuple[int, int]], n_positions: int) -> list[tuple[int, int]]:
    """The rows that matrix units compute together, and that become int8: (first row, rows) of each
    run of at least _MIN_TILE_ROWS rows of a sequence whose positions lie between two multiples of
    `n_positions`; chunks: see Live.

    Kernels of row tiles sum in another order than those of single rows. As chunks of prompts end
    at multiples of 64, the rows of a row tile depend on their sequence alone, not on how it is cut
    into steps nor on what else is in the batch.
    """
    tiles, first = [], 0
    for n_past, length in chunks:
        begin, stop = n_past, n_past + length
        while begin < stop:
            end = min(begin - begin % n_positions + n_positions, stop)
            if end - begin >= _MIN_TILE_ROWS:
                tiles.append((first + begin - n_past, end - begin))
            begin = end
        first += length
    return tiles
