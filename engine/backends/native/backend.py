"""What the CPU and CUDA backends share: packed weights, and what their kernels can take."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Sequence

from engine.backends.base import Backend, Support, WeightSource
from engine.backends.native.panels import PanelWeights
from engine.backends.native.views import MAX_RANK
from engine.graph import Node, Tensor


class NativeBackend(Backend):
    """A backend of kernels; `kernels`: the ops that have one."""

    kernels: Container[str]
    weights: PanelWeights

    def supports(self, node: Node) -> Support:
        tensors = (*node.inputs.values(), *node.outputs)
        if node.op.name not in self.kernels:
            return Support(False, f"no kernel for {node.op.name}")
        if any(len(t.shape) > MAX_RANK for t in tensors):
            return Support(False, f"more than {MAX_RANK} dimensions")
        reason = self.refusal(node)
        return Support(not reason, reason)

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        return self.weights.bytes_of(nodes)

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        self.weights.load(nodes, source)

    @abstractmethod
    def refusal(self, node: Node) -> str:
        """Why the kernel of a node's op can't take the node; an empty string if it can."""

    @abstractmethod
    def fixed(self, tensor: Tensor) -> int:
        """The address of a state, an input, or an activation that outlives programs."""
