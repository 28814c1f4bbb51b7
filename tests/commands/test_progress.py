"""The bar that shows how much of a long prompt is processed."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from engine.commands import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Slow:
    """A completion whose prompt takes three steps."""

    def __init__(self, step_s: float) -> None:
        self._step_s, self.progress = step_s, (0, 30)

    def wait_for_token(self) -> None:
        while self.progress[0] < 30:
            self.progress = self.progress[0] + 10, 30
            time.sleep(self._step_s)


def shown(completion: Any, monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> str:
    """What stands on standard error when the first token is there."""
    monkeypatch.setattr("sys.stderr", stderr)
    with progress.prompt_bar(completion):
        completion.wait_for_token()
    return stderr.getvalue()


def test_a_long_prompt_is_shown_and_gone_before_its_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.1)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    seen = shown(Slow(0.4), monkeypatch, Terminal())
    # The first look comes within the first step, a later one within the last.
    assert "prompt:  33%" in seen
    assert "prompt: 100%" in seen
    *_, last, end = seen.split("\r")
    assert (last.strip(), end) == ("", "")


def test_a_short_prompt_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Slow(0.0), monkeypatch, Terminal()) == ""


def test_nothing_is_shown_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    assert shown(Slow(0.05), monkeypatch, io.StringIO()) == ""


def test_the_bar_goes_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    terminal = Terminal()

    class Failing(Slow):
        def wait_for_token(self) -> None:
            time.sleep(0.2)
            raise KeyError

    with pytest.raises(KeyError):
        shown(Failing(0.0), monkeypatch, terminal)
    assert "prompt:   0%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")
