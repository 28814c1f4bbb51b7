"""What a placed graph will need of the machine's memory, and what the machine has left of it.

An estimate of what is really touched: weights as backends keep them, states and KV cache at
capacity, the most activations that are alive at a time in a full step, and logits of one row for
each sequence. The pages of the file itself are the system's to give back and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError
from engine.graph import Graph, Kind, Tensor, dim_name
from engine.planner import Plan

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


class NotEnoughMemoryError(EngineError):
    """A model that doesn't fit the memory that is left."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by what takes them."""

    weights: int
    states: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.states + self.kv_cache + self.activations


def estimate(plan: Plan) -> Estimate:
    """What a plan will need."""
    weights = 0
    for backend in plan.backends:
        nodes = [node for node, p in plan.placements.items() if p.backend is backend]
        weights += backend.weight_bytes(nodes)
    return Estimate(weights, *plan.graph.state_bytes(), _activation_bytes(plan.graph))


def check(plan: Plan) -> None:
    """Raise NotEnoughMemoryError, in one line, if a plan needs more than there is."""
    available = available_bytes()
    need = estimate(plan)
    if available is None or need.total <= available:
        return
    unit, size = ("GiB", 2**30) if need.total >= 2**30 else ("MiB", 2**20)

    def shown(n_bytes: int) -> str:
        return f"{n_bytes / size:.1f}"

    raise NotEnoughMemoryError(
        f"not enough memory: expected at most {shown(available)} {unit} (available), the model "
        f"needs {shown(need.total)} {unit} (weights {shown(need.weights)}, states "
        f"{shown(need.states)}, KV cache {shown(need.kv_cache)}, activations "
        f"{shown(need.activations)}): {_advice(need, available)}"
    )


def _advice(need: Estimate, available: int) -> str:
    if need.weights > available:
        return "take a file of smaller types"
    parts = (("-c", need.kv_cache), ("-np", need.states), ("-ub", need.activations))
    largest = max(n for _, n in parts)
    return "lower " + " or ".join(option for option, n in parts if 10 * n >= largest)


def _activation_bytes(graph: Graph) -> int:
    """The most that is alive at a time, from where it is made to its last use."""
    last_use: dict[Tensor, int] = {}
    for i, node in enumerate(graph.nodes):
        for t in (*node.outputs, *(t.base for t in node.inputs.values())):
            last_use[t] = i
    last_use |= {t.base: len(graph.nodes) for t in graph.outputs.values()}
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
    """Rows of outputs are one for each sequence: what generating text asks for."""
    if dim_name(tensor) != "n_outputs":
        return tensor.nbytes
    return tensor.nbytes // int(tensor.shape[0]) * min(graph.capacity.n_seqs, tensor.shape[0])


def available_bytes() -> int | None:
    """What the machine, or the process's control group, has left; None where nothing says so."""
    limits = [n for n in (_left_on_machine(), _left_in_cgroup()) if n is not None]
    return min(limits, default=None)


def _left_on_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    kib = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(n) * 1024 for n in kib), None)


def _left_in_cgroup() -> int | None:
    """Of a control group of version 2; the file cache is given back when it is needed."""
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
