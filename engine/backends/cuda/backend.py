"""The CUDA backend: every op of the models on one GPU.

A split becomes launches on one stream; a decode step is one captured graph. Inputs and live counts
lie in one region of device memory, and one copy fills it for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.backends.base import Array, Backend, Limits, Split, Support, Traits, WeightSource
from engine.backends.cuda import limits
from engine.backends.cuda.device import Device, Memory
from engine.backends.cuda.inputs import InputRegion
from engine.backends.cuda.lower import unsupported
from engine.backends.cuda.program import CudaProgram
from engine.backends.cuda.sampling import MAX_VOCAB, CudaSampler, specs_input
from engine.backends.cuda.states import DeviceStates
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native import library as cpu_library
from engine.backends.native.signatures import used_packed
from engine.formats.quants import numpy_dtype
from engine.graph import Kind, Live, Node, Tensor, dim_name

# Left for cuBLAS's workspace and the buffers of captured graphs.
_RESERVED_BYTES = 128 << 20


class CudaBackend(Backend):
    """Runs on a device; batch_invariant: a row's results don't depend on its batch, bit for bit."""

    name = "cuda"
    traits = Traits(n_ubatch=4096, own_memory=True, overlaps_steps=True)
    states: DeviceStates

    def __init__(self, device: Device, batch_invariant: bool = False) -> None:
        self.device, self.batch_invariant = device, batch_invariant
        self.detail = device.detail
        self.states = DeviceStates(device)
        self.weights = CudaWeights(device, cpu_library.load())
        self.inputs, self.sample_specs = InputRegion(device), specs_input(0)
        self._fixed: dict[Tensor, Memory] = {}
        self._live: Live | None = None

    def supports(self, node: Node) -> Support:
        reason = unsupported(node, self.device)
        return Support(not reason, reason)

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        packed, plain = used_packed(nodes)
        decoded = sum(map(self.weights.plain_bytes, plain))
        return sum(map(self.weights.packed_bytes, packed)) + decoded

    def free_bytes(self) -> int | None:
        """The device's free memory, less what libraries take at their first use."""
        return max(0, self.device.free_bytes() - _RESERVED_BYTES)

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        self.device.prepare()
        self.weights.load(nodes, source, copies=not self.batch_invariant)

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        self.states.allocate(states)

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:
        n_seqs = (int(t.shape[0]) for t in inputs if dim_name(t) == "n_seqs")
        self.sample_specs = specs_input(max(n_seqs, default=0))
        self.inputs = InputRegion(self.device, [*inputs, self.sample_specs])

    def compile(self, split: Split) -> CudaProgram:
        return CudaProgram(self, split)

    def device_sampler(
        self, program: CudaProgram, inputs: Sequence[Tensor], logits: Tensor
    ) -> CudaSampler | None:
        """A sampler, unless the vocabulary has more than MAX_VOCAB tokens."""
        return CudaSampler(self, program, inputs, logits) if logits.shape[1] <= MAX_VOCAB else None

    @property
    def live_address(self) -> int:
        return self.inputs.live_address

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of a tensor; those of an input are uploaded when a program runs."""
        values = np.ascontiguousarray(values, numpy_dtype(tensor.dtype))
        if tensor.kind is Kind.INPUT:
            self.inputs.write(tensor, values)
        else:
            self.device.upload(self.fixed(tensor), values)

    def read(self, tensor: Tensor) -> Array:
        assert self._live is not None
        values = np.empty(self._live.shape(tensor.shape), numpy_dtype(tensor.dtype))
        self.device.download(self.fixed(tensor), values)
        return values

    def measure_limits(self) -> Limits:
        return limits.measure(self.device)

    def release(self) -> None:
        self.device.synchronize()
        self.weights = CudaWeights(self.device, cpu_library.load())
        self.states, self.inputs = DeviceStates(self.device), InputRegion(self.device)
        self._fixed.clear()

    def fixed(self, tensor: Tensor) -> int:
        """The address of an input, a state or an activation; activations are allocated at their
        first use."""
        if tensor.kind is Kind.INPUT:
            return self.inputs.address(tensor)
        if tensor.kind is Kind.STATE:
            return self.states.address(tensor)
        if tensor not in self._fixed:
            self._fixed[tensor] = self.device.allocate(tensor.nbytes)
        return self._fixed[tensor].address

    def begin(self, live: Live) -> None:
        self._live = live
        self.inputs.flush(live)
