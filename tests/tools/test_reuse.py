"""reuse.py: its scenarios on the demo model, and what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.engine import DEMO_MODEL
from tests.support.helpers import Result
from tools.reuse import SCENARIOS, Sizes, main, measure

SIZES = Sizes(n_turns=10, n_system=1600, n_message=24, n_answer=8)
SMALL = ("--turns", 10, "--system", 1000, "--message", 24, "-n", 8, "-t", 1)
REUSED = re.compile(r"reused (\d+) of (\d+) tokens")


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_turn_after_the_first_processes_less(name: str) -> None:
    kept, new = measure(DEMO_MODEL, name, SIZES, 0, 1)
    assert len(kept) == len(new) == {"eight": 16, "an": 4}.get(name.split()[0], 10)
    for i, (turn, other) in enumerate(zip(kept, new, strict=True)):
        n_reused, n_prompt = map(int, REUSED.match(turn.said).groups())  # type: ignore[union-attr]
        assert n_prompt == len(turn.ids)
        assert turn.n_processed == n_prompt - n_reused
        assert other.n_processed == len(other.ids)
        assert other.ids == turn.ids
        assert (turn.n_processed < other.n_processed) == (i > 0)
        assert len(turn.answer) == SIZES.n_answer
        assert min(turn.seconds, other.seconds) > 0


def test_the_same_seed_gives_the_same_texts() -> None:
    small = Sizes(n_turns=10, n_system=100, n_message=4, n_answer=4)
    name = "eight conversations in turns"
    first, again, other = (measure(DEMO_MODEL, name, small, seed, 1)[0] for seed in (0, 0, 1))
    assert [t.ids for t in first] == [t.ids for t in again] != [t.ids for t in other]


def test_tables(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    """With --peer-python PATH of pytest, llama.cpp's columns too."""
    python = request.config.getoption("--peer-python")
    status, out, err = Result.of(
        main, [*SMALL, *(["--peer-python", python] if python else [])], capsys
    )
    assert (status, err) == (0, "")
    assert re.findall(r"^an? .*|^eight .*", out, re.M) == list(SCENARIOS)
    assert out.startswith("demo.gguf; ")
    rows = [re.split(r" *\| *", line)[1:-1] for line in out.splitlines() if line[:1] == "|"]
    n_sides = 3 if python else 2
    assert {len(row) for row in rows} == {2 + 2 * n_sides}
    ratios = [row for row in rows if row[0] == "ratio"]
    assert len(ratios) == len(SCENARIOS)
    assert all(float(row[2]) > 1.5 for row in ratios)
    peers = [float(row[3]) for row in ratios] if python else []
    # It can't cut a state back, and processes all where thinking or tools change.
    assert [round(p, 2) == float(r[2]) for p, r in zip(peers, ratios, strict=False)] == (
        [False, True, False, False, True] if python else []
    )


def test_a_python_without_llama_cpp(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for path, got in ((tmp_path, "a directory without bin/python"),
                      (tmp_path / "none", "no such file")):  # fmt: skip
        status, _, err = Result.of(main, [*SMALL, "--peer-python", path], capsys)
        assert (status, err) == (
            1, f"error: {path}: expected a Python with llama_cpp, got {got}\n"
        )  # fmt: skip
