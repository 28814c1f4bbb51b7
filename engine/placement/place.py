"""Placement of nodes on backends, and the steps that run them.

Every node gets a backend and the reason for it. The backend that holds a node's state or weight
takes it, else its producer's, else the first in priority order whose `supports` says yes. Runs of
nodes on one backend are splits, which the backend compiles once; tensors that cross from one
backend to another are copied at the start of the split that reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.graph import Graph, Kind, Live, Node, Tensor
from engine.sampling.device import Decoder, DrawingBackend

Array = NDArray[Any]


class PlacementError(EngineError):
    """A node that no backend takes, or that strict placement refuses to move."""


@dataclass(frozen=True)
class Support:
    """Answer to "can you run this node?"; `reason` says why not."""

    ok: bool
    reason: str = ""


# Looks at a node's outputs (live rows, in the order of `node.outputs`) right after it ran.
Watch = Callable[[Node, Sequence[Array]], None]


@dataclass(frozen=True)
class Instruction:
    """What a program runs at a time: a kernel, and the nodes that it covers or has a part in."""

    kernel: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds that one instruction took in a step; `backend` is the name of the one that ran it."""

    backend: str
    instruction: Instruction
    seconds: float


class Program(Protocol):
    """A compiled split."""

    @property
    def instructions(self) -> Sequence[Instruction]:
        """What it runs, in order."""

    def run(self, live: Live, watch: Watch | None = None) -> None:
        """Run its nodes on the live rows of what was written to their inputs."""

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`; returns the seconds of each instruction."""


class StateStore(Protocol):
    """One backend's part of the sequences' memory; `dim` is "n_slots" or "n_blocks"."""

    def zero(self, dim: str, index: int) -> None:
        """Assign zeros to a slot or block of every layer."""

    def copy(self, dim: str, source: int, target: int) -> None:
        """Copy a slot or block of every layer."""

    def save(self, dim: str, index: int) -> dict[str, Array]:
        """A slot's or block's contents by state tensor name."""

    def load(self, dim: str, index: int, contents: Mapping[str, Array]) -> None:
        """The reverse of `save`."""


class WeightSource(Protocol):
    """Where weights come from: a GGUFFile, or whatever a test makes up."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A weight's stored bytes, uint8."""

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """These of its bytes (all: None) are not needed any more, or only seldom: their memory may
        be given back."""


class Backend(Protocol):
    """Something that can run nodes and holds the weights and states that they use."""

    name: str
    # What it runs with, in a few words.
    detail: str

    @property
    def states(self) -> StateStore:
        """Its part of the sequences' memory."""

    def supports(self, node: Node) -> Support:
        """Whether it can run a node, and if not, why."""

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Bytes that the weights of some nodes will take in memory."""

    def free_bytes(self) -> int | None:
        """What is left of a memory of its own; None if it uses the machine's."""

    def load_weights(self, weights: Sequence[Tensor], source: WeightSource) -> None:
        """Take the weights of its nodes."""

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        """Make room for the states of its nodes; contents are arbitrary until written."""

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:
        """The INPUTs of all its nodes, before programs are compiled."""

    def compile(self, split: Split) -> Program:
        """Turn a split into something that runs without Python between nodes where it can."""

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of an INPUT, or of an ACTIVATION computed elsewhere."""

    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that one of its programs computed."""

    def release(self) -> None:
        """Give back the memory of weights and states; nothing can be run after it."""


@dataclass
class Split:
    """Consecutive nodes on one backend; `copies` come from elsewhere, `keeps` are read later."""

    backend: Backend
    nodes: list[Node] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    keeps: list[Tensor] = field(default_factory=list)


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

    def tensors_of(self, backend: Backend, kind: Kind) -> list[Tensor]:
        """Weights, states or inputs that a backend's nodes use, each once."""
        used: dict[Tensor, None] = {}
        for node, placement in self.placements.items():
            if placement.backend is backend:
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


class Executable:
    """A plan with its programs compiled, weights loaded and states allocated."""

    def __init__(self, plan: Plan, source: WeightSource) -> None:
        self.plan = plan
        for backend in plan.backends:
            backend.load_weights(plan.tensors_of(backend, Kind.WEIGHT), source)
            backend.allocate_states(plan.tensors_of(backend, Kind.STATE))
            backend.declare_inputs(plan.tensors_of(backend, Kind.INPUT))
        self._programs = [(split, split.backend.compile(split)) for split in plan.splits]
        self._inputs = [(b, plan.tensors_of(b, Kind.INPUT)) for b in plan.backends]
        made = {t: s for s in plan.splits for node in s.nodes for t in node.outputs}
        self._sources = {t: made[t].backend for s in plan.splits for t in s.copies}
        assert all(t.view_of is None for t in plan.graph.outputs.values())
        self._outputs = {k: (made[t.base].backend, t) for k, t in plan.graph.outputs.items()}

    def run(
        self, inputs: Mapping[str, Array], live: Live, watch: Watch | None = None
    ) -> dict[str, Array]:
        """One step: `inputs` by name, at their live sizes. Returns the graph's outputs by name."""
        self._write_inputs(inputs)
        for split, program in self._programs:
            self._copy(split)
            program.run(live, watch)
        return self._read_outputs()

    def run_timed(self, inputs: Mapping[str, Array], live: Live) -> list[Timing]:
        """A step as `run` makes it, timed: every instruction, and what moves data between them."""
        timings = [_timing("", "write inputs", lambda: self._write_inputs(inputs))]
        for split, program in self._programs:
            name = split.backend.name
            if split.copies:
                timings.append(_timing(name, "copy", partial(self._copy, split)))
            seconds = program.run_timed(live)
            for instruction, s in zip(program.instructions, seconds, strict=True):
                timings.append(Timing(name, instruction, s))
        timings.append(_timing("", "read outputs", self._read_outputs))
        return timings

    def _write_inputs(self, inputs: Mapping[str, Array]) -> None:
        for backend, tensors in self._inputs:
            for t in tensors:
                backend.write(t, inputs[t.name])

    def _copy(self, split: Split) -> None:
        for t in split.copies:
            split.backend.write(t, self._sources[t].read(t))

    def _read_outputs(self) -> dict[str, Array]:
        return {name: backend.read(t) for name, (backend, t) in self._outputs.items()}

    def decoder(self) -> Decoder | None:
        """What draws tokens on the device, if all runs on one that can."""
        if len(self._programs) != 1:
            return None
        ((split, program),), ((_, inputs),) = self._programs, self._inputs
        _, logits = self._outputs["logits"]
        backend: object = split.backend
        if not isinstance(backend, DrawingBackend):
            return None
        return backend.decoder(program, inputs, logits)

    @property
    def stores(self) -> list[StateStore]:
        """The state store of every backend in use."""
        return [backend.states for backend in self.plan.backends]


def _timing(backend: str, what: str, action: Callable[[], object]) -> Timing:
    start = time.perf_counter()
    action()
    return Timing(backend, Instruction(what, ()), time.perf_counter() - start)
