"""How tools begin and end: a line on what runs where, and one line for an error."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from engine.bench.facts import cpu_name

Main = Callable[[list[str] | None], int]


def heading(model: Path, n_threads: int) -> str:
    """The model, the machine, and how busy it was before."""
    return (
        f"{model.name}; {cpu_name() or 'unknown CPU'}, threads: {n_threads}; "
        f"load average before: {os.getloadavg()[0]:.1f}"
    )


def ends_in_one_line(*errors: type[Exception]) -> Callable[[Main], Callable[..., int]]:
    """A command line whose exit status is 1 after such an error, which gets one line, and 130 after
    Ctrl-C."""

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv)
            except errors as error:
                print("error:", *str(error).splitlines(), file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                return 130

        return run

    return decorate
