"""What the programs of native backends share: running whole or node by node, and what stays put."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from engine.backends.base import Array, Instruction, Split, Watch
from engine.graph import Kind, Live, Node, Tensor


class NativeProgram(ABC):
    """A compiled split.

    A watched program runs node by node, without fusions: the first watched run compiles a second
    program for that. `outside`: tensors that outlive a run and have memory of their own.
    """

    instructions: Sequence[Instruction]

    def __init__(self, split: Split, is_fused: bool) -> None:
        self._split, self._is_fused = split, is_fused
        self._unfused: NativeProgram | None = None
        # The steps of each node, or of the first node of a fusion.
        self._spans: dict[Node, range] = {}
        made = {t for node in split.nodes for t in node.outputs}
        used = {t.base for node in split.nodes for t in node.inputs.values()}
        copied = {t for t in used if t.kind is Kind.ACTIVATION and t not in made}
        self.outside: set[Tensor] = copied | set(split.keeps)
        self.outside |= {t for t in used if t.kind is Kind.INPUT}

    @abstractmethod
    def _compile_unfused(self) -> NativeProgram:
        """The same split without fusions."""

    @abstractmethod
    def _run_all(self, live: Live) -> None:
        """Run every step."""

    def _begin(self, live: Live) -> None:  # noqa: B027
        """Bring inputs to where kernels read them, before nodes run one by one."""

    @abstractmethod
    def _run_node(self, node: Node, steps: range, live: Live) -> None:
        """Run one node's steps and wait for them."""

    @abstractmethod
    def _output(self, tensor: Tensor, live: Live) -> Array:
        """The live rows of a node's output right after the node ran."""

    def run(self, live: Live, watch: Watch | None = None) -> None:
        """Run the nodes on the live rows of their operands."""
        if watch is None:
            self._run_all(live)
        elif self._is_fused:
            self._unfused = self._unfused or self._compile_unfused()
            self._unfused.run(live, watch)
        else:
            self._begin(live)
            for node, steps in self._spans.items():
                self._run_node(node, steps, live)
                watch(node, [self._output(t, live) for t in node.outputs])
