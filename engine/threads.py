"""Threads of Python's: each starts, or is refused in one line."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from engine.errors import has_memory, thread_refused

_STACK_BYTES = 8 << 20  # The C library's, unless `ulimit -s` says otherwise.
_FIRST_CALLS_BYTES = 4 << 20  # Two arenas of Python's small objects, and as much again.


def start(thread: threading.Thread, expected: str) -> None:
    """Start a thread, or raise `NotEnoughMemoryError` that names what was expected."""
    with _starting(expected):
        thread.start()


@contextmanager
def pool(expected: str, n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that all run, or `NotEnoughMemoryError` that names what was expected."""
    with ThreadPoolExecutor(n_threads) as threads:
        all_run = threading.Event()
        try:
            for _ in range(n_threads):  # None is idle, so each task starts a thread.
                with _starting(expected):
                    threads.submit(all_run.wait)
        finally:
            all_run.set()
        yield threads


@contextmanager
def _starting(expected: str) -> Iterator[None]:
    """`Thread.start` waits for the thread to say that it runs: for ever, if that one finds no
    memory to say so. What it takes has to be there before."""
    if not has_memory(_STACK_BYTES + _FIRST_CALLS_BYTES):
        raise thread_refused(expected, os.strerror(errno.ENOMEM))
    try:
        yield
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        raise thread_refused(expected, error) from None
