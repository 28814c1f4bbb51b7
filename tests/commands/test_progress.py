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
    """A completion whose prompt takes three steps; each ends when the bar has shown it."""

    def __init__(self, terminal: io.StringIO | None = None) -> None:
        self._terminal, self.progress = terminal, (0, 30)

    def wait_for_token(self) -> None:
        for n in (10, 20, 30):
            self.progress = n, 30
            self.wait_until_shown(f"| {n}/30 [")

    def wait_until_shown(self, text: str) -> None:
        end = time.monotonic() + 30
        while self._terminal and text not in self._terminal.getvalue():
            assert time.monotonic() < end, self._terminal.getvalue()
            time.sleep(0.01)


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
    terminal = Terminal()
    *_, last, end = shown(Slow(terminal), monkeypatch, terminal).split("\r")
    assert (last.strip(), end) == ("", "")


def test_a_short_prompt_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Slow(), monkeypatch, Terminal()) == ""


def test_nothing_is_shown_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    monkeypatch.setattr(progress, "_watch", lambda *_: pytest.fail("nobody looks"))
    assert shown(Slow(), monkeypatch, io.StringIO()) == ""


def test_the_bar_goes_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    terminal = Terminal()

    class Failing(Slow):
        def wait_for_token(self) -> None:
            self.wait_until_shown("prompt:   0%")
            raise KeyError

    with pytest.raises(KeyError):
        shown(Failing(terminal), monkeypatch, terminal)
    assert terminal.getvalue().endswith("\r")
