"""Which chunks of which requests run in the next step.

Decode rows come first, then prefill chunks, which share the rest of the token budget evenly. Chunks
end at multiples of 64 positions, so that the kernels' own chunks are the same however a prompt is
cut. Requests are admitted in order of arrival, each when all memory that it may ever need is free.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.graph import Capacity
from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Entry, Found
from engine.kvcache.policy import Kind, positions
from engine.kvcache.prefix import ID_BYTES, Node, n_common, packed
from engine.kvcache.sequences import CheckpointError, SequenceError, SequenceMemory
from engine.runtime.batch import BLOCK_POSITIONS, Chunk, Logits
from engine.runtime.request import FinishReason, Request
from engine.runtime.reuse import Reuse, Source


def cut(n_past: int, n_tokens: int, n_ubatch: int) -> Iterator[slice]:
    """Cut `n_tokens` that follow `n_past` positions into chunks of at most `n_ubatch`; with 64 or
    more, all but the last end at multiples of 64 positions."""
    start = 0
    while start < n_tokens:
        end = n_past + start + n_ubatch
        if n_ubatch >= BLOCK_POSITIONS:
            end -= end % BLOCK_POSITIONS
        stop = min(end - n_past, n_tokens)
        yield slice(start, stop)
        start = stop


# Waiting requests that are looked at in every step, beyond those that could run: some wait for the
# state of a prompt that runs, and those behind them need not.
_MOST_BEHIND = 16


class Further(Protocol):
    """Where more is kept than in memory."""

    def load(self, ids: bytes, n_kept: int) -> bool:
        """Bring more than `n_kept` of a prompt's ids into the cache; whether what is there may have
        changed."""

    def let_go(self) -> None:
        """Free the memory of what is on its way there."""


class Scheduler:
    """Requests waiting and running; at most `capacity.n_seqs` run at a time.

    A request is in `live` from the time it is added until all that it held is free; `waiting` and
    `running` follow from that.
    """

    def __init__(self, memory: SequenceMemory, capacity: Capacity, cache: PrefixCache) -> None:
        """`keeps_logits`: whether the host gets the logits of every prompt's last token."""
        self.memory, self.cache, self._capacity = memory, cache, capacity
        self.keeps_logits = True
        self.disk: Further | None = None
        self.live: dict[Request, None] = {}
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        self.running: list[Request] = []
        self._prefill_turn = self._turn_before = False

    def add(self, request: Request) -> None:
        """Queue a request, unless it has ended; to do it twice changes nothing."""
        if request in self.live:
            return
        if request.finish_reason:
            self._tell(request)
            return
        if request.seq < 0:
            request.seq = self.memory.reserve()
        if request.source is not None:
            request.stops = self._stops(request) | request.stops
        try:
            if request.after is None:
                self.memory.create(request.seq)
            else:
                self.memory.fork(request.after.seq, request.seq)
        except (CheckpointError, SequenceError) as error:
            request.finish(FinishReason.ERROR, "its checkpoint was released meanwhile", error)
            self._tell(request)
            return
        self.waiting[request] = None
        self.live[request] = None
        request.after = None

    def _stops(self, request: Request) -> dict[int, Kind]:
        """Positions at which states of a prompt are kept, whatever it says."""
        n = len(request.ids)
        stops = positions(n, self.cache.room.most_in_a_prompt)
        if not self.keeps_logits and (last := (n - 1) // BLOCK_POSITIONS * BLOCK_POSITIONS):
            stops[last] = Kind.PROMPT
        return stops

    def remove(self, request: Request) -> None:
        """Take a finished request out and free its memory; to do it twice changes nothing."""
        if request not in self.live:
            return
        source, request.source = request.source, None
        if request.finish_reason is FinishReason.ERROR:
            self.disown(request)
        elif source is not None:
            try:
                self.leave(request, source)
            except Exception as error:
                self.memory.recount()
                self.cache.settle()
                request.detail += f"; what came after it broke off: {error!r}"
        request.end_logits = None  # Users keep completions.
        self.memory.free(request.seq)
        self.cache.tidy()
        self.waiting.pop(request, None)
        if request in self.running:
            self.running.remove(request)
        self._tell(request)
        del self.live[request]

    def _tell(self, request: Request) -> None:
        """Tell those who wait that a request has ended; to do it twice changes nothing."""
        request.after = None
        request.signal.ended.append(request)
        request.signal.notify()

    def rebuild(self) -> None:
        """Make the queues right after an exception at any place: they follow from `live`."""
        for request in list(self.live):
            if request.finish_reason:
                self.remove(request)
        self.running = [r for r in self.live if r.is_admitted]
        self.waiting = OrderedDict((r, None) for r in self.live if not r.is_admitted)

    def schedule(self) -> list[tuple[Request, Chunk]]:
        """The chunks of the next step, each with its request; none if nothing can run."""
        self._turn_before = self._prefill_turn
        self._admit()
        if known := [r for r in self.running if r.has_known_logits]:
            return [(r, Chunk(r.seq, ())) for r in known]
        work = [(r, _decode_chunk(r)) for r in self.running if not r.is_prefilling and r.can_decode]
        first = next((r for r in self.running if r.is_prefilling), None)
        prefill = self._prefill_chunks(self._capacity.n_tokens - len(work))
        if work and first and all(r is not first for r, _ in prefill):
            # Its chunk doesn't fit beside the decode rows: the two kinds alternate.
            self._prefill_turn = not self._prefill_turn
            if self._prefill_turn:
                work, prefill = [], self._prefill_chunks(self._capacity.n_tokens)
        # Prompts that got the fewest tokens come first in the next step.
        n_given = {r: len(chunk.tokens) for r, chunk in prefill}
        self.running = sorted(self.running, key=lambda r: n_given.get(r, 0))
        return work + prefill

    def take_back(self) -> None:
        """The step that was scheduled last will not run: whose turn it was, it is."""
        self._prefill_turn = self._turn_before

    def _admit(self) -> None:
        """Start waiting requests, in order of arrival, while their memory is free. One that begins
        like a prompt that runs waits for the state that this one will leave."""
        for request in list(islice(self.waiting, self._capacity.n_seqs + _MOST_BEHIND)):
            if len(self.running) == self._capacity.n_seqs:
                return
            found = self._found(request)
            if self._is_coming(request, found.n_kept):
                continue
            if not self._fits(request, found):
                if self.running:
                    return
                if self.disk is not None:
                    self.disk.let_go()
                found = Found()
                if not self._fits(request, found):
                    self._refuse(request)
                    continue
                if request.source is not None:
                    request.source.reason = "what was known gave way to it: it needs the room"
            self._start(request, found)
            self.running.append(request)
            del self.waiting[request]

    def _found(self, request: Request) -> Found:
        """What the cache has of a prompt; of all of it only with the logits of its last token."""
        if request.source is None:
            return Found()
        n = len(request.ids)
        found = self.cache.match(request.packed, n)
        if not request.has_looked_further:
            request.has_looked_further = True
            if self.disk is not None and self.disk.load(request.packed, found.n_kept):
                found = self.cache.match(request.packed, n)
        has_all = found.node is not None and found.node.end == n
        if has_all and (not self.keeps_logits or found.logits is None):
            found = self.cache.match(request.packed, n - 1)
        return found

    def _is_coming(self, request: Request, n_kept: int) -> bool:
        """Whether a prompt that runs will leave a state that makes a difference to a request."""
        if request.source is None:
            return False
        for other in self.running:
            if other.source is not None and other.n_read < len(other.ids):
                longest = len(request.ids) - (not self.keeps_logits)
                n = min(n_common(other.packed, request.packed), longest)
                last = n - n % BLOCK_POSITIONS
                if last > other.position:
                    other.stops.setdefault(last, Kind.LEFT)
                ends = *other.stops, other.prompt_end if self.keeps_logits else 0
                # Also what a step in flight will leave.
                coming = max((at for at in ends if other.n_read < at <= n), default=0)
                if coming >= n_kept + BLOCK_POSITIONS:
                    return True
        return False

    def _start(self, request: Request, found: Found) -> None:
        """Give a request what it reuses. It may be done anew after an exception."""
        source, n_prompt = request.source, len(request.ids)
        if source is not None:
            entry = self.cache.use(found, request.seq)
            if entry is None:
                self.memory.create(request.seq)
            request.n_done = found.n_kept
            request.logits = entry.logits if entry and found.n_kept == n_prompt else None
            reason = source.reason or self._why_not_shared(request, found.n_known)
            request.reuse = Reuse(n_prompt, found.n_kept, found.n_known, reason)
            # Where it leaves a known path, the next may leave it, too.
            left = found.n_known - found.n_known % BLOCK_POSITIONS
            if found.n_kept < left < n_prompt:
                request.stops.setdefault(left, Kind.LEFT)
            self.cache.counts.add(n_prompt, found.n_kept)
        request.is_admitted = True

    def _why_not_shared(self, request: Request, n_known: int) -> str:
        """Why it does not wait for a prompt that runs and begins like it, if one does."""
        others = (r.packed for r in self.running if r.source is not None and r.is_prefilling)
        n = max((n_common(packed, request.packed) for packed in others), default=0)
        if n <= n_known:
            return ""
        return f"a prompt that runs has its first {n}, too: to wait for it would save less than 64"

    def keep(self, request: Request, logits: NDArray[np.float32] | None) -> None:
        """Keep the state after a chunk of a prompt, if it is wanted; `logits` [n_vocab] are those
        of the chunk's last token."""
        if request.source is None or not self.cache.room.budget:
            return
        n = self.memory.n_tokens(request.seq)
        kind = request.stops.get(n)
        if n == request.prompt_end and self.keeps_logits:
            kind = Kind.PROMPT
        if kind is not None:
            node = self.cache.keep(request.packed[: ID_BYTES * n], request.seq, kind, logits)
            request.entries += [] if node is None else [node]

    def disown(self, request: Request, zero: Callable[[int], None] | None = None) -> None:
        """Take out of the cache what a request left that ended by an error: it may be wrong. If its
        values were not finite, what it began with goes, too, and `zero(seq)` assigns zeros to what
        a sequence alone holds."""
        while request.entries:
            self._forget(request.entries[-1], zero)
            request.entries.pop()
        while zero is not None and (node := self.cache.match(request.packed).node) is not None:
            self._forget(node, zero)

    def _forget(self, node: Node[Entry], zero: Callable[[int], None] | None) -> None:
        if zero is not None and node.kept is not None and node.kept.seq in self.memory:
            zero(node.kept.seq)
        self.cache.forget(node)

    def leave(self, request: Request, source: Source) -> None:
        """Keep the state that a request has, and the texts that lead to it."""
        ids, n = request.packed + packed(request.tokens), self.memory.n_tokens(request.seq)
        is_whole = n >= request.prompt_end
        kind = Kind.ANSWER if is_whole and request.tokens else Kind.PROMPT
        self.cache.keep(ids[: ID_BYTES * n], request.seq, kind, request.end_logits)
        for n_characters, n_ids in (ends := (source.first_end, source.turn_end)):
            if 0 < n_ids <= n:
                begin = ids[: ID_BYTES * n_ids]
                self.cache.name(source.key[:n_characters], begin, ends)
        if source.key and is_whole:
            self.cache.name(source.key, request.packed, ends)
            # An answer without text must not be found where its prompt comes again.
            if answer := source.answer(request):
                self.cache.name(source.key + answer, ids, ends)

    def _fits(self, request: Request, found: Found) -> bool:
        """Whether all that it and the running requests may still take is free, or is the cache's,
        which then gives it up."""
        n_shared = request.n_past + found.n_shared
        n_blocks = self._n_blocks(request.limit) - n_shared // self._capacity.block_size
        return self.make_room(n_blocks, 1, found.node)

    def make_room(self, n_blocks: int, n_slots: int, spared: Node[Entry] | None = None) -> bool:
        """Have the cache give up what it must, but one entry, so that so much is free beyond what
        the running requests may still take; whether it is."""
        n_blocks += sum(map(self._unclaimed_blocks, self.running))
        n_slots += sum(map(self._unclaimed_slots, self.running))
        blocks, slots = self.memory.blocks, self.memory.slots
        return self.cache.make_room(
            lambda: n_blocks <= blocks.n_free and n_slots <= slots.n_free, spared
        )

    def _n_blocks(self, n_positions: int) -> int:
        return ceil(n_positions / self._capacity.block_size)

    def _refuse(self, request: Request) -> None:
        n_positions = self.memory.blocks.n_free * self._capacity.block_size
        detail = (
            f"it needs {request.limit} positions and a state slot: {n_positions} positions and "
            f"{self.memory.slots.n_free} slots are free, others are held (by checkpoints, say)"
        )
        request.finish(FinishReason.ERROR, detail)
        self.remove(request)

    def _unclaimed_slots(self, request: Request) -> int:
        """State slots that it will still take: one, with its first step."""
        return 0 if request.has_run else self.memory.missing_slots(request.seq)

    def _unclaimed_blocks(self, request: Request) -> int:
        """Blocks that it may still take; a shared, partly filled one counts, as it is copied."""
        n_past, size = self.memory.n_tokens(request.seq), self._capacity.block_size
        n_own = self._n_blocks(n_past) if request.has_run else n_past // size
        return self._n_blocks(request.limit) - n_own

    def _prefill_chunks(self, budget: int) -> list[tuple[Request, Chunk]]:
        """Chunks of at most `budget` tokens together; prompts take turns of 64 positions."""
        prompts = [r for r in self.running if r.is_prefilling]
        ends = {r: r.position for r in prompts}
        turns = deque(prompts)
        while turns:
            r = turns.popleft()
            end = self._next_end(ends[r], r.chunk_limit, budget)
            if end > ends[r]:
                budget -= end - ends[r]
                ends[r] = end
                turns.append(r)
        return [(r, _chunk(r, end)) for r, end in ends.items() if end > r.position]

    def _next_end(self, done: int, last: int, budget: int) -> int:
        """Where a prompt's next turn ends: at a multiple of 64 positions, or at `last`."""
        if self._capacity.n_tokens < BLOCK_POSITIONS:
            return min(done + 1, last) if budget else done
        end = min(done - done % BLOCK_POSITIONS + BLOCK_POSITIONS, last)
        return end if end - done <= budget else done


def _decode_chunk(request: Request) -> Chunk:
    # A token that is still to come is fed by the device.
    return Chunk(request.seq, request.tokens[-1:] or [0])


def _chunk(request: Request, end: int) -> Chunk:
    logits = Logits.LAST if end == request.prompt_end else Logits.NONE
    return Chunk(request.seq, request.ids[request.n_done : end - request.n_past], logits)
