"""A split on the GPU: launches with their arguments, run one by one or as a captured graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.backends.base import Array, Split
from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import CudaError, Gemm, Grid
from engine.backends.cuda.fusion import FUSIONS
from engine.backends.cuda.kernels import KERNELS
from engine.backends.cuda.launches import CudaCall, Launch, Lowering, Product, Replays
from engine.backends.cuda.lower import lower_node
from engine.backends.cuda.memory import MemoryBackend
from engine.backends.native.buffers import Arena, Zeros
from engine.backends.native.program import NativeProgram, write_operand
from engine.formats.quants import numpy_dtype
from engine.graph import Live, Node, Tensor

# What the host takes at most to launch a kernel and record an event.
_LAUNCH_SECONDS = 50e-6
# Batches of so many different sizes whose launches are kept.
_MAX_KEPT = 64


class CudaProgram(NativeProgram[MemoryBackend]):
    """See NativeProgram. `own_bytes`: of its buffers, without what lies outside; if only_sized, it
    takes no memory and can't run."""

    def __init__(
        self, backend: MemoryBackend, split: Split, fused: bool = True, only_sized: bool = False
    ) -> None:
        super().__init__(backend, split, fused)
        self._device = backend.device
        self._kept: dict[tuple[int, int, int], Mapping[int, Grid | Gemm]] = {}
        lowering = Lowering(backend.device, backend.weights, backend.batch_invariant)
        self._lower(lowering, FUSIONS, lower_node)
        self._calls = lowering.calls
        refs = (ref for call in self._calls for ref in call.operands)
        zeros = list(dict.fromkeys(ref for ref in refs if isinstance(ref, Zeros)))
        arena = self._arena_of(self._calls, range(len(self._calls)), zeros)
        self.own_bytes = arena.size + sum(ref.nbytes for ref in zeros)
        if not only_sized:
            self._take(arena, zeros)

    def _take(self, arena: Arena, zeros: Sequence[Zeros]) -> None:
        """Allocate the buffers, and prepare the launches."""
        self._place(arena)
        self._zeros = {ref: self._device.allocate(ref.nbytes) for ref in zeros}
        for ref, memory in self._zeros.items():
            self._device.fill(memory.address, ref.nbytes, 0)
            self._addresses[ref] = memory.address
        self._args = np.zeros(len(self._calls), ARGS)
        self._functions = list(map(self._prepare, self._args, self._calls))
        self.replays = Replays(self._device, self.launch)

    def _allocate(self, n_bytes: int) -> int:
        self._arena = self._device.allocate(n_bytes)
        return self._arena.address

    def _prepare(self, args: Any, call: CudaCall) -> int:
        if isinstance(call, Product):
            return 0
        return prepare(self._backend, call, args, map(self._address, call.operands))

    def _run_all(self, live: Live) -> None:
        self.replays.run(live)

    def _begin(self, live: Live) -> None:
        self._backend.begin(live)

    def _run_node(self, node: Node, calls: range, live: Live) -> None:
        self._launch(calls, live)
        try:
            self._device.synchronize()
        except CudaError as error:
            raise CudaError(f"{node}: {error}") from None

    def launch(self, live: Live) -> None:
        """Launch every call that a batch of such counts needs."""
        self._launch(self._chosen(live), live)

    def _launch(self, calls: Iterable[int], live: Live) -> None:
        device, base, chosen = self._device, self._args.ctypes.data, self._chosen(live)
        for i in calls:
            call, what = self._calls[i], chosen.get(i)
            if isinstance(what, Gemm):
                device.gemm(what)
            elif what is not None:
                assert isinstance(call, Launch)
                try:
                    address = base + i * ARGS.itemsize
                    device.launch(self._functions[i], what, *call.thread_block, address)
                except CudaError as error:
                    raise CudaError(f"{call.nodes[0]} (kernel {call.kernel}): {error}") from None

    def _chosen(self, live: Live) -> Mapping[int, Grid | Gemm]:
        """The calls that such counts need, with their grids; kept, as batches are alike."""
        counts = live.n_tokens, live.n_seqs, live.n_outputs
        if counts not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                self._kept.clear()
            calls = ((i, call) for i, call in enumerate(self._calls) if call.when(live))
            whole = ((i, self._sized(call, live)) for i, call in calls)
            self._kept[counts] = {i: what for i, what in whole if what is not None}
        return self._kept[counts]

    def _sized(self, call: CudaCall, live: Live) -> Grid | Gemm | None:
        """The grid or sizes of a call for such counts; None if there is nothing to do."""
        if isinstance(call, Launch):
            grid = call.grid(live)
            return None if 0 in grid else grid
        out, a, b = call.operands
        assert out is not None
        assert b is not None
        m, (n, k) = live.shape(out.shape)[0], b.shape[-2:]
        copies = self._backend.weights.bf16
        b_at = copies[b.base].address if isinstance(b, Tensor) else self._address(b)
        return Gemm(self._address(out), self._address(a), b_at, m, n, k) if m else None

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`, without a captured graph; the seconds of each instruction."""
        self._backend.begin(live)
        chosen = list(self._chosen(live))
        timer = self._device.timer(len(chosen) * _LAUNCH_SECONDS)
        for i in chosen:
            self._launch([i], live)
            timer.mark()
        taken = dict(zip(chosen, timer.seconds(), strict=True))
        return [taken.get(i, 0.0) for i in range(len(self._calls))]

    def _output(self, tensor: Tensor, live: Live) -> Array:
        values = np.empty(live.shape(tensor.shape), numpy_dtype(tensor.dtype))
        self._device.download(self._address(tensor), values)
        return values


def prepare(backend: MemoryBackend, call: Launch, args: Any, addresses: Iterable[int]) -> int:
    """Fill in the record `args` of ARGS for a launch; returns its function. addresses: of the
    operands' bases, but of packed weights."""
    for view, ref, address in zip(args["v"], call.operands, addresses, strict=False):
        write_operand(view, ref, call.nodes, address, backend.weights)
    args["attr"][: len(call.attrs)] = call.attrs
    args["live"] = backend.inputs.live_address
    _, shared = call.thread_block
    return backend.device.function(KERNELS[call.kernel].source, call.kernel, shared)
