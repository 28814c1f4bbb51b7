"""Rules of placement that users give: -ngl, -ncmoe, -cmoe, --override-tensor.

As in llama.cpp: the last N layers are on the device, where the head counts as one more; the first
regular expression found in a weight's name sends the node that reads it to a backend, whatever else
is said. The device is the first backend with memory of its own, the host the first without.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from engine.backends.base import Backend
from engine.errors import EngineError
from engine.graph import Graph, Kind, Node
from engine.placement import estimate
from engine.placement.place import Plan, Rules, place

_log = logging.getLogger(__name__)
# Of all names of a model's weights, which takes milliseconds.
_SEARCH_SECONDS = 1.0
_LAYER = re.compile(r"blk\.(\d+)\.")


class OffloadError(EngineError):
    """An option that can't be followed."""


@dataclass(frozen=True)
class Offload:
    """n_gpu_layers: None for all. n_cpu_moe: layers, from the first, whose experts stay on the
    host. overrides: texts `REGEX=BACKEND`."""

    n_gpu_layers: int | None = None
    n_cpu_moe: int = 0
    overrides: Sequence[str] = ()

    def rules(self, graph: Graph, backends: Sequence[Backend]) -> Rules:
        """(backend, reason) of the nodes that a rule places. Raises OffloadError."""
        used = [b.name for b in backends]
        device = next((b.name for b in backends if b.traits.own_memory), None)
        host = next((b.name for b in backends if not b.traits.own_memory), None)
        rules: dict[Node, tuple[str, str]] = {}
        names = tuple(dict.fromkeys(name for node in graph.nodes for name in _weights(node)))
        parsed = [(text, *_parse(text, used)) for text in self.overrides]
        with _time_limit(self.overrides):
            overrides = [(text, to, _matched(text, sought, names)) for text, sought, to in parsed]
        for node in graph.nodes:
            for text, backend, matched in overrides:
                if found := [name for name in _weights(node) if name in matched]:
                    rules.setdefault(node, (backend, f"--override-tensor {text} ({found[0]})"))
            if device and host and (rule := self._by_layer(node, graph)):
                on_device, reason = rule
                rules.setdefault(node, (device if on_device else host, reason))
        return rules

    def _by_layer(self, node: Node, graph: Graph) -> tuple[bool, str] | None:
        """Whether the numbers of layers put a node on the device, and why; None: they don't say."""
        n_layers = len(graph.layer_kinds)
        found = _LAYER.match(node.name)
        layer = int(found[1]) if found else 0 if node.name == "token_embd" else n_layers
        if found and layer < self.n_cpu_moe and node.op.name == "MUL_MAT_ID":
            return False, f"-ncmoe {min(self.n_cpu_moe, n_layers)}"
        if self.n_gpu_layers is None:
            return None
        n_layers_on_device = min(self.n_gpu_layers, n_layers + 1)
        return layer > n_layers - n_layers_on_device, f"-ngl {n_layers_on_device}"


def _weights(node: Node) -> list[str]:
    return [t.name for t in node.inputs.values() if t.kind is Kind.WEIGHT]


def _parse(text: str, names: Sequence[str]) -> tuple[str, str]:
    expression, _, backend = text.rpartition("=")
    if not expression or backend not in names:
        used = ", ".join(names)
        raise OffloadError(
            f"--override-tensor: expected REGEX=BACKEND with one of {used} (in use), got {text!r}"
        )
    return expression, backend


@lru_cache(64)
def _matched(text: str, expression: str, names: tuple[str, ...]) -> frozenset[str]:
    """The names that the expression of an override is found in."""
    try:
        found = frozenset(filter(re.compile(expression).search, names))
    except (re.error, OverflowError, RecursionError) as error:
        raise OffloadError(f"--override-tensor {text}: no regular expression: {error}") from None
    if not found:
        raise OffloadError(f"--override-tensor {text}: matches no weight of the model")
    return found


@contextmanager
def _time_limit(texts: Sequence[str]) -> Iterator[None]:
    """Raise OffloadError after _SEARCH_SECONDS. A search holds Python's lock, so only a signal ends
    it; outside of the main thread, which alone has signals, there is no limit."""

    def stop(*_: object) -> None:
        raise OffloadError(
            f"--override-tensor {', '.join(texts)}: expected what is searched in the weights' "
            f"names within {_SEARCH_SECONDS:g} s; repeat nothing that itself repeats, as (a+)+ does"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, _SEARCH_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def place_where_it_fits(
    graph: Graph, backends: Sequence[Backend], offload: Offload, strict: bool = False
) -> Plan:
    """The placed graph; without -ngl, with as many layers on the device as it has room for."""
    first, n_layers = backends[0], len(graph.layer_kinds)
    _warn_of_no_effect(graph, backends, offload)

    def placed(n: int | None) -> Plan:
        rules = replace(offload, n_gpu_layers=n).rules(graph, backends)
        return place(graph, backends, strict, rules)

    plan = placed(offload.n_gpu_layers)
    if offload.n_gpu_layers is not None or estimate.fits(plan, first):
        return plan
    # 0 layers always fit: the first of 1, 2, … that doesn't.
    too_many = range(1, n_layers + 1)
    n = bisect_left(too_many, True, key=lambda n: not estimate.fits(placed(n), first))
    _log.warning("%s has room for %d of %d layers: -ngl %d", first.name, n, n_layers, n)
    return placed(n)


def _warn_of_no_effect(graph: Graph, backends: Sequence[Backend], offload: Offload) -> None:
    if offload.n_gpu_layers and not any(b.traits.own_memory for b in backends):
        _log.warning("-ngl is ignored: no GPU is used")
    if offload.n_cpu_moe and not any(node.op.name == "MUL_MAT_ID" for node in graph.nodes):
        _log.warning("-ncmoe or -cmoe is ignored: the model has no experts")
