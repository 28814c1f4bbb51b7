"""One step: which chunks run, the batch that runs them, and the requests that get its rows.

A step packs the scheduler's chunks into one batch, runs it and hands every request its row of
logits. `Completion` and `Engine.generate_batch` repeat it. Where a device can sample, decode steps
overlap with the host's work (overlap.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Instruction, Timing
from engine.config import ConfigError
from engine.graph import Capacity, Live
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import Batch, Chunk, Logits, begin, check_fits, pack
from engine.runtime.executor import Executable
from engine.runtime.finite import FiniteCheck, NonFiniteError, failure
from engine.runtime.overlap import OverlappedSteps
from engine.runtime.request import FinishReason, Request
from engine.runtime.scheduler import Scheduler, cut
from engine.sampling.params import SamplingError


class StepLoop:
    """Runs steps on sequence memory; `check`: check every node's outputs for non-finite values."""

    def __init__(
        self, executable: Executable, scheduler: Scheduler, capacity: Capacity, check: bool
    ) -> None:
        self.scheduler, self.memory = scheduler, scheduler.memory
        self._executable: Executable | None = executable
        self._capacity, self._check = capacity, check
        self.overlap: OverlappedSteps | None = None
        if not check and (sampler := executable.device_sampler()):
            self.overlap = OverlappedSteps(sampler, scheduler, capacity)

    @property
    def executable(self) -> Executable:
        """What runs the steps. Raises ConfigError after `close`."""
        if self._executable is None:
            raise ConfigError("the engine is closed")
        return self._executable

    def close(self) -> Executable | None:
        """Cancel the step in flight and give the programs up; no step can be run after it."""
        self._drop()
        executable, self._executable, self.overlap = self._executable, None, None
        return executable

    def _drop(self) -> None:
        if self.overlap is not None:
            self.overlap.cancel()

    def run(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.float32], dict[int, str]]:
        with self._batch(chunks) as batch:
            finite = FiniteCheck(batch, [chunk.seq for chunk in chunks])
            watch = finite.watch if self._check else None
            logits = self.executable.run(batch.inputs, batch.live, watch)["logits"]
        finite.check("the logits", logits, True)
        for i in finite.failures:
            self._wipe(chunks[i].seq)
        return np.asarray(logits, np.float32), finite.failures

    def run_timed(self, chunks: Sequence[Chunk]) -> tuple[list[Timing], Live]:
        start = time.perf_counter()
        with self._batch(chunks) as batch:
            packing = Timing("", Instruction("pack batch", ()), time.perf_counter() - start)
            timings = [packing, *self.executable.run_timed(batch.inputs, batch.live)]
        rest = time.perf_counter() - start - sum(t.seconds for t in timings)
        return [*timings, Timing("", Instruction("everything else", ()), rest)], batch.live

    @contextmanager
    def _batch(self, chunks: Sequence[Chunk]) -> Iterator[Batch]:
        """The inputs of a step. On an exception the memory of its sequences is reset."""
        check_fits(chunks, self._capacity)
        self._drop()
        steps = begin(chunks, self.memory)
        try:
            yield pack(chunks, steps, self._capacity)
        except BaseException:
            # States are updated in place: after a step that broke off they are undefined.
            for chunk in chunks:
                self.memory.reset(chunk.seq)
            raise
        for chunk in chunks:
            self.memory.finish(chunk.seq, len(chunk.tokens))

    def _wipe(self, seq: int) -> None:
        """Assign zeros to what a sequence alone holds (NaN · 0 is NaN) and empty it."""
        slots, blocks = self.memory.owned(seq)
        for store in self.executable.stores:
            for slot in slots:
                store.zero("n_slots", slot)
            for block in blocks:
                store.zero("n_blocks", block)
        self.memory.reset(seq)

    def step(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        logits, failures = self.run(chunks)
        if failures:
            raise NonFiniteError("; ".join(failures.values()))
        return logits

    def prefill(self, seq: int, tokens: Sequence[int], logits: Logits) -> NDArray[np.float32]:
        most = self._capacity.n_outputs if logits is Logits.ALL else self._capacity.n_tokens
        parts = list(cut(self.memory.n_tokens(seq), len(tokens), most))
        out = []
        for part in parts:
            wanted = Logits.NONE if logits is Logits.LAST and part != parts[-1] else logits
            out.append(self.step([Chunk(seq, tokens[part], wanted)]))
        return np.concatenate(out)

    def add(self, request: Request, after: Checkpoint | None = None) -> None:
        self.scheduler.add(request, after)

    def cancel(self, request: Request) -> None:
        request.finish(FinishReason.CANCELLED, "by its user")
        self.scheduler.remove(request)

    def advance(self) -> bool:
        """Run one step of the requests that were added; False if there was nothing to do."""
        if self._advance_overlapped():
            return True
        work = self.scheduler.schedule()
        if not work:
            return False
        start = time.perf_counter()
        with self._ending([request for request, _ in work]):
            logits, failures = self.run([chunk for _, chunk in work])
        seconds = time.perf_counter() - start
        rows = iter(logits)
        for i, (request, chunk) in enumerate(work):
            row = next(rows) if chunk.n_outputs else None
            request.count_step(len(chunk.tokens), seconds)
            if request.is_at_rollback:
                self.memory.add_rollback_point(request.seq, replace=True)
            if i in failures:
                request.finish(FinishReason.ERROR, failures[i])
            elif row is not None:
                try:
                    request.accept_logits(row)
                except SamplingError as error:
                    request.finish(FinishReason.ERROR, str(error))
            if request.finish_reason:
                self.scheduler.remove(request)
        return True

    def _advance_overlapped(self) -> bool:
        """As `advance`, by a step whose tokens the device samples; False if it can't be one."""
        if self.overlap is None:
            return False
        with self._ending(r for r in self.scheduler.running if not r.is_prefilling):
            work = self.overlap.step()
            for request, token in work:
                if token >= 0:
                    request.accept_token(token)
                else:
                    position = self.memory.n_tokens(request.seq) - 1
                    self._wipe(request.seq)
                    detail = failure("the logits", request.seq, position)
                    request.finish(FinishReason.ERROR, detail)
                if request.finish_reason:
                    self.scheduler.remove(request)
        return bool(work)

    @contextmanager
    def _ending(self, requests: Iterable[Request]) -> Iterator[None]:
        """An exception inside ends these requests."""
        try:
            yield
        except BaseException as error:
            for request in list(requests):
                # Its memory may be half written: nothing may continue from it.
                self.memory.reset(request.seq)
                if isinstance(error, KeyboardInterrupt):
                    self.cancel(request)
                else:
                    request.finish(FinishReason.ERROR, f"its step broke off: {error!r}")
                    self.scheduler.remove(request)
            raise
