"""Overlapped decode steps (asynchronous scheduling): the device runs a step ahead of the host.

While the host handles a step's tokens, the device runs the next step, whose tokens it feeds itself.
Such a step writes a second state slot of each sequence, and positions after their last: cancelling
it undoes it. A request that ends frees its memory at once, even while a row of it still runs: the
device works in order, so a new owner's writes come after that row's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.backends.base import DeviceSampler, StepHandle
from engine.graph import Capacity
from engine.kvcache.pool import MemoryFullError
from engine.runtime.batch import Chunk, begin, pack
from engine.runtime.request import Request
from engine.runtime.scheduler import Scheduler


@dataclass(frozen=True)
class InFlightStep:
    """A launched step and its requests, row by row."""

    requests: list[Request]
    handle: StepHandle
    start: float

    @property
    def unfinished(self) -> list[Request]:
        return [r for r in self.requests if not r.finish_reason]


class OverlappedSteps:
    """Runs the steps in which every running request decodes, if the device can sample for all."""

    def __init__(self, device: DeviceSampler, scheduler: Scheduler, capacity: Capacity) -> None:
        self._device, self._scheduler = device, scheduler
        self._memory, self._capacity = scheduler.memory, capacity
        self._in_flight: InFlightStep | None = None
        self._last_ids_at = 0.0

    def step(self) -> list[tuple[Request, int]]:
        """Launch the next step, then wait for the tokens of the one in flight, -1 for non-finite
        logits; none if it can't run here."""
        step, self._in_flight = self._in_flight, None
        if step is None or not step.unfinished:
            step = self._launch(None)
        if step is None:
            return []
        for request in step.unfinished:
            self._memory.finish(request.seq, 1)
        self._in_flight = self._launch(step)
        ids = step.handle.ids()
        # A step counts from the tokens before it, or from its launch if the device was idle.
        start, self._last_ids_at = max(self._last_ids_at, step.start), time.perf_counter()
        for request in step.unfinished:
            request.count_step(1, self._last_ids_at - start)
        return [(r, i) for r, i in zip(step.requests, ids, strict=True) if not r.finish_reason]

    def _launch(self, before: InFlightStep | None) -> InFlightStep | None:
        """Launch the step after `before`, whose tokens are on the device; None if it can't."""
        start, ahead = time.perf_counter(), int(before is not None)
        requests = [r for r in self._scheduler.decoding() if r.can_continue(ahead)]
        specs = [spec for r in requests if (spec := r.sampler.sample_spec(ahead)) is not None]
        if not requests or len(specs) < len(requests):
            return None
        rows = {r: i for i, r in enumerate(before.requests)} if before else {}
        chunks = [Chunk(r.seq, r.tokens[-1:]) for r in requests]
        try:
            steps = begin(chunks, self._memory, preserve_state=before is not None)
        except MemoryFullError:
            return None
        batch = pack(chunks, steps, self._capacity)
        feed = [rows.get(r, -1) for r in requests]
        handle = self._device.launch(batch.inputs, batch.live, specs, feed)
        return InFlightStep(requests, handle, start)

    def cancel(self) -> None:
        """Undo the step in flight."""
        if self._in_flight is not None:
            for request in self._in_flight.unfinished:
                self._memory.cancel(request.seq)
        self._in_flight = None
