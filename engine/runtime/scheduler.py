"""Which chunks of which requests run in the next step.

Decode rows come first, then prefill chunks, which share the rest of the token budget evenly. Chunks
end at multiples of 64 positions, so that the kernels' own chunks are the same however a prompt is
cut. Requests are admitted in order of arrival, each when all memory that it may ever need is free.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from math import ceil

from engine.graph import Capacity
from engine.kvcache.sequences import CheckpointError, SequenceError, SequenceMemory
from engine.runtime.batch import BLOCK_POSITIONS, Chunk, Logits
from engine.runtime.request import FinishReason, Request


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


class Scheduler:
    """Requests waiting and running; at most `capacity.n_seqs` run at a time.

    A request is in `live` from the time it is added until all that it held is free; `waiting` and
    `running` follow from that.
    """

    def __init__(
        self, memory: SequenceMemory, capacity: Capacity, reclaim: Callable[[], bool]
    ) -> None:
        """`reclaim` frees memory that is cached for later; False if there was none."""
        self.memory, self._capacity, self._reclaim = memory, capacity, reclaim
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

    def remove(self, request: Request) -> None:
        """Take a finished request out and free its memory; to do it twice changes nothing."""
        if request not in self.live:
            return
        on_finish, request.on_finish = request.on_finish, None
        if on_finish is not None:
            try:
                on_finish(request, self.memory.checkpoint(request.seq))
            except Exception as error:
                self.memory.recount()
                request.detail += f"; what came after it broke off: {error!r}"
        self.memory.free(request.seq)
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
        """Start waiting requests, in order of arrival, while their memory is free."""
        while self.waiting and len(self.running) < self._capacity.n_seqs:
            request = next(iter(self.waiting))
            if self._fits(request):
                request.is_admitted = True
                self.running.append(request)
                del self.waiting[request]
            elif self.running:
                return
            elif not self._reclaim():
                if request.rollback_at:
                    request.rollback_at = 0  # It can run without.
                else:
                    self._refuse(request)

    def _fits(self, request: Request) -> bool:
        """Whether all that it and the running requests may still take is free."""
        everything = [*self.running, request]
        n_blocks = sum(map(self._unclaimed_blocks, everything))
        n_slots = sum(map(self._unclaimed_slots, everything))
        return n_blocks <= self.memory.blocks.n_free and n_slots <= self.memory.slots.n_free

    def _refuse(self, request: Request) -> None:
        n_positions = self.memory.blocks.n_free * self._capacity.block_size
        detail = (
            f"it needs {request.limit} positions and a state slot: {n_positions} positions and "
            f"{self.memory.slots.n_free} slots are free, others are held (by checkpoints, say)"
        )
        request.finish(FinishReason.ERROR, detail)
        self.remove(request)

    def _unclaimed_slots(self, request: Request) -> int:
        """State slots that it will still take: with its first step, and for a rollback point."""
        first = 0 if request.n_done else self.memory.missing_slots(request.seq)
        return first + request.needs_slot

    def _unclaimed_blocks(self, request: Request) -> int:
        """Blocks that it may still take; a shared, partly filled one counts, as it is copied."""
        size, n_past = self._capacity.block_size, self.memory.n_tokens(request.seq)
        n_own = ceil(n_past / size) if request.n_done else request.n_past // size
        return ceil(request.limit / size) - n_own

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
