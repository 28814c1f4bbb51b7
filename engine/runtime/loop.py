"""The step loop: which rows run next, the step that runs them, and the requests that get its rows.

All of it is behind one door (owner.py). A step is a record (step.py). It is in `_step` before it
touches memory and until its last row is delivered; a step that is launched ahead of its turn is in
`_ahead`. Whoever enters after an exception settles what is there: rows that were delivered keep
their token, the others' requests end with the reason `error`, and the step ahead never was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Array, Instruction, Timing
from engine.config import ConfigError
from engine.errors import EngineError
from engine.graph import Capacity, Live
from engine.kvcache.pool import MemoryFullError
from engine.runtime.batch import Batch, BatchError, Chunk, Logits, begin, check_fits, checked, pack
from engine.runtime.executor import DeviceRunner, Executable, HostRunner, Runner
from engine.runtime.finite import NonFiniteError
from engine.runtime.owner import Owner, Signal
from engine.runtime.request import FinishReason, Request
from engine.runtime.scheduler import Scheduler, cut
from engine.runtime.step import Outcome, Row, Step

_MASK_S = 1e-3


class StepLoop:
    """Runs steps on sequence memory; `check`: check every node's outputs for non-finite values."""

    def __init__(
        self,
        executable: Executable,
        scheduler: Scheduler,
        capacity: Capacity,
        check: bool,
        owner: Owner,
    ) -> None:
        self.scheduler, self.memory, self.owner = scheduler, scheduler.memory, owner
        self._executable: Executable | None = executable
        self._capacity = capacity
        self.n_vocab = executable.plan.graph.outputs["logits"].shape[1]
        self._host = HostRunner(executable, check)
        sampler = None if check else executable.device_sampler()
        self.runner: Runner = DeviceRunner(sampler) if sampler else self._host
        scheduler.keeps_logits = not self.runner.overlaps
        self._step: Step | None = None
        self._ahead: Step | None = None
        self._last_end = 0.0
        owner.settle, owner.tidy = self._settle, self.memory.free_dropped
        owner.enter_thread, owner.after_fork = executable.enter_thread, executable.after_fork

    @property
    def executable(self) -> Executable:
        """The compiled plan. Raises ConfigError after `close`, OwnerError after a fork."""
        self.owner.refuse()
        if self._executable is None:
            raise ConfigError("the engine is closed")
        return self._executable

    def check_usable(self) -> None:
        """Raise ConfigError after `close`, OwnerError after a fork."""
        _ = self.executable

    def close(self) -> Executable | None:
        """Wait for the step that runs, end all requests, and give the programs up."""
        executable = self.owner.call(self._close)
        self.owner.stop_driving()
        return executable

    def _close(self) -> Executable | None:
        self._drop_ahead()
        self._end_all("the engine is closed")
        executable, self._executable = self._executable, None
        self.owner.enter_thread = self.owner.after_fork = lambda: None
        # Runners hold what they run.
        vars(self).pop("runner", None)
        vars(self).pop("_host", None)
        return executable

    # Batches that a user makes.

    def _checked(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        return checked(chunks, self.n_vocab)

    def run(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.float32], dict[int, str]]:
        return self.owner.call(partial(self._run, self._checked(chunks)))

    def _run(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.float32], dict[int, str]]:
        with self._batch(chunks) as batch:
            logits, finite = self._host.run(batch, chunks)
        for i in finite.failures:
            self._wipe(chunks[i].seq)
        return logits, finite.failures

    def run_timed(self, chunks: Sequence[Chunk]) -> tuple[list[Timing], Live]:
        return self.owner.call(partial(self._run_timed, chunks))

    def _run_timed(self, chunks: Sequence[Chunk]) -> tuple[list[Timing], Live]:
        start = time.perf_counter()
        with self._batch(self._checked(chunks)) as batch:
            packing = Timing("", Instruction("pack batch", ()), time.perf_counter() - start)
            timings = [packing, *self.executable.run_timed(batch.inputs, batch.live)]
        rest = time.perf_counter() - start - sum(t.seconds for t in timings)
        return [*timings, Timing("", Instruction("everything else", ()), rest)], batch.live

    @contextlib.contextmanager
    def _batch(self, chunks: Sequence[Chunk]) -> Iterator[Batch]:
        """The inputs of a user's step, which is recorded while its body runs."""
        self.check_usable()
        for chunk in chunks:
            self.memory.allocation(chunk.seq)  # Raises SequenceError if it is not there.
        check_fits(chunks, self._capacity)
        self._drop_ahead()
        self._step = step = Step([Row(chunk) for chunk in chunks])
        try:
            batch = self._pack(step)
        except MemoryFullError:
            self._step = None
            raise
        step.is_launched = True
        yield batch
        self._finish(step)
        self._step = None

    def step(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        return self._finite_logits(self._checked(chunks))

    def _finite_logits(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """The logits of chunks that are checked. Raises NonFiniteError."""
        logits, failures = self.owner.call(partial(self._run, chunks))
        if failures:
            raise NonFiniteError("; ".join(failures.values()))
        return logits

    def kept(self) -> list[Array]:
        """Read the tensors that the graph keeps, as the last step left them: each layer's experts
        [T, n_used] i32, if the engine was loaded with keep_experts."""
        return self.owner.call(self.executable.kept)

    def prefill(self, seq: int, tokens: Sequence[int], logits: Logits) -> NDArray[np.float32]:
        (chunk,) = self._checked([Chunk(seq, tokens, logits)])
        tokens = chunk.tokens
        if not tokens:
            raise BatchError("expected at least one token, got none")
        most = self._capacity.n_outputs if logits is Logits.ALL else self._capacity.n_tokens
        n_past = self.owner.call(lambda: self.memory.n_tokens(seq))
        parts = list(cut(n_past, len(tokens), most))
        out = []
        for part in parts:
            wanted = Logits.NONE if logits is Logits.LAST and part != parts[-1] else logits
            out.append(self._finite_logits([Chunk(seq, tokens[part], wanted)]))
        return np.concatenate(out)

    # Requests.

    def add(self, request: Request) -> None:
        """Queue a request; never waits."""
        self.owner.note(partial(self.scheduler.add, request))

    def cancel(self, request: Request) -> None:
        """End a request now, after the step that runs."""
        self.owner.note_and_call(partial(self._end, request, request.cancel))

    def cancel_soon(self, request: Request) -> None:
        """End a request before the next step; never waits."""
        self.owner.note(partial(self._end, request, request.cancel))

    def _end(self, request: Request, finish: Callable[[], None]) -> None:
        finish()
        self.scheduler.remove(request)

    def _end_all(self, detail: str, cause: Exception | None = None) -> None:
        for request in list(self.scheduler.live):
            self._end(request, partial(request.finish, FinishReason.ERROR, detail, cause))

    def fail(self, error: Exception) -> None:
        """End all requests with an error of the loop itself, which no step is to blame for."""
        self.owner.call(partial(self._end_all, f"the step loop failed: {error!r}", error))

    def wait(self, signal: Signal, is_done: Callable[[], bool]) -> None:
        """Wait until `is_done`, which the `signal` may have news of; run the steps for it."""
        self.owner.wait(signal, is_done, self._advance)

    async def wait_async(self, signal: Signal, is_done: Callable[[], bool]) -> None:
        """As `wait`; a thread of its own runs the steps."""
        if not is_done():
            self.start()
        await self.owner.wait_async(signal, is_done)

    def start(self) -> None:
        """Run steps in a thread of its own from now on, until `close`."""
        if not self.owner.is_driven:
            self.owner.call(self._start)

    def _start(self) -> None:
        self.check_usable()
        if not self.owner.is_driven:
            self.owner.drive(self)

    def advance(self) -> bool:
        """Run one step of the requests that were added; False if there was nothing to do."""
        return self.owner.call(self._advance)

    def _advance(self) -> bool:
        self.check_usable()
        try:
            return self._run_step()
        except BaseException as error:
            # The next caller would settle as well. Other threads may be waiting: settle now.
            is_in_step = self._step is not None
            self._settle(error)
            if is_in_step and isinstance(error, Exception):
                return True  # Its requests have ended with it.
            raise

    def _run_step(self) -> bool:
        self._step, self._ahead = self._ahead, None
        if self._step is None or not self._step.live:
            self._step = None
            self._launch(None)
        step = self._step
        if step is None or step.outcomes is None:
            return self._wait_for_masks()
        self._finish(step)
        step.sample()
        if self.runner.overlaps:
            self._launch(step)
        outcomes = step.outcomes()
        # A step counts from the tokens before it, or from its launch if nothing ran.
        start, self._last_end = max(self._last_end, step.start), time.perf_counter()
        for row, outcome in zip(step.rows, outcomes, strict=True):
            self._deliver(row, outcome, self._last_end - start)
            row.is_delivered = True
        self._step = None
        # Once a step: many requests may have one signal.
        for signal in dict.fromkeys(row.request.signal for row in step.rows if row.request):
            signal.notify()
        return True

    def _wait_for_masks(self) -> bool:
        """Where nothing else runs, wait for a grammar's mask, but not so long that others would
        notice; False if nothing waits for one."""
        waiting = [r for r in self.scheduler.running if r.logits is not None]
        if waiting:
            waiting[0].wait_until_ready(_MASK_S)
        return bool(waiting)

    def _launch(self, before: Step | None) -> None:
        """Launch the step after `before`, which is in flight, if there is something to run, and
        memory for a step ahead."""
        scheduled = self.scheduler.schedule()
        rows = [Row(chunk, request) for request, chunk in scheduled]
        if not rows:
            return
        step = Step(rows)
        if before is None:
            self._step = step
        else:
            self._ahead = step
        if not rows[0].chunk.tokens:  # The logits of their last tokens are known.
            known = [Outcome(logits=request.logits) for request, _ in scheduled]
            for row in rows:
                row.take()
            step.outcomes = lambda: known
            return
        try:
            batch = self._pack(step, before)
        except MemoryFullError:
            if before is None:
                raise
            self._drop_ahead()
            return
        step.is_launched = True
        step.outcomes = self.runner.launch(batch, step, before)

    def _pack(self, step: Step, before: Step | None = None) -> Batch:
        """Give a recorded step its memory, or none of its rows: MemoryFullError."""
        for row in step.rows:
            row.take()
        chunks = [row.chunk for row in step.rows]
        while True:
            try:
                spans = begin(chunks, self.memory, preserve_state=before is not None)
                return pack(chunks, spans, self._capacity)
            except MemoryFullError:
                if not self.scheduler.cache.evict_one():
                    raise

    def _finish(self, step: Step) -> None:
        """Count a step's tokens in memory: what comes next is launched behind it."""
        for row in step.live:
            if row.chunk.tokens:
                self.memory.finish(row.chunk.seq, len(row.chunk.tokens))

    def _deliver(self, row: Row, outcome: Outcome, seconds: float) -> None:
        """Give a row to its request. What its own code raises ends the request alone."""
        request = row.request
        assert request is not None
        if request.finish_reason:
            return
        request.count_step(len(row.chunk.tokens), seconds, row.is_prompt)
        request.n_pending -= row.chunk.n_outputs
        if outcome.failure:
            self._wipe(request.seq)
            self.scheduler.disown(request, self._zero)
            request.finish(FinishReason.ERROR, outcome.failure)
        elif row.is_prompt:
            self.scheduler.keep(request, outcome.logits)
        try:
            if outcome.token is not None:
                request.accept_token(outcome.token)
            elif outcome.logits is not None and not outcome.failure:
                request.accept_logits(outcome.logits)
        except Exception as error:
            detail = str(error) if isinstance(error, EngineError) else repr(error)
            request.finish(FinishReason.ERROR, detail, error)
        if request.finish_reason:
            self.scheduler.remove(request)

    # After exceptions.

    def _settle(self, error: BaseException | None = None) -> None:
        """Make everything right after an exception at any place; it may break off, too."""
        self.memory.recount()
        self.scheduler.cache.settle()
        self._drop_ahead()
        if (step := self._step) is not None:
            reason = f"its step broke off: {error!r}" if error else "its step broke off"
            for row in step.live:
                if not row.is_delivered:
                    self._break_off(row, step, reason, error)
            self._step = None
        self.scheduler.rebuild()

    def _break_off(self, row: Row, step: Step, reason: str, error: BaseException | None) -> None:
        if row.request is not None:
            row.request.finish(FinishReason.ERROR, reason, error)
        if not step.is_launched:
            self.memory.cancel(row.chunk.seq)
        else:
            # States are updated in place: after a step that broke off they are undefined.
            with contextlib.suppress(Exception):  # The device may be what failed.
                self._zero(row.chunk.seq)
            self.memory.reset(row.chunk.seq)

    def _drop_ahead(self) -> None:
        """Undo the step that was launched ahead of its turn: it wrote nothing that is in use."""
        if self._ahead is not None:
            for row in self._ahead.live:
                row.give_back()
                self.memory.cancel(row.chunk.seq)
            for row in self._step.rows if self._step else ():
                if row.request is not None and not row.is_delivered:
                    row.request.n_pending = row.chunk.n_outputs
            self.scheduler.take_back()
        self._ahead = None

    def _wipe(self, seq: int) -> None:
        """Assign zeros to what a sequence alone holds (NaN · 0 is NaN) and empty it."""
        self._zero(seq)
        self.memory.reset(seq)

    def _zero(self, seq: int) -> None:
        slots, blocks = self.memory.owned(seq)
        for store in self.executable.stores:
            for slot in slots:
                store.zero("n_slots", slot)
            for block in blocks:
                store.zero("n_blocks", block)
