"""The one base class of everything a user can cause.

Whatever raises an `EngineError` says in one line what was expected and what came; the command
line prints that line and exits with status 1. Any other exception is a bug of ours.
"""

import mmap


class EngineError(Exception):
    """A mistake in the input (file, prompt, option), told in one line."""


class NotEnoughMemoryError(EngineError, MemoryError):
    """Memory, or threads, that the system does not give; the text says what to lower."""


def thread_refused(expected: str, reason: object) -> NotEnoughMemoryError:
    """The error of a system that starts fewer threads than `expected`, such as "2 threads"."""
    return NotEnoughMemoryError(
        f"expected {expected}, and the system refused one ({reason}): "
        "lower -t (n_threads), or raise ulimit -u or -v"
    )


def has_memory(n_bytes: int) -> bool:
    """Whether the system still gives so many bytes: Python and packages that lack memory hang,
    abort the process, or raise errors of any kind."""
    try:
        mmap.mmap(-1, n_bytes).close()
    except OSError:
        return False
    return True
