"""Between the step loop's thread and the event loop: who may come in, and how tokens come out.

Worker threads read, render and tokenize requests and hand them to the engine, so that the event
loop never waits for that. The engine's thread wakes the event loop once a step, for all requests;
each answer then takes what is new of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from engine.engine import Engine
from engine.runtime.completion import Completion
from engine.runtime.owner import Signal
from engine.server.errors import ApiError
from engine.server.metrics import Metrics

T = TypeVar("T")
# Threads that read requests. A large one takes long; others pass it.
_N_WORKERS = 4
_TICK_S = 0.5
_RETRY_AFTER_S = 5


class Reply(Protocol):
    """The answer to one HTTP request, of one or several completions."""

    completions: list[Completion]
    streams: bool

    def news(self) -> list[bytes]:
        """Take what came since the last time; the events that it makes of a stream. Raises ApiError
        if a completion failed."""

    @property
    def is_done(self) -> bool:
        """Whether `news` has taken everything."""

    def last(self) -> list[bytes]:
        """The events at the end of a stream."""

    def whole(self) -> bytes:
        """The body of an answer that does not stream."""


class Call(Protocol):
    """A request that was read: it makes `n` completions."""

    n: int

    def start(self, engine: Engine) -> Reply:
        """Hand it to the engine. Raises EngineError."""


class Job:
    """A request that runs. `news` is set when there is something to send, `sent_at`: when something
    was sent last, `is_gone`: its client is."""

    def __init__(self, reply: Reply, n: int, metrics: Metrics, begun_at: float) -> None:
        self.reply, self.n, self._metrics = reply, n, metrics
        self.news = asyncio.Event()
        self.sent_at = time.monotonic()
        self.is_gone = self.is_cancelled = False
        # Of each completion: how many tokens were seen, and when.
        self._seen = [(0, begun_at) for _ in reply.completions]

    def measure(self) -> None:
        """Note when tokens came."""
        now = time.monotonic()
        for i, completion in enumerate(self.reply.completions):
            (n_before, before), n = self._seen[i], len(completion.tokens)
            if n > n_before:
                self._seen[i] = n, now
                self._metrics.generated.inc(n - n_before)
                if not n_before:
                    self._metrics.first.observe(now - before)
                else:
                    self._metrics.between.observe((now - before) / (n - n_before))

    def wake_for_news(self) -> None:
        if any(c.has_news for c in self.reply.completions):
            self.news.set()

    def stop(self) -> None:
        """End its completions before the next step; never waits."""
        for completion in self.reply.completions:
            completion.stop()

    def leave(self) -> None:
        """Its client is gone."""
        self.is_gone = True
        self.stop()
        self.news.set()


class _News(Signal):
    """Wakes an event loop, once until that has looked."""

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Callable[[], None]) -> None:
        super().__init__()
        self._loop, self._look, self._is_told = loop, look, False

    def notify(self) -> None:
        super().notify()
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(RuntimeError):  # The event loop is closed.
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._is_told = False
        self.ended.clear()
        self._look()


class Bridge:
    """Runs requests. max_queue: requests that may wait besides those that run; keep_alive_s: a
    stream that has nothing to send says so as often. To be made within the event loop."""

    def __init__(self, max_queue: int, keep_alive_s: float = 15.0) -> None:
        self._max_queue, self.keep_alive_s = max_queue, keep_alive_s
        self._engine: Engine | None = None
        self._workers = ThreadPoolExecutor(_N_WORKERS, "requests")
        self._jobs: dict[Job, None] = {}
        self._n_taken, self._lock = 0, threading.Lock()
        self.loop = asyncio.get_running_loop()
        self._news = _News(self.loop, self._look)
        self._ticker = self.loop.create_task(self._tick())
        self.refusal = ApiError("the model is being loaded", 503, code="loading", retry_after=1)
        self.metrics = Metrics()

    def attach(self, engine: Engine) -> None:
        """Begin to take requests."""
        engine.start()
        self.metrics.watch(engine, self)
        self._engine = engine

    @property
    def engine(self) -> Engine:
        """The engine. Raises ApiError before it is loaded, and when the server ends."""
        if self._engine is None:
            raise self.refusal
        return self._engine

    @property
    def n_taken(self) -> int:
        """Completions that wait or run, and requests that are read."""
        return self._n_taken

    @property
    def n_running(self) -> int:
        return 0 if self._engine is None else min(self._n_taken, self._engine.config.n_parallel)

    def take(self, n: int) -> None:
        """Take n places. Raises ApiError if there are not so many."""
        most = self.engine.config.n_parallel + self._max_queue
        with self._lock:
            if self._n_taken + n > most:
                raise ApiError(
                    f"expected at most {self._max_queue} waiting requests (--max-queue): "
                    "try again later",
                    503, "queue_full", _RETRY_AFTER_S,
                )  # fmt: skip
            self._n_taken += n

    def give_back(self, n: int) -> None:
        with self._lock:
            self._n_taken -= n

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Within it, a request has a place; `submit` takes those of further choices. If all goes
        well, the job has them afterwards."""
        self.take(1)
        try:
            yield
        except BaseException:
            self.give_back(1)
            raise

    async def run(self, work: Callable[[], T]) -> T:
        """Do something that takes time, in a worker thread."""
        return await self.loop.run_in_executor(self._workers, work)

    async def submit(self, read: Callable[[], Call]) -> Job:
        """Read a request, which has a place, and start it. Raises EngineError. `close` must
        follow."""

        def work() -> tuple[Reply, int]:
            call, engine = read(), self.engine
            most = engine.config.n_parallel + self._max_queue
            if call.n > most:
                raise ApiError(f"n: expected at most {most} choices here, got {call.n}")
            self.take(call.n - 1)
            try:
                return call.start(engine), call.n
            except BaseException:
                self.give_back(call.n - 1)
                raise

        begun_at = time.monotonic()
        reply, n = await self.run(work)
        job = Job(reply, n, self.metrics, begun_at)
        self._jobs[job] = None
        for completion in reply.completions:
            completion.tell(self._news)
        return job

    def close(self, job: Job) -> None:
        """Forget a job, and end what still runs of it."""
        if self._jobs.pop(job, self) is None:
            job.stop()
            self.give_back(job.n)
            for completion in job.reply.completions:
                self.metrics.count_end(completion)

    def _look(self) -> None:
        for job in self._jobs:
            job.wake_for_news()

    async def _tick(self) -> None:
        """Wake streams that have sent nothing for long."""
        while True:
            await asyncio.sleep(min(_TICK_S, self.keep_alive_s / 2))
            latest = time.monotonic() - self.keep_alive_s
            for job in self._jobs:
                if job.sent_at < latest:
                    job.news.set()

    def refuse(self) -> None:
        """Take no more requests: the server ends."""
        self.refusal = ApiError("the server ends", 503, code="shutting_down")
        self._engine = None

    def cancel_all(self) -> None:
        """End all that runs."""
        for job in list(self._jobs):
            job.is_cancelled = True
            job.stop()
            job.news.set()

    async def end(self) -> None:
        """Free what it has."""
        self.refuse()
        self.cancel_all()
        self._ticker.cancel()
        await asyncio.to_thread(self._workers.shutdown)
