"""The reference backend under another name, which refuses nodes and records what it holds.

States start as NaN, so that a step that reads an unwritten state gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.backends.base import Support, WeightSource
from engine.backends.reference import ReferenceBackend
from engine.graph import Kind, Live, Node, Tensor

Refusal = Callable[[Node], str]


class Picky(ReferenceBackend):
    """`refuses(node)` gives the reason not to run a node, or an empty string.

    loaded: names of the weights it was given. most_held: the most activations held at one time.
    """

    def __init__(self, name: str, refuses: Refusal = lambda node: "", **options: Any) -> None:
        super().__init__(**options)
        self.name, self._refuses = name, refuses
        self.loaded: list[str] = []
        self.most_held = 0

    def supports(self, node: Node) -> Support:
        reason = self._refuses(node)
        return Support(not reason, reason)

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        super().load_weights(nodes, source)
        operands = (t for node in nodes for t in node.inputs.values())
        self.loaded += {t.name: None for t in operands if t.kind is Kind.WEIGHT}

    def allocate_states(self, states: Sequence[Tensor], extra: Mapping[str, int]) -> None:
        super().allocate_states(states, extra)
        for array in self.states.arrays.values():
            array[:1024] = np.nan  # Not all that a cache may once take.

    def store(self, tensor: Tensor, values: np.ndarray, live: Live) -> None:
        super().store(tensor, values, live)
        self.most_held = max(self.most_held, len(self.held()))

    def held(self) -> list[Tensor]:
        """The activations with a value."""
        return [t for t in self._values if t.kind is Kind.ACTIVATION]


def refuse_ops(reason: str, *ops: str) -> Refusal:
    """Refuse nodes of these ops."""
    return lambda node: reason if node.op.name in ops else ""


def refuse_names(reason: str, *names: str) -> Refusal:
    """Refuse nodes of these names."""
    return lambda node: reason if node.name in names else ""
