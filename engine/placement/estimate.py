"""Memory that a placed graph will touch, compared with the memory that is left.

Counted: weights as backends keep them, states and KV cache at capacity, and activations: the
buffers of programs where a backend knows them before it compiles, else the largest sum alive at one
time in a full step.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.backends.base import Backend, Copies
from engine.errors import NotEnoughMemoryError
from engine.graph import Graph, Kind, Tensor, dim_name
from engine.placement.place import Plan

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Estimate:
    """Bytes by use."""

    weights: int
    states: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.states + self.kv_cache + self.activations


def estimate(plan: Plan, backends: Sequence[Backend] | None = None) -> Estimate:
    """Bytes that a plan needs, or the part of it on `backends`."""
    weights = states = kv_cache = 0
    backends = plan.backends if backends is None else backends
    for backend in backends:
        weights += backend.weight_bytes(plan.nodes_of(backend))
        for t in plan.tensors_of(backend, Kind.STATE):
            if dim_name(t) == "n_blocks":
                kv_cache += t.nbytes
            else:
                states += t.nbytes
    return Estimate(weights, states, kv_cache, _buffer_bytes(plan, backends))


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a backend's own memory by use. total: in all, or as many as it may take; copies: of
    weights; cache: of the prefix cache's slots and blocks; left: nobody's. `rest`: taken by the
    driver, libraries and other programs."""

    total: int
    need: Estimate
    copies: Copies
    cache: int
    left: int

    @property
    def rest(self) -> int:
        taken = self.need.total + self.copies.n_bytes + self.cache
        return max(0, self.total - taken - self.left)


def device_memory(
    plan: Plan, cached: Mapping[str, int] | None = None
) -> dict[Backend, DeviceMemory]:
    """The own memory of each backend that has some. cached: the prefix cache's slots and blocks, by
    dim, of a plan that is loaded; None: before that, what loading will take."""
    found = {}
    for backend in plan.backends:
        total, free = backend.total_bytes(), backend.free_bytes()
        if total is None or free is None:
            continue
        need, splits, extra = estimate(plan, [backend]), plan.splits_of(backend), cached or {}
        states = plan.tensors_of(backend, Kind.STATE)
        n_cached = sum(t.nbytes // int(t.shape[0]) * extra.get(dim_name(t), 0) for t in states)
        if cached is None:
            left = max(0, free - need.total)
            copies = backend.copies(splits, left)
            left -= copies.n_bytes
        else:
            left, copies = free, backend.copies(splits)
        found[backend] = DeviceMemory(total, need, copies, n_cached, left)
    return found


def check(plan: Plan) -> None:
    """Raise NotEnoughMemoryError if a plan needs more than is left."""
    for where, backends, available in memories(plan):
        need = estimate(plan, backends)
        if available is not None and need.total > available:
            raise _refusal(where, need, available)


def fits(plan: Plan, backend: Backend) -> bool:
    """Whether a backend's own memory has room for its part of a plan."""
    available = backend.free_bytes()
    return available is None or estimate(plan, [backend]).total <= available


def memories(plan: Plan) -> Sequence[tuple[str, list[Backend], int | None]]:
    """(name, backends, bytes left) of the machine's memory and of each backend's own."""
    own = [(b, b.free_bytes()) for b in plan.backends]
    machine = [b for b, n in own if n is None]
    rest = [(f" on {b.name}", [b], n) for b, n in own if n is not None]
    return [("", machine, available_bytes()), *rest] if machine else rest


def _refusal(where: str, need: Estimate, available: int) -> NotEnoughMemoryError:
    unit, size = ("GiB", 2**30) if need.total >= 2**30 else ("MiB", 2**20)

    def shown(n_bytes: int) -> str:
        return f"{n_bytes / size:.1f}"

    return NotEnoughMemoryError(
        f"not enough memory{where}: expected at most {shown(available)} {unit} (available), "
        f"the model needs {shown(need.total)} {unit} (weights {shown(need.weights)}, states "
        f"{shown(need.states)}, KV cache {shown(need.kv_cache)}, activations "
        f"{shown(need.activations)}): {_advice(need, available, where)}"
    )


def _advice(need: Estimate, available: int, where: str) -> str:
    if need.weights > available:
        return "lower -ngl" if where else "take a file of smaller types"
    parts = (("-c", need.kv_cache), ("-np", need.states), ("-ub", need.activations))
    largest = max(n for _, n in parts)
    return "lower " + " or ".join(option for option, n in parts if 10 * n >= largest)


def _buffer_bytes(plan: Plan, backends: Sequence[Backend]) -> int:
    """As the backends say, or the graph's activations where one can't say."""
    known = [plan.buffer_bytes(backend) for backend in backends]
    sizes = [n for n in known if n is not None]
    return sum(sizes) if len(sizes) == len(known) > 0 else _activation_bytes(plan.graph)


def _activation_bytes(graph: Graph) -> int:
    """The largest sum of activations alive at one time; each lives until its last use."""
    last_use: dict[Tensor, int] = {}
    for i, node in enumerate(graph.nodes):
        for t in (*node.outputs, *(t.base for t in node.inputs.values())):
            last_use[t] = i
    last_use |= {t.base: len(graph.nodes) for t in (*graph.outputs.values(), *graph.kept)}
    ends: dict[int, list[int]] = {}
    alive = most = 0
    for i, node in enumerate(graph.nodes):
        for t in node.outputs:
            assert t.kind is Kind.ACTIVATION, t
            n_bytes = _touched_bytes(t, graph)
            alive += n_bytes
            ends.setdefault(last_use[t], []).append(n_bytes)
        most = max(most, alive)
        alive -= sum(ends.pop(i, ()))
    return most


def _touched_bytes(tensor: Tensor, graph: Graph) -> int:
    """Outputs count one row per sequence: generation asks for no more."""
    if dim_name(tensor) != "n_outputs":
        return tensor.nbytes
    return tensor.nbytes // int(tensor.shape[0]) * min(graph.capacity.n_seqs, tensor.shape[0])


def available_bytes() -> int | None:
    """Bytes left on the machine, in the process's control group and under its own limit; None if
    unknown."""
    left = (_left_on_machine(), _left_in_cgroup(), _left_under_limit())
    return min((n for n in left if n is not None), default=None)


def _left_on_machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable: *(\d+)", _MEMINFO.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _left_in_cgroup() -> int | None:
    """Bytes left in a control group of version 2; file cache counts as left."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return max(0, int(limit) - used + cached)


def _left_under_limit() -> int | None:
    """Bytes of address space left under `ulimit -v`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        n_pages = int(_STATM.read_text().split()[0])
    except OSError:
        return None
    used = n_pages * resource.getpagesize()
    return None if limit == resource.RLIM_INFINITY else max(0, limit - used)
