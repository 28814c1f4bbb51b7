"""Which chunks of which requests run in the next step.

Decode rows come first, then prefill chunks, which share the rest of the token budget evenly. Chunks
end at multiples of 64 positions, so that the kernels' own chunks are the same however a prompt is
cut. Requests are admitted in order of arrival, each when all memory that it may ever need is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import ceil

from engine.graph import Capacity
from engine.kvcache.sequences import Checkpoint, SequenceMemory
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
    """Requests waiting and running; at most `capacity.n_seqs` run at a time."""

    def __init__(
        self, memory: SequenceMemory, capacity: Capacity, reclaim: Callable[[], bool]
    ) -> None:
        """`reclaim` frees memory that is cached for later; False if there was none."""
        self.memory, self._capacity, self._reclaim = memory, capacity, reclaim
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()
        self._prefill_turn = False

    def add(self, request: Request, after: Checkpoint | None = None) -> None:
        """Queue a request, which continues from a checkpoint if there is one."""
        request.seq = self.memory.create()
        if after is not None:
            self.memory.restore(request.seq, after)
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a finished request out and free its memory."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
                if request.on_finish is not None:
                    request.on_finish(request, self.memory.checkpoint(request.seq))
                self.memory.free(request.seq)

    def schedule(self) -> list[tuple[Request, Chunk]]:
        """The chunks of the next step, each with its request; none if nothing can run."""
        self._admit()
        work = [(r, Chunk(r.seq, [r.tokens[-1]])) for r in self.running if not r.is_prefilling]
        first = next((r for r in self.running if r.is_prefilling), None)
        prefill = self._prefill_chunks(self._capacity.n_tokens - len(work))
        if work and first and all(r is not first for r, _ in prefill):
            # Its chunk doesn't fit beside the decode rows: the two kinds alternate.
            self._prefill_turn = not self._prefill_turn
            if self._prefill_turn:
                work, prefill = [], self._prefill_chunks(self._capacity.n_tokens)
        # Prompts that got the fewest tokens come first in the next step.
        n_given = {r: len(chunk.tokens) for r, chunk in prefill}
        self.running = deque(sorted(self.running, key=lambda r: n_given.get(r, 0)))
        return work + prefill

    def decoding(self) -> list[Request]:
        """All running requests if each of them decodes; none if a prompt is being processed."""
        self._admit()
        return [] if any(r.is_prefilling for r in self.running) else list(self.running)

    def _admit(self) -> None:
        """Start waiting requests, in order of arrival, while their memory is free."""
        while self.waiting and len(self.running) < self._capacity.n_seqs:
            request = self.waiting[0]
            if self._fits(request):
                self.running.append(self.waiting.popleft())
            elif self.running:
                return
            elif not self._reclaim():
                if request.rollback_at:
                    request.rollback_at = 0  # It can run without.
                else:
                    self._refuse(self.waiting.popleft())

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
        self.memory.free(request.seq)
        request.finish(FinishReason.ERROR, detail)

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


def _chunk(request: Request, end: int) -> Chunk:
    logits = Logits.LAST if end == request.prompt_end else Logits.NONE
    return Chunk(request.seq, request.ids[request.n_done : end - request.n_past], logits)
