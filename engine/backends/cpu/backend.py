"""The CPU backend: kernels of the best instruction set that the machine has, on a team of threads.

A split becomes one flat array of instructions, which one native call runs: no Python between nodes.
Results do not depend on the number of threads, nor a sequence's on what else is in the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from engine.backends.base import Array, Split, Support, WeightSource
from engine.backends.cpu.program import CpuProgram
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
    view,
)
from engine.formats.quants import numpy_dtype
from engine.graph import Live, Node, Tensor

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

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
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
