"""The memory of sequences as users have it: every operation goes through the owner's door."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial

from engine import checks
from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Counts, Text
from engine.kvcache.pool import Pool
from engine.kvcache.sequences import (
    Allocation,
    Checkpoint,
    CheckpointError,
    SequenceError,
    SequenceMemory,
)
from engine.runtime.owner import Owner

_N_TRIES = 8  # To look into the cache between changes, before it waits for its turn.


class SharedCache:
    """PrefixCache for any thread."""

    def __init__(self, cache: PrefixCache, owner: Owner) -> None:
        self._cache, self._call = cache, owner.call
        self.room, self.budget = cache.room, cache.room.budget

    def __repr__(self) -> str:
        cache = self._cache
        return f"<SharedCache: {cache.n_states} states, {cache.n_bytes} of {self.budget} bytes>"

    @property
    def n_states(self) -> int:
        """States that are kept."""
        return self._call(lambda: self._cache.n_states)

    @property
    def n_tokens(self) -> int:
        """Tokens whose keys and values are kept, in whole blocks."""
        return self._call(lambda: self._cache.n_tokens)

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is kept: at most `budget`."""
        return self._call(lambda: self._cache.n_bytes)

    @property
    def counts(self) -> Counts:
        """What happened since loading."""
        return self._call(lambda: replace(self._cache.counts))

    def clear(self) -> None:
        """Give up all that is kept."""
        self._call(self._cache.clear)

    def match_text(self, key: str) -> tuple[int, Text | None]:
        """It need not wait for a step: what was found while nothing changed is right."""
        cache = self._cache
        for _ in range(_N_TRIES):
            before = cache.n_changes
            with suppress(Exception):  # Of trees that change meanwhile.
                found = cache.match_text(key)
                if before == cache.n_changes and before % 2 == 0:
                    return found
        return self._call(partial(cache.match_text, key))


class SharedMemory:
    """SequenceMemory for any thread; what its methods do is documented there."""

    def __init__(self, memory: SequenceMemory, owner: Owner) -> None:
        self._memory, self._call = memory, owner.call

    def __repr__(self) -> str:
        pools = (self._memory.blocks, self._memory.slots)
        return f"<SharedMemory: {', '.join(map(str, pools))}>"

    @property
    def dropped(self) -> deque[int]:
        return self._memory.dropped

    @property
    def blocks(self) -> Pool:
        """The KV cache blocks, to be looked at."""
        return self._call(lambda: self._memory.blocks)

    @property
    def slots(self) -> Pool:
        """The state slots, to be looked at."""
        return self._call(lambda: self._memory.slots)

    def reserve(self) -> int:
        return self._memory.reserve()

    def create(self) -> int:
        return self._call(self._memory.create)

    def fork(self, seq: int) -> int:
        return self._call(partial(self._memory.fork, seq))

    def free(self, seq: int) -> None:
        checks.integer(SequenceError, "seq", seq)
        self._call(partial(self._memory.free, seq))

    def drop(self, seq: int) -> None:
        """Have a sequence freed by the next call; never waits, so that no exception comes first."""
        checks.integer(SequenceError, "seq", seq)
        self._memory.dropped.append(seq)

    def n_tokens(self, seq: int) -> int:
        return self._call(partial(self._memory.n_tokens, seq))

    def allocation(self, seq: int) -> Allocation:
        return self._call(partial(self._memory.allocation, seq))

    def owned(self, seq: int) -> tuple[list[int], list[int]]:
        return self._call(partial(self._memory.owned, seq))

    def add_rollback_point(self, seq: int, replace: bool = False) -> None:
        self._call(partial(self._memory.add_rollback_point, seq, replace))

    def truncate(self, seq: int, n_tokens: int) -> int:
        return self._call(partial(self._memory.truncate, seq, n_tokens))

    def checkpoint(self, seq: int, n_tokens: int | None = None) -> Checkpoint:
        # Made first: if an exception comes, it is dropped, and what it holds freed.
        kept = Checkpoint(self, self._memory.reserve())
        self._call(partial(self._memory.fork, seq, kept.seq, n_tokens))
        return kept

    def restore(self, seq: int, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for a checkpoint that is of another engine or was released."""
        self.check(checkpoint)
        self._call(partial(self._memory.restore, seq, checkpoint))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless a checkpoint is of this memory, and not released."""
        checks.instance(CheckpointError, "checkpoint", checkpoint, Checkpoint)
        if checkpoint.memory not in (self, self._memory):
            raise CheckpointError("expected a checkpoint of this engine, got another one's")
        _ = checkpoint.seq  # Raises if it was released.
