"""How large the prefix cache may be: its budget in bytes, and the slots and blocks that fill it."""

from __future__ import annotations

import logging

from engine.backends.base import Backend
from engine.errors import EngineError
from engine.graph import Kind, dim_name
from engine.kvcache.cache import MOST_STATES
from engine.kvcache.entries import Room
from engine.kvcache.tier import Mover
from engine.placement.estimate import available_bytes, estimate, memories
from engine.placement.place import Plan

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_LEAST, _MOST = 512 * _MIB, 8192 * _MIB
# What else takes memory: threads' stacks, templates, the interpreter. Under a limit of address
# space (`ulimit -v`) a run must not fail for want of what the cache may once need.
_REST = 256 * _MIB
_MOST_BLOCKS = 1 << 14  # A million tokens.


class CacheRoomError(EngineError):
    """A cache that the memory has no room for."""


def cache_room(plan: Plan, cache_ram: int | None) -> Room:
    """What the cache may hold. cache_ram: its budget in MiB, 0 for none, -1 for what is free after
    loading beyond 256 MiB; None: a quarter of that, but 512 MiB if twice as much is free, and at
    most 8 GiB.

    In the machine's memory, slots and blocks for the whole budget of each are address space, taken
    when they are written. Where states lie in a device's own memory, the budget is of the machine's
    all the same: the device has slots and blocks for a part of it, in an eighth of what is free.
    Raises CacheRoomError for more than is free.
    """
    sizes = {"n_slots": 0, "n_blocks": 0}
    for t in plan.graph.states.values():
        sizes[dim_name(t)] += t.nbytes // int(t.shape[0])
    state_bytes, block_bytes = sizes["n_slots"], max(1, sizes["n_blocks"])
    holders = [b for b in plan.backends if _state_bytes(plan, [b])]
    has_tier = len(holders) == 1 and isinstance(holders[0].states, Mover)
    free = _free_bytes(plan, state_bytes + block_bytes, not has_tier)
    budget = _budget(free, cache_ram)
    if not state_bytes or budget < state_bytes + block_bytes:
        if cache_ram:  # Who asked for none is told by the first line alone.
            least = (state_bytes + block_bytes) / _MIB
            came = f"expected at least {least:.1f} MiB, for one state, got {budget / _MIB:.1f}"
            came = came if state_bytes else "expected a model with states, got one without"
            _log.warning("cache_ram (--cache-ram): %s: prompts reuse nothing", came)
        return Room()
    rows = min(budget, _free_bytes(plan, state_bytes + block_bytes, True) // 8)
    rows = rows if has_tier else budget
    n_states = min(rows // state_bytes, MOST_STATES)
    n_blocks = min(rows // block_bytes, _MOST_BLOCKS)
    return Room(budget, state_bytes, block_bytes, n_states, n_blocks, has_tier)


def _budget(free: int, cache_ram: int | None) -> int:
    """Bytes of a budget in MiB, or of the default."""
    rest = max(0, free - _REST)
    if cache_ram is None:
        return min(max(rest // 4, _LEAST if rest >= 2 * _LEAST else 0), _MOST)
    if cache_ram < 0:
        return rest
    if cache_ram * _MIB > free:
        raise CacheRoomError(
            f"cache_ram (--cache-ram): expected at most {free // _MIB} MiB (free after loading), "
            f"got {cache_ram}"
        )
    return cache_ram * _MIB


def _state_bytes(plan: Plan, backends: list[Backend]) -> int:
    """Bytes of a slot and a block in the memory of some backends."""
    states = [t for b in backends for t in plan.tensors_of(b, Kind.STATE)]
    return sum(t.nbytes // int(t.shape[0]) for t in states)


def _free_bytes(plan: Plan, n_bytes: int, of_devices: bool) -> int:
    """Bytes left after loading, of which every memory holds its part as it does of `n_bytes`, a
    slot and a block; if not of_devices, all of them in the machine's memory."""
    if not of_devices:
        left = available_bytes()
        return _MOST if left is None else left
    free = []
    for _, backends, available in memories(plan):
        if available is not None and (part := _state_bytes(plan, backends)):
            left = max(0, available - estimate(plan, backends).total)
            free.append(left * n_bytes // part)
    return min(free, default=_MOST)
