"""Who may touch what all requests share: one thread at a time, and how the others wait.

`Owner.call` is the one door to scheduler, memory and programs. Who may not wait (a finalizer, a
signal handler, a thread that hands in a request) leaves a note, which whoever enters next reads.
An exception may come between any two statements inside, and leaves the door open: whoever enters
next then calls `settle` first. Without a thread of its own, a caller who needs a token runs the
steps; with one, callers wait for it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from engine import threads
from engine.errors import EngineError

T = TypeVar("T")
# How long a thread that waits for another one's step believes that it still runs.
_PATIENCE_S = 0.05
# How long a thread that runs step after step lets those in that wait at the door, at most.
_MAKE_WAY_S, _MAKE_WAY_TIMES = 50e-6, 20
_FORKED = (
    "this process was forked from the one that loaded the engine, whose threads and devices it "
    "doesn't have: load the engine here, or start processes by spawn"
)


class OwnerError(EngineError):
    """A call that can't be made here: from within a step, or after a fork."""


class Latch:
    """Something to wait for; `open` may be called anywhere, even in a signal handler."""

    def __init__(self) -> None:
        self._opened: SimpleQueue[None] = SimpleQueue()
        # Whether it is where news come from, and among those that would run a step.
        self.is_signalled = self.is_idle = False
        self.is_awaited = True

    def tell(self) -> None:
        """Open it for the news that a signal has."""
        self.is_signalled = False
        self.open()

    def open(self) -> None:
        """Let the one who waits go on."""
        self._opened.put(None)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it was opened since the last time; False if it was not in time."""
        try:
            self._opened.get(timeout=seconds)
            while not self._opened.empty():
                self._opened.get()
        except Empty:
            return False
        return True


class Signal:
    """Wakes those who wait for news of some requests. `ended`: the ones that ended, in order; one
    may be in it twice."""

    def __init__(self) -> None:
        self._wakes: deque[Callable[[], object]] = deque()
        self.ended: deque[Any] = deque()

    def add(self, wake: Callable[[], object]) -> None:
        """Call `wake` at the next news, from any thread."""
        self._wakes.append(wake)

    def notify(self) -> None:
        while self._wakes:
            # The event loop of the one who waited may be closed.
            with contextlib.suppress(RuntimeError):
                self._wakes[0]()
            self._wakes.popleft()


class Owner:
    """The door. `settle` makes everything right after an exception inside, and may itself be called
    again after one; `enter_thread` is called when another thread than before enters, `tidy`
    whenever one does, `after_fork` in a forked process."""

    def __init__(self) -> None:
        # The interpreter takes and leaves it in `with` without a gap for an exception.
        self._lock: Any = threading.RLock()
        self._notes: deque[Callable[[], object]] = deque()
        self._is_open = self._is_busy = False
        self._thread = threading.get_ident()
        # Threads at the door, and threads that would run a step once it is free.
        self._entering: dict[int, None] = {}
        self._idle: deque[Latch] = deque()
        self.settle: Callable[[], object] = lambda: None
        self.enter_thread: Callable[[], object] = lambda: None
        self.tidy: Callable[[], object] = lambda: None
        # Why nothing can be called any more; empty if all can.
        self.refusal = ""
        self.after_fork: Callable[[], object] = lambda: None
        self.stepper: threading.Thread | None = None
        self.work = Latch()
        _owners.add(self)

    def call(self, action: Callable[[], T]) -> T:
        """Do something inside. Raises OwnerError in the midst of this thread's own call."""
        self._refuse_within()
        me = threading.get_ident()
        self._entering[me] = None
        try:
            with self._lock:
                self._enter(me)
                result = action()
                self._is_open = self._is_busy = False
                return result
        finally:
            self._leave(me)

    def _refuse_within(self) -> None:
        if self._lock._is_owned():
            raise OwnerError(
                "the engine was called within its own step, by a signal handler or a finalizer: "
                "expected Completion.stop there, or a call from another thread"
            )

    def _enter(self, me: int) -> None:
        self._entering.pop(me, None)
        self.refuse()
        self._is_busy = True
        if self._is_open:
            self.settle()
        self._is_open = True
        if me != self._thread:
            self.enter_thread()
            self._thread = me
        while self._notes:
            # Only after it was followed: what a note asks for may be done twice, but not missed.
            self._notes[0]()
            self._notes.popleft()
        self.tidy()

    def _leave(self, me: int) -> None:
        self._entering.pop(me, None)
        self._is_busy = False
        while self._idle:
            latch = self._idle.popleft()
            latch.is_idle = False
            latch.open()
            if latch.is_awaited:
                return

    def note(self, action: Callable[[], object]) -> None:
        """Have something done by whoever enters next. It must bear to be done twice."""
        self._notes.append(action)
        if self.stepper is not None:
            self.work.open()

    def refuse(self) -> None:
        """Raise OwnerError if nothing can be called any more."""
        if self.refusal:
            raise OwnerError(self.refusal)

    def note_and_call(self, action: Callable[[], object]) -> None:
        """Have something done now; within this thread's own call, when that ends."""
        # The note stays until it was followed, whatever exception comes.
        self.note(action)
        if not self._lock._is_owned():
            self.call(lambda: None)

    def make_way(self) -> None:
        """Let those in who wait at the door: a lock alone would rarely give them a turn."""
        for _ in range(_MAKE_WAY_TIMES):
            if not self._entering:
                return
            time.sleep(_MAKE_WAY_S)

    def drive(self, loop: Steps) -> None:
        """Have a thread run the steps of a loop until it refuses, or nobody has it any more."""
        stepper = threading.Thread(
            target=_drive, args=(weakref.ref(loop), self.work), name="steps", daemon=True
        )
        weakref.finalize(loop, self.work.open)
        self.stepper = stepper
        threads.start(stepper, "a thread that runs the steps")

    def stop_driving(self) -> None:
        """Wait until the thread that runs the steps has ended."""
        stepper, self.stepper = self.stepper, None
        self.work.open()
        if stepper is not None and stepper.ident not in (None, threading.get_ident()):
            stepper.join()

    def leave_parent(self) -> None:
        """In a forked process: refuse everything. A thread of the parent may hold the lock."""
        self._lock, self.stepper, self.refusal = threading.RLock(), None, _FORKED
        self.after_fork()

    @property
    def is_driven(self) -> bool:
        """Whether a thread of its own runs the steps."""
        return self.stepper is not None and self.stepper.is_alive()

    def wait(
        self, signal: Signal, is_done: Callable[[], bool], advance: Callable[[], object]
    ) -> None:
        """Until `is_done`: run steps by `advance`, or wait for the thread that runs them."""
        latch, is_patient = Latch(), True
        while not is_done():
            self._refuse_within()
            if not self.is_driven and not (self._is_busy and is_patient):
                self.make_way()
                self.call(lambda: is_done() or advance())
                is_patient = True
                continue
            if not latch.is_signalled:
                latch.is_signalled = True
                signal.add(latch.tell)
            if not latch.is_idle:
                latch.is_idle = True
                self._idle.append(latch)
            if not is_done() and (self._is_busy or self.is_driven):
                # Who ran the step may have left it by an exception, and nobody be busy.
                is_patient = latch.wait(_PATIENCE_S)
        latch.is_awaited = False

    async def wait_async(self, signal: Signal, is_done: Callable[[], bool]) -> None:
        """As `wait`, in an event loop; a thread of its own must run the steps."""
        loop = asyncio.get_running_loop()
        while not is_done():
            news = asyncio.Event()
            signal.add(partial(loop.call_soon_threadsafe, news.set))
            if not is_done():
                await news.wait()


class Steps(Protocol):
    """The step loop, as the thread that drives it uses it."""

    owner: Owner

    def advance(self) -> bool: ...

    def fail(self, error: Exception) -> None: ...


def _drive(ref: weakref.ref[Steps], work: Latch) -> None:
    me = threading.current_thread()
    while (loop := ref()) is not None and loop.owner.stepper is me:
        is_busy = True
        try:
            is_busy = loop.advance()
        except Exception as error:
            loop.fail(error)
        loop.owner.make_way()
        del loop
        if not is_busy:
            work.wait()


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def _after_fork() -> None:
    for owner in list(_owners):
        owner.leave_parent()


@atexit.register
def _at_exit() -> None:
    # A thread within a kernel must not outlive what it works on.
    for owner in list(_owners):
        owner.stop_driving()


os.register_at_fork(after_in_child=_after_fork)
