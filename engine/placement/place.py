"""Placement of nodes on backends, with the reason for each.

The backend that holds a node's state or weight takes it, else its producer's, else the first in
priority order whose `supports` says yes. Runs of nodes on one backend are splits; tensors that
cross between backends are copied at the start of the split that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from engine.backends.base import Backend, Split
from engine.errors import EngineError
from engine.graph import Graph, Kind, Node, Tensor


class PlacementError(EngineError):
    """A node that no backend takes, or that strict placement refuses to move."""


@dataclass(frozen=True)
class Placement:
    """Where a node runs, and why."""

    backend: Backend
    reason: str


class Plan:
    """A graph with every node placed; `place` makes one."""

    def __init__(self, graph: Graph, placements: dict[Node, Placement]) -> None:
        self.graph, self.placements = graph, placements
        self.splits = _splits(graph, placements)
        self._buffer_bytes: dict[Backend, int | None] = {}

    def nodes_of(self, backend: Backend) -> list[Node]:
        return [node for node, p in self.placements.items() if p.backend is backend]

    def splits_of(self, backend: Backend) -> list[Split]:
        return [split for split in self.splits if split.backend is backend]

    def buffer_bytes(self, backend: Backend) -> int | None:
        """See Backend.buffer_bytes, which is asked once: it lowers the splits."""
        if backend not in self._buffer_bytes:
            self._buffer_bytes[backend] = backend.buffer_bytes(self.splits_of(backend))
        return self._buffer_bytes[backend]

    def tensors_of(self, backend: Backend, kind: Kind) -> list[Tensor]:
        """Weights, states or inputs that a backend's nodes use, each once."""
        nodes = self.nodes_of(backend)
        return list(dict.fromkeys(t for node in nodes for t in _operands(node, kind)))

    @property
    def backends(self) -> list[Backend]:
        """The backends that have nodes, in order of first use."""
        return list(dict.fromkeys(p.backend for p in self.placements.values()))


# Where a user rule sends a node: (name of the backend, reason).
Rules = Mapping[Node, tuple[str, str]]


def place(
    graph: Graph, backends: Sequence[Backend], strict: bool = False, rules: Rules | None = None
) -> Plan:
    """Place every node; `backends` in order of priority.

    A user rule makes the backends before the one it names refuse the node. Raises PlacementError
    for a node that none supports, or with `strict` one that no rule sends elsewhere than the first.
    """
    assert len({b.name for b in backends}) == len(backends), backends
    rules = rules or {}
    placer = _Placer(graph, backends, rules)
    for node in graph.nodes:
        placement = placer.place(node)
        if strict and placement.backend is not backends[0] and node not in rules:
            why = "; ".join(placer.refusals[node].values()) or placement.reason
            raise PlacementError(
                f"{node}: expected backend {backends[0].name} (strict), "
                f"got {placement.backend.name}: {why}"
            )
    return Plan(graph, placer.placements)


class _Placer:
    """Places nodes in graph order; `refusals`: of each node, backend name -> why it refuses."""

    def __init__(self, graph: Graph, backends: Sequence[Backend], rules: Rules) -> None:
        self._backends, self._rules = backends, rules
        self.refusals = {node: self._refused(node) for node in graph.nodes}
        self.placements: dict[Node, Placement] = {}
        self._producers = {t: node for node in graph.nodes for t in node.outputs}
        self._holders: dict[Tensor, Placement] = {}
        for nodes in _groups(graph):
            self._place_states(nodes)

    def _refused(self, node: Node) -> dict[str, str]:
        answers = {b.name: b.supports(node) for b in self._backends}
        refused = {name: f"{name}: {a.reason}" for name, a in answers.items() if not a.ok}
        if node in self._rules and len(refused) < len(answers):
            wanted, reason = self._rules[node]
            before = list(takewhile(lambda name: name != wanted, answers))
            refused |= {name: f"{name}: {reason}" for name in before if name not in refused}
        if len(refused) == len(answers):
            raise PlacementError(f"no backend supports {node} ({'; '.join(refused.values())})")
        return refused

    def _first(self, refused: Mapping[str, str]) -> Placement | None:
        """The first backend that doesn't refuse, if any, and why that one."""
        for backend in self._backends:
            if backend.name not in refused:
                only = len(self._backends) == 1
                reason = "the only backend" if only else f"{backend.name} is first in order"
                why = "; ".join(refused.values())
                return Placement(backend, f"{reason} after refusals ({why})" if why else reason)
        return None

    def _place_states(self, nodes: list[Node]) -> None:
        """Give the states of a group to the first backend that takes all its nodes."""
        refused = {
            name: f"{n.name}: {why}" for n in nodes for name, why in self.refusals[n].items()
        }
        if (first := self._first(refused)) is None:
            why = "; ".join(refused.values())
            raise PlacementError(f"no backend supports all of {nodes}: {why}")
        holder = Placement(first.backend, f"holds its state, {first.reason}")
        for node in nodes:
            self._holders |= dict.fromkeys(_operands(node, Kind.STATE), holder)

    def place(self, node: Node) -> Placement:
        self.placements[node] = placement = self._placement(node)
        for weight in _operands(node, Kind.WEIGHT):
            self._holders.setdefault(weight, placement)
        return placement

    def _placement(self, node: Node) -> Placement:
        refused, weights = self.refusals[node], _operands(node, Kind.WEIGHT)
        for state in _operands(node, Kind.STATE):
            return self._holders[state]
        wanted, reason = self._rules.get(node, ("", ""))
        if wanted and wanted not in refused:
            return Placement(next(b for b in self._backends if b.name == wanted), reason)
        for weight in weights:
            holder = self._holders.get(weight)
            if holder is not None and holder.backend.name not in refused:
                return Placement(holder.backend, f"holds {weight.name}")
        producers = (self._producers.get(t.base) for t in node.inputs.values())
        if not weights and (producer := next(filter(None, producers), None)):
            backend = self.placements[producer].backend
            if backend.name not in refused:
                return Placement(backend, f"follows {producer.name}")
        first = self._first(refused)
        assert first is not None
        return first


def _operands(node: Node, kind: Kind) -> list[Tensor]:
    return [t.base for t in node.inputs.values() if t.kind is kind]


def _groups(graph: Graph) -> list[list[Node]]:
    """Nodes that hold state; those that share a state tensor are one group."""
    group_of: dict[Tensor, list[Node]] = {}
    for node in graph.nodes:
        found = (group_of.get(t, []) for t in _operands(node, Kind.STATE))
        joined = dict.fromkeys(n for nodes in found for n in nodes)
        group = [*joined, node]
        group_of |= dict.fromkeys((t for n in group for t in _operands(n, Kind.STATE)), group)
    return list({id(group): group for group in group_of.values()}.values())


def _splits(graph: Graph, placements: Mapping[Node, Placement]) -> list[Split]:
    splits: list[Split] = []
    home: dict[Tensor, Split] = {}
    for node in graph.nodes:
        backend = placements[node].backend
        if not splits or splits[-1].backend is not backend:
            splits.append(Split(backend))
        split = splits[-1]
        split.nodes.append(node)
        for t in node.inputs.values():
            source = home.get(t.base)
            if source is None or source is split:
                continue
            _append_once(source.keeps, t.base)
            if source.backend is not backend:
                _append_once(split.copies, t.base)
        home |= dict.fromkeys(node.outputs, split)
    for t in (*graph.outputs.values(), *graph.kept):
        _append_once(home[t.base].keeps, t.base)
    return splits


def _append_once(tensors: list[Tensor], tensor: Tensor) -> None:
    if tensor not in tensors:
        tensors.append(tensor)
