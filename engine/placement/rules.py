"""Which nodes a user keeps from the GPU, or sends there: -ngl, -ncmoe, -cmoe, --override-tensor.

As in llama.cpp: of N offloaded layers the last ones of the model are on the GPU, the head counting
as one more layer; the experts of a layer may stay on the CPU; a regular expression that is found in
a weight's name sends the node that reads it to a backend, whatever else is said. The first
expression that is found counts.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.backends.base import Backend
from engine.errors import EngineError
from engine.graph import Graph, Kind, Node
from engine.placement import estimate as memory_estimate
from engine.placement.place import Plan, place

_log = logging.getLogger(__name__)

TARGETS = ("cpu", "cuda")
_LAYER = re.compile(r"blk\.(\d+)\.")


class OffloadError(EngineError):
    """An option that can't be followed."""


@dataclass(frozen=True)
class Offload:
    """n_gpu_layers: None for all. n_cpu_moe: layers, from the first, whose experts stay.

    overrides: texts `REGEX=cpu` or `REGEX=cuda`.
    """

    n_gpu_layers: int | None = None
    n_cpu_moe: int = 0
    overrides: Sequence[str] = ()

    def rules(self, graph: Graph, backends: Sequence[str]) -> dict[Node, tuple[str, str]]:
        """(backend, reason) of the nodes that are told where to run.

        Raises OffloadError for an expression that doesn't compile, matches no weight, or names a
        backend that isn't used.
        """
        patterns = [_parse(text, backends) for text in self.overrides]
        matched: set[str] = set()
        rules: dict[Node, tuple[str, str]] = {}
        for node in graph.nodes:
            names = [t.name for t in node.inputs.values() if t.kind is Kind.WEIGHT]
            for text, pattern, backend in patterns:
                if found := [name for name in names if pattern.search(name)]:
                    matched.add(text)
                    rules.setdefault(node, (backend, f"--override-tensor {text} ({found[0]})"))
            if node not in rules and "cuda" in backends and (rule := self._rule(node, graph)):
                rules[node] = rule
        for text, _, _ in patterns:
            if text not in matched:
                raise OffloadError(f"--override-tensor {text}: matches no weight of the model")
        return rules

    def _rule(self, node: Node, graph: Graph) -> tuple[str, str] | None:
        """Where the numbers of layers send a node, and why; None if they say nothing."""
        n_layers = len(graph.layer_kinds)
        found = _LAYER.match(node.name)
        layer = int(found[1]) if found else 0 if node.name == "token_embd" else n_layers
        if found and layer < self.n_cpu_moe and node.op.name == "MUL_MAT_ID":
            return "cpu", f"-ncmoe {min(self.n_cpu_moe, n_layers)}"
        if self.n_gpu_layers is None:
            return None
        stays = layer < n_layers + 1 - self.n_gpu_layers
        return "cpu" if stays else "cuda", f"-ngl {self.n_gpu_layers}"


def _parse(text: str, backends: Sequence[str]) -> tuple[str, re.Pattern[str], str]:
    expression, _, backend = text.rpartition("=")
    if not expression or backend not in TARGETS:
        raise OffloadError(f"--override-tensor: expected REGEX=cpu or REGEX=cuda, got {text!r}")
    if backend not in backends:
        used = ", ".join(backends)
        raise OffloadError(f"--override-tensor {text}: expected one of {used} (in use)")
    try:
        return text, re.compile(expression), backend
    except re.error as error:
        raise OffloadError(f"--override-tensor {text}: no regular expression: {error}") from None


def place_where_it_fits(
    graph: Graph, backends: Sequence[Backend], offload: Offload, strict: bool = False
) -> Plan:
    """The placed graph; if -ngl says nothing, with as many layers on a GPU as it has room for."""
    names, first, n_layers = [b.name for b in backends], backends[0], len(graph.layer_kinds)

    def placed(n: int | None) -> Plan:
        rules = replace(offload, n_gpu_layers=n).rules(graph, names)
        return place(graph, backends, strict, rules)

    plan = placed(offload.n_gpu_layers)
    if offload.n_gpu_layers is not None or memory_estimate.fits(plan, first):
        return plan
    # 0 layers always fit: the first of 1, 2, … that doesn't.
    too_many = range(1, n_layers + 1)
    n = bisect_left(too_many, True, key=lambda n: not memory_estimate.fits(placed(n), first))
    _log.warning("%s has room for %d of %d layers: -ngl %d", first.name, n, n_layers, n)
    return placed(n)
