"""Placement of nodes on backends, with the reason for each.

The backend that holds a node's state or weight takes it, else its producer's, else the first in
priority order whose `supports` says yes. Runs of nodes on one backend are splits, which the backend
compiles once; tensors that cross from one backend to another are copied at the start of the split
that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType

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

    def nodes_of(self, backend: Backend) -> list[Node]:
        """A backend's nodes, in the graph's order."""
        return [node for node, placement in self.placements.items() if placement.backend is backend]

    def tensors_of(self, backend: Backend, kind: Kind) -> list[Tensor]:
        """Weights, states or inputs that a backend's nodes use, each once."""
        used: dict[Tensor, None] = {}
        for node in self.nodes_of(backend):
            used |= {t.base: None for t in node.inputs.values() if t.kind is kind}
        return list(used)

    @property
    def backends(self) -> list[Backend]:
        """The backends that have nodes, in order of first use."""
        return list(dict.fromkeys(p.backend for p in self.placements.values()))


# Nodes that are told where to run: (name of the backend, reason).
Rules = Mapping[Node, tuple[str, str]]


def place(
    graph: Graph,
    backends: Sequence[Backend],
    strict: bool = False,
    rules: Rules = MappingProxyType({}),
) -> Plan:
    """Place every node; `backends` in order of priority. A rule counts as the others' refusal.

    Raises PlacementError for a node that none supports, or with `strict` for one that the first
    backend doesn't and no rule sends elsewhere.
    """
    assert len({b.name for b in backends}) == len(backends), backends
    refusals = {node: _refusals(node, backends, rules.get(node)) for node in graph.nodes}
    homes: dict[Tensor, tuple[Backend, str]] = {}
    for nodes in _groups(graph):
        _place_group(nodes, backends, refusals, homes)
    placements: dict[Node, Placement] = {}
    producers: dict[Tensor, Node] = {}
    for node in graph.nodes:
        told = rules.get(node)
        placement = _place_node(node, backends, refusals[node], told, homes, producers, placements)
        if strict and placement.backend is not backends[0] and node not in rules:
            why = "; ".join(refusals[node].values()) or placement.reason
            raise PlacementError(
                f"{node}: expected backend {backends[0].name} (strict), "
                f"got {placement.backend.name}: {why}"
            )
        placements[node] = placement
        producers |= dict.fromkeys(node.outputs, node)
    return Plan(graph, placements)


def _refusals(
    node: Node, backends: Sequence[Backend], rule: tuple[str, str] | None
) -> dict[str, str]:
    """Backend name -> why it refuses the node, or why it must not have it."""
    answers = {b.name: b.supports(node) for b in backends}
    refused = {name: f"{name}: {a.reason}" for name, a in answers.items() if not a.ok}
    if rule is not None and len(refused) < len(backends):
        wanted, reason = rule
        before = list(takewhile(lambda name: name != wanted, answers))
        refused |= {name: f"{name}: {reason}" for name in before if name not in refused}
    if len(refused) == len(backends):
        raise PlacementError(f"no backend supports {node} ({'; '.join(refused.values())})")
    return refused


def _groups(graph: Graph) -> list[list[Node]]:
    """Nodes that hold state, those that share a state tensor together."""
    groups: list[tuple[set[Tensor], list[Node]]] = []
    for node in graph.nodes:
        states = {t.base for t in node.inputs.values() if t.kind is Kind.STATE}
        if not states:
            continue
        joined = [g for g in groups if g[0] & states]
        groups = [g for g in groups if not g[0] & states]
        nodes = [n for g in joined for n in g[1]] + [node]
        groups.append((states.union(*(g[0] for g in joined)), nodes))
    return [nodes for _, nodes in groups]


def _place_group(
    nodes: list[Node],
    backends: Sequence[Backend],
    refusals: Mapping[Node, Mapping[str, str]],
    homes: dict[Tensor, tuple[Backend, str]],
) -> None:
    """Find the states of a group their home: the first backend that takes all its nodes."""
    refused = {name: f"{n.name}: {why}" for n in nodes for name, why in refusals[n].items()}
    backend = next((b for b in backends if b.name not in refused), None)
    if backend is None:
        raise PlacementError(f"no backend supports all of {nodes}: {'; '.join(refused.values())}")
    reason = _because(f"holds its state, {_first_that_takes(backend, backends)}", refused.values())
    for node in nodes:
        for t in node.inputs.values():
            if t.kind is Kind.STATE:
                homes[t.base] = (backend, reason)


def _place_node(
    node: Node,
    backends: Sequence[Backend],
    refused: Mapping[str, str],
    told: tuple[str, str] | None,
    homes: dict[Tensor, tuple[Backend, str]],
    producers: Mapping[Tensor, Node],
    placements: Mapping[Node, Placement],
) -> Placement:
    operands = list(node.inputs.values())
    for t in operands:
        if t.kind is Kind.STATE:
            return Placement(*homes[t.base])
    weights = [t.base for t in operands if t.kind is Kind.WEIGHT]
    if told is not None and told[0] not in refused:
        backend = next(b for b in backends if b.name == told[0])
        for w in weights:
            homes.setdefault(w, (backend, told[1]))
        return Placement(backend, told[1])
    for w in weights:
        if w in homes and homes[w][0].name not in refused:
            return Placement(homes[w][0], f"holds {w.name}")
    made_by = [producers[t.base] for t in operands if t.base in producers]
    if not weights and made_by:
        backend = placements[made_by[0]].backend
        if backend.name not in refused:
            return Placement(backend, f"follows {made_by[0].name}")
    backend = next(b for b in backends if b.name not in refused)
    reason = _because(_first_that_takes(backend, backends), refused.values())
    for w in weights:
        homes.setdefault(w, (backend, reason))
    return Placement(backend, reason)


def _first_that_takes(backend: Backend, backends: Sequence[Backend]) -> str:
    return "the only backend" if len(backends) == 1 else f"{backend.name} is first in order"


def _because(reason: str, refused: Iterable[str]) -> str:
    why = "; ".join(refused)
    return f"{reason} after refusals ({why})" if why else reason


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
    for t in graph.outputs.values():
        _append_once(home[t.base].keeps, t.base)
    return splits


def _append_once(tensors: list[Tensor], tensor: Tensor) -> None:
    if tensor not in tensors:
        tensors.append(tensor)
