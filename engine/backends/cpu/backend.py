"""The CPU backend: kernels of the best instruction set that the machine has, on a team of threads.

A split becomes one flat array of instructions, which one native call runs: no Python between nodes.
Results do not depend on the number of threads, nor a sequence's on what else is in the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from engine.backends.base import Array, Backend, Limits, Split, Support, Traits, WeightSource
from engine.backends.cpu import limits
from engine.backends.cpu.program import CpuProgram
from engine.backends.cpu.row_tiles import row_tiles
from engine.backends.cpu.weights import CpuWeights
from engine.backends.native import library as cpu_library
from engine.backends.native.signatures import SIGNATURES, used_packed
from engine.backends.native.states import ArrayStates
from engine.backends.native.views import (
    DIMS,
    F32_CODE,
    I32_CODE,
    INSTRUCTION,
    MAX_RANK,
    VIEW,
    write_view,
)
from engine.formats.quants import numpy_dtype
from engine.graph import Live, Node, Tensor

# Head size of ATTENTION, at most.
_MAX_LATENT = 1024
_KERNELS = {*SIGNATURES, "MUL_MAT", "MUL_MAT_ID"}


class CpuBackend(Backend):
    """Runs on `n_threads` threads (None: all cores) with the kernels of `isa` (None: the best).

    `matrix`: whether row tiles are multiplied as bfloat16 tiles (None: where there are matrix
    units; elsewhere it is slow, and for tests).
    """

    name = "cpu"
    traits = Traits()
    states: ArrayStates

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
        self._fixed: dict[Tensor, Array] = {}
        self._live: Live | None = None

    def __del__(self) -> None:
        if team := getattr(self, "team", None):
            self.library.team_free(team)

    def supports(self, node: Node) -> Support:
        """All ops of the models, head sizes up to 256; chunks of the delta rule by matrix units."""
        reason = self._refusal(node)
        return Support(not reason, reason)

    def _refusal(self, node: Node) -> str:
        """Why it can't run a node; an empty string if it can."""
        if node.op.name not in _KERNELS:
            return f"no kernel for {node.op.name}"
        if any(len(t.shape) > MAX_RANK for t in (*node.inputs.values(), *node.outputs)):
            return f"more than {MAX_RANK} dimensions"
        if node.op.name == "GATED_DELTA_NET":
            size, largest = max(node.inputs["state"].shape[2:]), self.library.constant("max_head")
            if size > largest:
                return f"head size {size} above {largest}"
            if node.attrs["algorithm"] == "chunk":
                return self._no_chunks(*node.inputs["state"].shape[2:])
        if node.op.name == "ATTENTION" and node.inputs["q"].shape[2] > _MAX_LATENT:
            return f"head size {node.inputs['q'].shape[2]} above {_MAX_LATENT}"
        return ""

    def _no_chunks(self, d_v: int, d_k: int) -> str:
        multiple = self.library.constant("tile_depth")
        if not self.matrix:
            return "no matrix units"
        if d_k % multiple or d_v % multiple:
            return f"no chunked kernel for heads of {d_k} and {d_v}, no multiples of {multiple}"
        return ""

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Packed weights, and those decoded to float32."""
        packed, plain = used_packed(nodes)
        decoded = sum(math.prod(t.shape) for t in plain) * 4
        return sum(map(self.weights.packed_bytes, packed)) + decoded

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        self.weights.load(*used_packed(nodes), source)

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        self.states.allocate(states)

    def compile(self, split: Split) -> CpuProgram:
        return CpuProgram(self, split)

    def write(self, tensor: Tensor, values: Array) -> None:
        target = self._array(tensor)
        target.reshape(-1)[: values.size] = np.ravel(values)

    def read(self, tensor: Tensor) -> Array:
        assert self._live is not None
        shape = self._live.shape(tensor.shape)
        return self._fixed[tensor].reshape(-1)[: math.prod(shape)].reshape(shape).copy()

    def release(self) -> None:
        self.weights, self.states = CpuWeights(self.library, self.n_threads), ArrayStates()
        self._fixed.clear()

    def _array(self, tensor: Tensor) -> Array:
        if tensor not in self._fixed:
            self._fixed[tensor] = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
        return self._fixed[tensor]

    def fixed(self, tensor: Tensor) -> int:
        """The address of a tensor that outlives programs; allocated at its first use."""
        return self._array(tensor).ctypes.data

    def row_tiles(self, live: Live) -> list[tuple[int, int]]:
        """(first row, rows) of a step's row tiles; none without matrix units."""
        n_positions = self.library.constant("max_tile_rows")
        return row_tiles(live.chunks, n_positions) if self.matrix else []

    def run(self, instructions: Array, live: Live, seconds: Array | None = None) -> None:
        """Run some instructions of a program."""
        self._live = live
        tiles = self.row_tiles(live)
        dims = [live.dim(name) or 0 for name in DIMS]
        counts = np.array([*dims, len(tiles), *itertools.chain(*tiles)], np.int64)
        self._run(instructions, counts, seconds)

    def _run(self, instructions: Array, counts: Array, seconds: Array | None = None) -> None:
        times = None if seconds is None else seconds.ctypes.data
        program, n = instructions.ctypes.data, len(instructions)
        self.library.run(self.team, program, n, counts.ctypes.data, times)

    def measure_limits(self) -> Limits:
        return limits.measure(self.read_probe)

    def read_probe(self, rows: Array) -> None:
        """Read float32 rows [n, a multiple of 64] once, with all threads; for timing."""
        words, views = np.empty(len(rows), np.int32), np.zeros(2, VIEW)
        write_view(views[0], words.ctypes.data, words.shape, (1,), I32_CODE)
        write_view(views[1], rows.ctypes.data, rows.shape, (rows.shape[1], 1), F32_CODE)
        program = np.zeros(1, INSTRUCTION)
        program[0] = (self.library.kernel_address("READ_PROBE"), views.ctypes.data, 0, 0)
        self._run(program, np.zeros(len(DIMS) + 1, np.int64))
