"""The CUDA backend: every op of the models on one GPU.

A split becomes launches on one stream; a decode step is one captured graph. Inputs and live counts
lie in one region of device memory, and one copy fills it for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.backends.base import Limits, Split, Traits, WeightSource
from engine.backends.cuda import limits
from engine.backends.cuda.device import Device
from engine.backends.cuda.lower import LOWERINGS
from engine.backends.cuda.memory import InputRegion, MemoryBackend
from engine.backends.cuda.program import CudaProgram
from engine.backends.cuda.sampling import MAX_VOCAB, CudaSampler, specs_input
from engine.graph import Node, Tensor, dim_name

# Left for cuBLAS's workspace and the buffers of captured graphs.
_RESERVED_BYTES = 128 << 20


class CudaBackend(MemoryBackend):
    """Runs on a device; batch_invariant: a row's results don't depend on its batch, bit for bit."""

    name = "cuda"
    traits = Traits(n_ubatch=4096, own_memory=True, overlaps_steps=True)
    kernels = LOWERINGS

    def __init__(self, device: Device, batch_invariant: bool = False) -> None:
        super().__init__(device, batch_invariant)
        self.detail, self.sample_specs = device.detail, specs_input(0)

    def refusal(self, node: Node) -> str:
        _, refusal = LOWERINGS[node.op.name]
        return refusal(node, self.device)

    def free_bytes(self) -> int | None:
        """The device's free memory, less what libraries take at their first use."""
        return max(0, self.device.free_bytes() - _RESERVED_BYTES)

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        self.device.prepare()
        super().load_weights(nodes, source)
        if not self.batch_invariant:
            self.weights.copy_bf16(nodes)

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
        if logits.shape[1] > MAX_VOCAB:
            return None
        return CudaSampler(self, program.launch, inputs, logits)

    def enter_thread(self) -> None:
        self.device.enter_thread()

    def measure_limits(self) -> Limits:
        return limits.measure(self.device)
