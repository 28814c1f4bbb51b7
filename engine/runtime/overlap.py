"""Decode steps that run ahead: while the host deals with a step's tokens, the next one runs.

A step ahead continues with tokens that the host hasn't seen yet. It leaves the memory of its
sequences as it was, in that it writes slots of its own: so whoever looks between steps sees what
belongs to the tokens that came, and a step that turns out to be unwanted is as if it had never
been. A request that ends by one of these tokens takes its memory back at once; as devices work in
order, whoever gets it next writes after the step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.backends.base import DeviceSampler, StepHandle
from engine.graph import Capacity
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.sequences import SequenceMemory
from engine.runtime.batch import Chunk, begin, pack
from engine.runtime.request import Request
from engine.runtime.scheduler import Scheduler


@dataclass(frozen=True)
class InFlightStep:
    """A step that was launched, and its requests row by row."""

    requests: list[Request]
    ticket: StepHandle
    start: float

    @property
    def running(self) -> list[Request]:
        """Those that have not ended since."""
        return [r for r in self.requests if not r.finish_reason]


class OverlappedSteps:
    """Makes the steps that are a row of every running request, if a device can draw them all."""

    def __init__(
        self,
        decoder: DeviceSampler,
        scheduler: Scheduler,
        memory: SequenceMemory,
        capacity: Capacity,
    ) -> None:
        self._decoder, self._scheduler = decoder, scheduler
        self._memory, self._capacity = memory, capacity
        self._flight: InFlightStep | None = None
        self._collected = 0.0

    def step(self) -> list[tuple[Request, int]]:
        """Finish a step, and have the next one launched before.

        Returns a token for each request, -1 where logits are not finite; nothing if the next step
        is not to be made here.
        """
        flight, self._flight = self._flight, None
        if flight is None or not flight.running:
            flight = self._launch(None)
        if flight is None:
            return []
        for request in flight.running:
            self._memory.finish(request.seq, 1)
        self._flight = self._launch(flight)
        ids = flight.ticket.ids()
        # The time between tokens, or since there was something to do.
        start, self._collected = max(self._collected, flight.start), time.perf_counter()
        for request in flight.running:
            request.count(1, self._collected - start)
        return [(r, i) for r, i in zip(flight.requests, ids, strict=True) if not r.finish_reason]

    def _launch(self, before: InFlightStep | None) -> InFlightStep | None:
        """Launch the next step, which follows one whose tokens have not come, or None."""
        start, ahead = time.perf_counter(), int(before is not None)
        requests = [r for r in self._scheduler.decoding() if r.goes_on(ahead)]
        draws = [draw for r in requests if (draw := r.draw(ahead)) is not None]
        if not requests or len(draws) < len(requests):
            return None
        rows = {id(r): i for i, r in enumerate(before.requests)} if before else {}
        chunks = [Chunk(r.seq, r.tokens[-1:]) for r in requests]
        try:
            steps = begin(chunks, self._memory, keep=before is not None)
        except MemoryFullError:
            return None
        batch = pack(chunks, steps, self._capacity)
        feed = [rows.get(id(r), -1) for r in requests]
        ticket = self._decoder.launch(batch.inputs, batch.live, draws, feed)
        return InFlightStep(requests, ticket, start)

    def drop(self) -> None:
        """Undo the step that runs ahead."""
        if self._flight is not None:
            for request in self._flight.running:
                self._memory.cancel(request.seq)
        self._flight = None
