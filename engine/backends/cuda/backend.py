"""The CUDA backend: every op of the models on one GPU.

A split becomes launches on one stream; a decode step is one captured graph. Inputs and live counts
lie in one region of device memory, and one copy fills it for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.backends.base import Copies, Limits, Split, Traits, WeightSource
from engine.backends.cuda import copies, limits
from engine.backends.cuda.device import Device
from engine.backends.cuda.lower import LOWERINGS
from engine.backends.cuda.memory import InputRegion, MemoryBackend
from engine.backends.cuda.program import CudaProgram
from engine.backends.cuda.sampling import MAX_VOCAB, CudaSampler, specs_input
from engine.graph import Node, Tensor, dim_name

# Left for cuBLAS's workspace and the buffers of captured graphs.
_RESERVED_BYTES = 128 << 20


class CudaBackend(MemoryBackend):
    """Runs on a device; batch_invariant: a row's results don't depend on its batch, bit for bit.
    copy_share: the part of the memory that is left which copies of weights may take."""

    name = "cuda"
    traits = Traits(n_ubatch=4096, own_memory=True, overlaps_steps=True)
    kernels = LOWERINGS

    def __init__(
        self, device: Device, batch_invariant: bool = False, copy_share: float = copies.SHARE
    ) -> None:
        super().__init__(device, batch_invariant)
        self._copy_share = 0.0 if batch_invariant else copy_share
        self.detail, self.sample_specs = device.detail, specs_input(0)

    def refusal(self, node: Node) -> str:
        _, refusal = LOWERINGS[node.op.name]
        return refusal(node, self.device)

    def free_bytes(self) -> int:
        """The device's free memory, less what libraries take at their first use."""
        return max(0, self.device.free_bytes() - _RESERVED_BYTES)

    def total_bytes(self) -> int | None:
        return self.device.total_bytes

    def buffer_bytes(self, splits: Sequence[Split]) -> int:
        programs = [CudaProgram(self, split, only_sized=True) for split in splits]
        outside = {t for program in programs for t in program.outside}
        return sum(p.own_bytes for p in programs) + sum(t.nbytes for t in outside)

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        self.device.prepare()
        super().load_weights(nodes, source)

    def copies(self, splits: Sequence[Split], n_left: int | None = None) -> Copies:
        """In bfloat16, of weights that products of many rows read."""
        made = list(self.weights.bf16) if n_left is None else self._chosen(splits, n_left)
        n_possible = len(self._copyable(splits))
        return Copies(sum(map(copies.copy_bytes, made)), len(made), n_possible)

    def copy_weights(self, splits: Sequence[Split], n_buffers: int) -> None:
        for w in self._chosen(splits, self.free_bytes() - n_buffers):
            self.weights.copy_bf16(w)

    def _chosen(self, splits: Sequence[Split], n_left: int) -> list[Tensor]:
        return copies.chosen(self._copyable(splits), int(n_left * self._copy_share))

    def _copyable(self, splits: Sequence[Split]) -> list[Tensor]:
        if not self._copy_share:
            return []
        return copies.copyable([node for s in splits for node in s.nodes], self.weights)

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
