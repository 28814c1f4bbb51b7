"""The standard streams of a command, also where they are closed, full, or a pipe that broke.

What can't be written to standard error is lost. What can't be written to standard output is an
OSError whose `filename` is that stream. Closed streams keep their numbers, so that no file or
library that is opened later gets them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

_NAMES = ("standard input", "standard output", "standard error")


class _Stream:
    """A text stream for output; `flush` raises again what `write` raised, if it may raise."""

    def __init__(self, number: int, stream: Any) -> None:
        self._number = number
        self._error: OSError | None = None
        # A file of its own where there is none: the number may be another file's by now.
        self._stream = stream or os.fdopen(_null(number), "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)
        if self._error is not None:
            raise self._error

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if self._number == 2:
                return
            error.filename = _NAMES[self._number]
            self._error = self._error or error
            raise

    def end(self) -> None:
        """Write what is left; what can't be written is not tried again when Python exits."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _null(number: int) -> int:
    """A file that is empty, and that refuses to be written to as standard output."""
    return os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Within it, sys.stdout and sys.stderr are as the module says; a closed stdin stays None."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _null(number)  # It gets the lowest number that is free.
    given = sys.stdout, sys.stderr
    out, err = streams = _Stream(1, sys.stdout), _Stream(2, sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        out.end()
        err.end()
        sys.stdout, sys.stderr = given
