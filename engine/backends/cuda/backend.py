"""The CUDA backend: every op of the models on one GPU.

A split becomes launches on one stream; a decode step is one captured graph. Inputs and live counts
lie in one region of device memory, which one copy fills for each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda.args import ARGS
from engine.backends.cuda.cupy_device import CudaError, Device, Gemm, Grid, Memory
from engine.backends.cuda.fusion import FUSIONS
from engine.backends.cuda.launches import Kernel, Lowering, Product, Replays, Step, fill_view
from engine.backends.cuda.lower.ops import add_node, unsupported
from engine.backends.cuda.sampling import MAX_VOCAB, CudaDecoder, draws_input
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native import library as cpu_library
from engine.backends.native.buffers import Arena
from engine.backends.native.fusion import Uses, grouped
from engine.backends.native.signatures import DIMS, Ref, Zeros, owner_of, used_packed
from engine.formats.quants import numpy_dtype
from engine.graph import Kind, Live, Node, Tensor, dim_name
from engine.placement.place import Instruction, Split, Support, Watch, WeightSource

Array = NDArray[Any]
_LIVE_BYTES = 256
# What the host takes at most to launch a kernel and record an event.
_LAUNCH_SECONDS = 50e-6
# For cuBLAS's workspace and buffers of captured graphs.
_RESERVED_BYTES = 128 << 20
# Batches of so many different sizes whose launches are kept.
_MAX_KEPT = 64


class CudaBackend:
    """Runs on a device; `batch_invariant`: a row's bits don't depend on the rest of its batch."""

    name = "cuda"

    def __init__(self, device: Device, batch_invariant: bool = False) -> None:
        self.device, self.batch_invariant = device, batch_invariant
        self.detail = device.detail
        self.states = DeviceStates(device)
        self.weights = CudaWeights(device, cpu_library.load())
        self.inputs, self.draws = InputRegion(device), draws_input(0)
        self._source: WeightSource | None = None
        self._fixed: dict[Tensor, Memory] = {}
        self._live: Live | None = None

    def supports(self, node: Node) -> Support:
        """All ops of the models; the reason says what about an operand no kernel takes."""
        reason = unsupported(node, self.device)
        return Support(not reason, reason)

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Packed weights, and those decoded to float32."""
        packed, plain = used_packed(nodes)
        decoded = sum(map(self.weights.plain_bytes, plain))
        return sum(map(self.weights.packed_bytes, packed)) + decoded

    def free_bytes(self) -> int | None:
        """What the device has left, but for what libraries take when they are first used."""
        return max(0, self.device.free_bytes() - _RESERVED_BYTES)

    def load_weights(self, weights: Sequence[Tensor], source: WeightSource) -> None:
        """Weights are packed when it is known what reads them: by `compile`."""
        self._source = source
        self.device.prepare()

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        """States on the device, zeros."""
        self.states.allocate(states)

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:
        """One region for all of them, and for the draws of decode steps."""
        n_seqs = (int(t.shape[0]) for t in inputs if dim_name(t) == "n_seqs")
        self.draws = draws_input(max(n_seqs, default=0))
        self.inputs = InputRegion(self.device, [*inputs, self.draws])

    def compile(self, split: Split) -> CudaProgram:
        """Load the split's weights and lay out its program."""
        packed, plain = used_packed(split.nodes)
        assert self._source is not None or not (packed or plain)
        if self._source is not None:
            self.weights.load(packed, plain, self._source)
        return CudaProgram(self, split)

    def decoder(
        self, program: CudaProgram, inputs: Sequence[Tensor], logits: Tensor
    ) -> CudaDecoder | None:
        """What draws tokens on the device, but for vocabularies larger than there are."""
        return CudaDecoder(self, program, inputs, logits) if logits.shape[1] <= MAX_VOCAB else None

    @property
    def live_address(self) -> int:
        """Where the live counts lie."""
        return self.inputs.live_address

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of a tensor; of an input when the next program runs."""
        values = np.ascontiguousarray(values, numpy_dtype(tensor.dtype))
        if tensor.kind is Kind.INPUT:
            self.inputs.write(tensor, values)
        else:
            self.device.upload(self.fixed(tensor), values)

    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that is kept."""
        assert self._live is not None
        values = np.empty(self._live.shape(tensor.shape), numpy_dtype(tensor.dtype))
        self.device.download(self.fixed(tensor), values)
        return values

    def release(self) -> None:
        """Forget weights, states and activations, once nothing runs that uses them."""
        self.device.synchronize()
        self.weights = CudaWeights(self.device, cpu_library.load())
        self.states, self.inputs = DeviceStates(self.device), InputRegion(self.device)
        self._fixed.clear()

    def fixed(self, tensor: Tensor) -> int:
        """The address of a tensor that outlives programs; made at its first use."""
        if tensor.kind is Kind.INPUT:
            return self.inputs.address(tensor)
        if tensor not in self._fixed:
            self._fixed[tensor] = self.device.allocate(tensor.nbytes)
        return self._fixed[tensor].address

    def begin(self, live: Live) -> None:
        """Bring inputs and live counts to the device."""
        self._live = live
        self.inputs.flush(live)


class CudaProgram:
    """A compiled split."""

    def __init__(self, backend: CudaBackend, split: Split, fused: bool = True) -> None:
        self._backend, self._device, self._split = backend, backend.device, split
        self._is_fused = fused
        self._kept: dict[tuple[int, int, int], Mapping[int, Grid | Gemm]] = {}
        self._unfused: CudaProgram | None = None
        lowering = Lowering(backend.device, backend.weights, backend.batch_invariant)
        self._spans: dict[Node, range] = {}
        uses = Uses.of(split.nodes, split.keeps)
        fusions = FUSIONS if fused and not backend.batch_invariant else ()
        for fusion, group in grouped(split.nodes, uses, fusions):
            first = len(lowering.steps)
            if fusion is None:
                add_node(lowering, group[0])
            else:
                fusion.lower(lowering, group)
            self._spans[group[0]] = range(first, len(lowering.steps))
        self._steps = lowering.steps
        made = {t for node in split.nodes for t in node.outputs}
        used = {t.base for node in split.nodes for t in node.inputs.values()}
        given = {t for t in used if t.kind is Kind.ACTIVATION and t not in made}
        self._fixed = given | set(split.keeps)
        self._zeros = self._allocate_zeros()
        arena: Arena[Any] = Arena()
        lowering.place(arena, self._fixed | self._zeros.keys())
        self._offsets = arena.offsets
        self._arena = self._device.allocate(arena.size)
        self._functions: list[int] = []
        self._args = np.zeros(len(self._steps), ARGS)
        for args, step in zip(self._args, self._steps, strict=True):
            self._prepare(args, step)
        self.replays = Replays(self._device, self.launch)
        self.instructions = [Instruction(step.name, tuple(step.nodes)) for step in self._steps]

    def _allocate_zeros(self) -> dict[Any, Memory]:
        zeros: dict[Any, Memory] = {}
        for ref in {ref for step in self._steps for ref in step.operands if isinstance(ref, Zeros)}:
            zeros[ref] = self._device.allocate(ref.nbytes)
            self._device.fill(zeros[ref].address, ref.nbytes, 0)
        return zeros

    def _prepare(self, args: Any, step: Step) -> None:
        """The function and the parameter of a launch."""
        if isinstance(step, Product):
            self._functions.append(0)
            return
        self._functions.append(self._device.function(step.source, step.name, step.shared))
        for i, ref in enumerate(step.operands):
            fill_view(args["v"][i], ref, step, self._address(ref), self._backend.weights)
        args["attr"][: len(step.attrs)] = step.attrs
        args["live"] = self._backend.inputs.live_address

    def _address(self, ref: Ref) -> int:
        """Where an operand's base lies; 0 for packed weights, whose view knows better."""
        owner = owner_of(ref)
        if owner is None:
            return 0
        if owner in self._offsets:
            return self._arena.address + int(self._offsets[owner])
        if owner in self._zeros:
            return self._zeros[owner].address
        if owner.kind is Kind.WEIGHT:
            return self._backend.weights.plain_or_zero(owner)
        if owner.kind is Kind.STATE:
            return self._backend.states.address(owner)
        return self._backend.fixed(owner)

    def run(self, live: Live, watch: Watch | None = None) -> None:
        """Run the nodes on the live rows of their operands."""
        if watch is not None and self._is_fused:
            self._unfused = self._unfused or CudaProgram(self._backend, self._split, fused=False)
            self._unfused.run(live, watch)
            return
        self._backend.begin(live)
        if watch is not None:
            for node, steps in self._spans.items():
                self._launch(steps, live)
                try:
                    self._device.synchronize()
                except CudaError as error:
                    raise CudaError(f"{node}: {error}") from None
                watch(node, [self._output(t, live) for t in node.outputs])
        else:
            self.replays.run(live)

    def n_launches(self, live: Live) -> int:
        """Of a step with such counts."""
        return len(self._chosen(live))

    def launch(self, live: Live) -> None:
        """Launch all of it."""
        self._launch(self._chosen(live), live)

    def _launch(self, steps: Iterable[int], live: Live) -> None:
        device, base, chosen = self._device, self._args.ctypes.data, self._chosen(live)
        for i in steps:
            what = chosen.get(i)
            if what is None:
                continue
            if isinstance(what, Gemm):
                device.gemm(what)
                continue
            step, address = self._steps[i], base + i * ARGS.itemsize
            assert isinstance(step, Kernel)
            try:
                device.launch(self._functions[i], what, step.threads, step.shared, address)
            except CudaError as error:
                raise CudaError(f"{_who(step)}: {error}") from None

    def _chosen(self, live: Live) -> Mapping[int, Grid | Gemm]:
        """The steps that are launched for such counts, and how; kept, as many batches are alike."""
        counts = live.n_tokens, live.n_seqs, live.n_outputs
        if counts not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                self._kept.clear()
            steps = ((i, step) for i, step in enumerate(self._steps) if step.when(live))
            whole = ((i, self._sized(step, live)) for i, step in steps)
            self._kept[counts] = {i: what for i, what in whole if what is not None}
        return self._kept[counts]

    def _sized(self, step: Step, live: Live) -> Grid | Gemm | None:
        """A step for such counts; None if there is nothing to do."""
        if isinstance(step, Kernel):
            grid = step.grid(live)
            return None if 0 in grid else grid
        assert step.out is not None
        assert step.a is not None
        m = live.shape(step.out.shape)[0]
        n, k = step.b.shape[-2:]
        if isinstance(step.b, Tensor):
            b = self._backend.weights.bf16(step.b)
        else:
            b = self._address(step.b)
        return Gemm(self._address(step.out), self._address(step.a), b, m, n, k) if m else None

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`, without a captured graph; the seconds of each instruction."""
        self._backend.begin(live)
        chosen = list(self._chosen(live))
        timer = self._device.timer(len(chosen) * _LAUNCH_SECONDS)
        for i in chosen:
            self._launch([i], live)
            timer.mark()
        seconds = [0.0] * len(self._steps)
        for i, s in zip(chosen, timer.seconds(), strict=True):
            seconds[i] = s
        return seconds

    def _output(self, tensor: Tensor, live: Live) -> Array:
        """A node's output right after the node ran."""
        values = np.empty(live.shape(tensor.shape), numpy_dtype(tensor.dtype))
        self._device.download(self._address(tensor), values)
        return values


def _who(step: Step) -> str:
    return f"{step.nodes[0]} (kernel {step.name})"


class InputRegion:
    """Live counts and INPUT tensors side by side on the device, and their image on the host."""

    def __init__(self, device: Device, inputs: Sequence[Tensor] = ()) -> None:
        self._device, offset = device, _LIVE_BYTES
        self._offsets: dict[Tensor, int] = {}
        # The largest last: fewer bytes travel.
        for t in sorted(inputs, key=lambda t: t.nbytes):
            self._offsets[t] = offset
            offset += -(-t.nbytes // 64) * 64
        self._image = np.zeros(offset, np.uint8)
        self._memory = device.allocate(offset)
        self._end = 0

    @property
    def live_address(self) -> int:
        """Where the live counts lie."""
        return self._memory.address

    def address(self, tensor: Tensor) -> int:
        """Where an input lies."""
        return self._memory.address + self._offsets[tensor]

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set an input's live part."""
        begin = self._offsets[tensor]
        end = begin + values.nbytes
        self._image[begin:end] = np.ravel(values).view(np.uint8)
        self._end = max(self._end, end)

    def flush(self, live: Live) -> None:
        """Bring what was written, and the live counts, to the device."""
        counts = np.array([live.dim(name) or 0 for name in DIMS], np.int32)
        self._image[: counts.nbytes] = counts.view(np.uint8)
        end = max(self._end, counts.nbytes)
        self._device.upload(self.live_address, self._image[:end])
        self._end = 0


class DeviceStates:
    """State tensors in device memory; see StateStore."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: dict[Tensor, Memory] = {}

    def allocate(self, states: Sequence[Tensor]) -> None:
        """Zeros."""
        for t in states:
            self._memory[t] = self._device.allocate(t.nbytes)
            self._device.fill(self._memory[t].address, t.nbytes, 0)

    def address(self, tensor: Tensor) -> int:
        """Where a state lies."""
        return self._memory[tensor].address

    def _of(self, dim: str) -> list[tuple[Tensor, int, int]]:
        """(state, its address, bytes of one slot or block)."""
        states = self._memory.items()
        return [
            (t, m.address, t.nbytes // int(t.shape[0])) for t, m in states if dim_name(t) == dim
        ]

    def zero(self, dim: str, index: int) -> None:
        """Assign zeros to a slot or block of every layer."""
        for _, address, n in self._of(dim):
            self._device.fill(address + index * n, n, 0)

    def copy(self, dim: str, source: int, target: int) -> None:
        """Copy a slot or block of every layer."""
        for _, address, n in self._of(dim):
            self._device.copy(address + target * n, address + source * n, n)

    def save(self, dim: str, index: int) -> dict[str, Array]:
        """Copies of a slot's or block's contents on the host, by state tensor name."""
        saved = {}
        for t, address, n in self._of(dim):
            saved[t.name] = np.empty(t.shape[1:], numpy_dtype(t.dtype))
            self._device.download(address + index * n, saved[t.name])
        return saved

    def load(self, dim: str, index: int, contents: Mapping[str, Array]) -> None:
        """The reverse of `save`."""
        for t, address, n in self._of(dim):
            values = np.ascontiguousarray(contents[t.name], numpy_dtype(t.dtype))
            assert values.nbytes == n == math.prod(t.shape[1:]) * values.itemsize, t
            self._device.upload(address + index * n, values)
