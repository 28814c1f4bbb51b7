"""Which chunks of which requests run in the next step.

Decode rows come first, then prefill chunks under the token budget, shared evenly among the prompts:
a short one is not kept waiting by a long one. Pieces end at multiples of 64 positions, so that a
prompt gives the same chunks however it is cut. A request is admitted when all the memory it may
ever need is free, in order of arrival; what is admitted never runs out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import ceil

from engine.graph import Capacity
from engine.kvcache.sequences import Checkpoint, SequenceMemory
from engine.runtime.batch import BLOCK_POSITIONS, Chunk, Logits
from engine.runtime.request import FinishReason, Request

CHUNK_MULTIPLE = BLOCK_POSITIONS


def cut(n_past: int, n_tokens: int, n_ubatch: int) -> Iterator[slice]:
    """Cut `n_tokens` that come after position `n_past` into chunks of at most `n_ubatch`.

    From a limit of 64 up, chunks end at multiples of 64 positions (except the last).
    """
    start = 0
    while start < n_tokens:
        end = n_past + start + n_ubatch
        if n_ubatch >= CHUNK_MULTIPLE:
            end -= end % CHUNK_MULTIPLE
        stop = min(end - n_past, n_tokens)
        yield slice(start, stop)
        start = stop


class Scheduler:
    """Requests waiting and running; at most `capacity.n_seqs` run at a time."""

    def __init__(
        self,
        memory: SequenceMemory,
        capacity: Capacity,
        reclaim: Callable[[], bool] = lambda: False,
    ) -> None:
        """`reclaim` gives back memory that is held for later, and says whether there was any."""
        self.memory, self._capacity, self._reclaim = memory, capacity, reclaim
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()
        self._prefill_turn = False

    def add(self, request: Request, after: Checkpoint | None = None) -> None:
        """Queue a request, which goes on from a checkpoint if there is one."""
        request.seq = self.memory.create()
        if after is not None:
            self.memory.restore(request.seq, after)
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a finished request out and free its memory."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
                if request.keep is not None:
                    request.keep(request, self.memory.checkpoint(request.seq))
                self.memory.free(request.seq)

    def schedule(self) -> list[tuple[Request, Chunk]]:
        """The chunks of the next step, each with its request; none if nothing can run."""
        self._admit()
        work = [(r, Chunk(r.seq, [r.tokens[-1]])) for r in self.running if not r.is_prefilling]
        first = next((r for r in self.running if r.is_prefilling), None)
        prefill = self._prefill_chunks(self._capacity.n_tokens - len(work))
        if work and first and all(r is not first for r, _ in prefill):
            # Its chunk doesn't fit beside the decode rows: the two kinds take turns.
            self._prefill_turn = not self._prefill_turn
            if self._prefill_turn:
                work, prefill = [], self._prefill_chunks(self._capacity.n_tokens)
        # Whoever got least is first the next time.
        got = {id(r): len(chunk.tokens) for r, chunk in prefill}
        self.running = deque(sorted(self.running, key=lambda r: got.get(id(r), 0)))
        return work + prefill

    def decoding(self) -> list[Request]:
        """All that runs, if the next step is a row of each; none if there are prompts to run."""
        self._admit()
        return [] if any(r.is_prefilling for r in self.running) else list(self.running)

    def _admit(self) -> None:
        """Start waiting requests, first come first served, as far as memory goes."""
        while self.waiting and len(self.running) < self._capacity.n_seqs:
            request = self.waiting[0]
            promised = sum(self._unclaimed_blocks(r) for r in self.running)
            blocks, slots = self.memory.blocks.n_free, self.memory.slots.n_free
            slots -= sum(map(self._unclaimed_slots, self.running))
            no_blocks = self._unclaimed_blocks(request) > blocks - promised
            if no_blocks or self._unclaimed_slots(request) > slots:
                if self.running:
                    return
                if not self._reclaim():
                    if request.mark_at:
                        request.mark_at = 0  # It can do without.
                    else:
                        self._refuse(self.waiting.popleft(), blocks, slots)
                continue
            self.running.append(self.waiting.popleft())

    def _refuse(self, request: Request, n_blocks: int, n_slots: int) -> None:
        """Nothing else runs and it still finds no room: something else holds the memory."""
        size = self._capacity.block_size
        self.memory.free(request.seq)
        request.finish(
            FinishReason.ERROR,
            f"it needs {request.limit} positions and a state slot: {n_blocks * size} positions and "
            f"{n_slots} slots are free, others are held (by checkpoints, say)",
        )

    def _unclaimed_slots(self, request: Request) -> int:
        """State slots that it will still take: with its first step, and for a mark."""
        first = 0 if request.n_done else self.memory.missing_slots(request.seq)
        return first + request.needs_slot

    def _unclaimed_blocks(self, request: Request) -> int:
        """Blocks that a request may still need; a partly filled one that it shares counts too."""
        size = self._capacity.block_size
        if not request.n_done:
            return ceil(request.limit / size) - request.n_past // size
        return ceil(request.limit / size) - ceil(self.memory.n_tokens(request.seq) / size)

    def _prefill_chunks(self, budget: int) -> list[tuple[Request, Chunk]]:
        prompts = [r for r in self.running if r.is_prefilling]
        ends = {id(r): r.position for r in prompts}
        growing = prompts
        while growing:
            grown = []
            for r in growing:
                end = self._next_end(ends[id(r)], r.chunk_limit, budget)
                budget -= end - ends[id(r)]
                if end > ends[id(r)]:
                    grown.append(r)
                ends[id(r)] = end
            growing = grown
        return [(r, _chunk(r, ends[id(r)])) for r in prompts if ends[id(r)] > r.position]

    def _next_end(self, done: int, last: int, budget: int) -> int:
        """Where the next quantum of a prompt ends: a multiple of 64 positions, or its own end."""
        if self._capacity.n_tokens < CHUNK_MULTIPLE:
            return min(done + 1, last) if budget else done
        end = min(done - done % CHUNK_MULTIPLE + CHUNK_MULTIPLE, last)
        return end if end - done <= budget else done


def _chunk(request: Request, end: int) -> Chunk:
    logits = Logits.LAST if end == request.prompt_end else Logits.NONE
    return Chunk(request.seq, request.ids[request.n_done : end - request.n_past], logits)
