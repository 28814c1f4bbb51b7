"""The prefix cache's tier on the host, by what it counts: a mover that moves nothing stands for the
device. What is moved is tested in tests/backends/cuda.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import EngineError
from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Room
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import packed
from engine.kvcache.sequences import SequenceMemory
from engine.kvcache.tier import HostTier

STATE, BLOCK = 1 << 20, 1 << 16  # Bytes; ids take few beside them.


class StillMover:
    """A device whose slots and blocks have so many bytes."""

    def __init__(self, slot: int = STATE, block: int = BLOCK) -> None:
        self.n_bytes = {"n_slots": slot, "n_blocks": block}
        self.n_allocated = 0

    def row_bytes(self, dim: str) -> int:
        return self.n_bytes[dim]

    def allocate_host(self, n_bytes: int) -> Any:
        assert n_bytes > 0
        self.n_allocated += n_bytes
        return SimpleNamespace(address=0)

    def rows(self, dim: str, addresses: Sequence[int]) -> dict[Any, Any]:
        raise NotImplementedError

    def move(self, rows: Sequence[tuple[str, int, int]], to_host: bool) -> None:
        pass


class World:
    """A cache whose device has room for two states and four blocks beside what runs."""

    def __init__(self, budget: int, mover: StillMover) -> None:
        self.mover = mover
        self.memory = SequenceMemory(100, 8, 64, lambda source, target: None)
        room = Room(budget, STATE, BLOCK, 2, 4, has_tier=True)
        tier = HostTier(mover, self.memory, budget)
        self.cache = PrefixCache(self.memory, room, tier=tier)
        self._ids = count()

    def keep(self, n_tokens: int) -> bytes:
        """Run a new prompt, and keep its end; returns its ids."""
        ids = packed([next(self._ids) for _ in range(n_tokens)])
        seq = self.memory.create()
        self.memory.begin(seq, n_tokens)
        self.memory.finish(seq, n_tokens)
        self.cache.keep(ids, seq, Kind.ANSWER)
        self.memory.free(seq)
        return ids

    def is_kept(self, ids: bytes) -> bool:
        return self.cache.match(ids).n_kept == len(ids) // 4


@pytest.mark.parametrize("n_tokens", [640, 64])
def test_a_full_host_gives_up_what_is_worth_less(n_tokens: int) -> None:
    """Slots fill it to less than its budget. What comes then saves more tokens, or as many, and
    they are newer."""
    world = World(5 * STATE, StillMover())
    before = [world.keep(64) for _ in range(10)]
    after = [world.keep(n_tokens) for _ in range(4)]
    assert world.is_kept(after[-1])
    assert sum(map(world.is_kept, after)) > 1
    assert not world.is_kept(before[0])
    assert world.cache.n_bytes <= world.cache.room.budget
    assert world.mover.n_allocated <= world.cache.room.budget


def test_a_full_host_keeps_what_is_worth_more() -> None:
    world = World(3 * STATE + 12 * BLOCK, StillMover())
    long = world.keep(640)
    for _ in range(6):
        world.keep(1)
    assert world.is_kept(long)


def test_a_model_without_kv_cache_has_a_tier() -> None:
    world = World(4 * STATE, StillMover(block=0))
    kept = [world.keep(200) for _ in range(6)]
    assert [world.is_kept(ids) for ids in kept].count(True) >= 3
    assert world.cache.tier is not None
    assert world.cache.tier.n_bytes > 0


def test_a_change_of_use_allocates_no_more_than_the_budget() -> None:
    """Short prompts have had arenas of states, long ones want them for blocks, and back."""
    world = World(16 * STATE, StillMover())
    for n_tokens in (64, 3200, 64):
        kept = [world.keep(n_tokens) for _ in range(20)]
        assert sum(map(world.is_kept, kept)) >= 3
        assert world.mover.n_allocated <= 16 * STATE


def test_a_host_that_gives_no_more_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    class FullMover(StillMover):
        def allocate_host(self, n_bytes: int) -> Any:
            raise EngineError("no pinned memory")

    world = World(16 * STATE, FullMover())
    for _ in range(8):
        world.keep(64)
    assert caplog.messages == ["the prefix cache has no more memory of the host: no pinned memory"]
