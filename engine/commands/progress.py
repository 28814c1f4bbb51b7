"""A progress bar for a prompt that takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from engine import threads
from engine.runtime.completion import Completion

AFTER_S, EVERY_S = 1.0, 0.1


@contextlib.contextmanager
def prompt_bar(completion: Completion) -> Iterator[None]:
    """Show on a terminal's standard error how much of a prompt is processed, if the first token
    takes more than AFTER_S seconds; at the end nothing of it is left."""
    has_come = threading.Event()
    # A thread: the steps run in this one, and one step may take long.
    watcher = threading.Thread(target=_watch, args=(completion, has_come), daemon=True)
    is_shown = sys.stderr is not None and sys.stderr.isatty()
    if is_shown:
        threads.start(watcher, "a thread that shows the progress")
    try:
        yield
    finally:
        has_come.set()
        if is_shown:
            watcher.join()


def _watch(completion: Completion, has_come: threading.Event) -> None:
    if has_come.wait(AFTER_S):
        return
    n_done, n_tokens = completion.progress
    # miniters: else a quick step makes tqdm wait for as many tokens again.
    how: Any = {"desc": "prompt", "unit": "token", "leave": False, "miniters": 1}
    with tqdm(total=n_tokens, initial=n_done, **how) as bar:
        while not has_come.wait(EVERY_S):
            bar.update(completion.progress[0] - bar.n)
