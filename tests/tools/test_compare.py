"""compare.py: turns, stops, crashes and distances, with a fake llama.cpp and with a real one.

The fake (tests/support/fakepeer) is a module on the PYTHONPATH of a script that serves as the
peer's Python; when it decodes, it runs code of the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.helpers import Result
from tools.compare import main
from tools.compare_process import Worker, WorkerFailure, WorkerMissing, alternate
from tools.compare_table import distance, ratio, speed_table, summary

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("-p", "24,16", "-n", "4", "-d", "0,12", "-r", "2", "-t", "1", "-ub", "16")
LOAD = {"model": "m", "backend": "auto", "n_ctx": 64, "n_ubatch": 16, "n_threads": 1}
# The states (R, S, T, …) of the processes with the same parent, by their ids.
STATES = """
def states():
    import os, pathlib
    found = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getppid():
            found[stat.parent.name] = fields[0]
    return found
"""
Peer = Callable[..., Path]


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    """peer(on_decode, load): a Python whose llama_cpp is the fake, which runs this code."""

    def make(on_decode: str = "pass", load: str = "return path", at_import: str = "") -> Path:
        folder = tmp_path / "peer"
        folder.mkdir()
        (folder / "fake_hook.py").write_text(
            f"{at_import}\n{STATES}\ndef load(path):\n    {load}\n\n"
            f"def on_decode(tokens, n_past):\n    {on_decode}\n"
        )
        return python_script(
            folder / "bin" / "python", f"{folder}:{ROOT / 'tests' / 'support' / 'fakepeer'}"
        )

    return make


def python_script(path: Path, python_path: str) -> Path:
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nPYTHONPATH={python_path} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[[Path], Worker]]:
    """workers(python): a started worker of that peer."""
    made: list[Worker] = []

    def make(python: Path) -> Worker:
        made.append(Worker("peer", python, tmp_path / f"{len(made)}.log", 30))
        made[-1].start()
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """run(*argv): compare.py's answer."""

    def call(*argv: object) -> Result:
        return Result.of(main, argv, capsys)

    return call


def test_they_take_turns_and_the_idle_one_is_stopped(
    peer: Peer, workers: Callable[[Path], Worker], tmp_path: Path
) -> None:
    log = tmp_path / "turns"
    python = peer(f"import os; print(os.getpid(), states(), sep='|', file=open({str(log)!r}, 'a'))")
    a, b = workers(python), workers(python)
    for worker in (a, b):
        worker.ask("load", **LOAD)
    alternate([a, b], {"do": "prompt", "tokens": [1, 2, 3]}, 3)
    turns = [line.split("|") for line in log.read_text().splitlines()]
    ids = [str(worker.process.pid) for worker in (a, b)]
    assert [pid for pid, _ in turns] == ids * 4
    for pid, states in turns:
        (other,) = set(ids) - {pid}
        seen = eval(states)
        assert (seen[pid], seen[other]) == ("R", "T")


def test_the_first_round_is_not_counted() -> None:
    class Answers:
        def __init__(self, *seconds: float) -> None:
            self.seconds = iter(seconds)

        def ask(self, do: str) -> dict[str, float]:
            if (s := next(self.seconds)) < 0:
                raise WorkerFailure("crashed")
            return {"seconds": s}

    workers: Any = [Answers(9, 1, 2, 3), Answers(9, 2, -1, -1)]
    assert alternate(workers, {"do": "x"}, 3) == [[1, 2, 3], [2]]


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    """Both are slow in the second round, so its ratio is like that of the others."""
    assert ratio([1, 10, 2], [2, 20, 3]) == 2
    assert ratio([1], []) is None
    result = summary(100, [1, 4, 2], "")
    assert (result["median"], result["min"], result["max"]) == (50, 25, 100)


def test_distance_by_hand() -> None:
    """A row with probabilities 1/2, 1/2 where the reference has 1/4, 3/4, and an equal row."""
    reference = np.log(np.array([[1, 3], [1, 1]], np.float32))
    logits = np.array([[5, 5], [0, 0]], np.float32)
    right = np.log(3)
    result = distance(logits, reference)
    assert result["nmse"] == pytest.approx((25 + (5 - right) ** 2) / right**2)
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert result["kl"] == pytest.approx(kl / 2)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e4, 0, -3e4]], np.float32)
    assert distance(logits, logits) == {"nmse": 0, "kl": 0}


def test_table_and_document(tiny: Path, peer: Peer, run: Callable[..., Result]) -> None:
    """Logits that are all 0 are as far from the reference as its own norm: their NMSE is 1."""
    python = peer()
    out = python.parent / "out.json"
    # The directory of a virtual environment is accepted too.
    options = (*SMALL, "--backend", "reference", "--json", out)
    status, text, err = run(tiny, "--peer-python", python.parent.parent, *options)
    assert (status, err) == (0, "")
    document = json.loads(out.read_text())
    (model,) = document["models"]
    assert model["failures"] == []
    assert model["peer"]["version"] == "llama-cpp-python 0.0.fake"
    assert [t["test"] for t in model["tests"]] == ["pp24", "pp16", "tg4", "tg4 @ d12"]
    for test in model["tests"]:
        for side in ("engine", "peer"):
            assert len(test[side]["tokens_per_s"]) == 2
        expected = ratio(test["engine"]["seconds"], test["peer"]["seconds"])
        assert test["ratio"] == expected
        assert any(
            line.split()[0] == tiny.stem and line.endswith(f"{expected:.2f}")
            for line in text.splitlines()
            if f" {test['test']} " in line
        )
    assert "flash attention, AVX9)" in text
    assert document["machine"]["read_bytes_per_s"] > 1e8
    prefill, steps = (model["accuracy"][way] for way in ("one prefill", "token by token"))
    assert prefill["engine"] == {"nmse": 0, "kl": 0}
    assert 0 <= steps["engine"]["nmse"] < 1e-8
    assert prefill["peer"] == steps["peer"]
    assert prefill["peer"]["nmse"] == 1
    assert prefill["peer"]["kl"] > 0


def test_both_get_the_same_tokens_and_the_depth_comes_back(
    tiny: Path, peer: Peer, run: Callable[..., Result], tmp_path: Path
) -> None:
    log = tmp_path / "fed"
    python = peer(f"print(n_past, *tokens, file=open({str(log)!r}, 'a'))")
    options = (*SMALL, "-d", "0,12,0", "--accuracy-tokens", 0)
    status, _, _ = run(tiny, "--peer-python", python, *options)
    assert status == 0
    fed = [line.split() for line in log.read_text().splitlines()]
    assert all(0 <= int(token) < 320 for _, *tokens in fed for token in tokens)
    # Three rounds each: a prompt in two chunks, one in one chunk, tokens after 0 and after 12.
    sizes = [(int(n_past), len(tokens)) for n_past, *tokens in fed]
    prompts, steps = [(0, 16), (16, 8)] * 3 + [(0, 16)] * 3, [(i, 1) for i in range(4)] * 3
    assert sizes == [*prompts, *steps, (0, 12), *[(12 + i, 1) for i, _ in steps], *steps]


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ({"on_decode": "import os; os.abort()"}, "crashed: SIGABRT"),
        ({"on_decode": "import sys; sys.exit('no\\tway')"}, "crashed: exit status 1, no?way"),
        ({"load": "return None"}, "failed: llama.cpp could not load the model"),
        ({"at_import": "import os; os.kill(os.getpid(), 4)"}, "crashed: SIGILL"),
    ],
)
def test_a_crash_is_shown_and_ours_still_measured(
    tiny: Path, peer: Peer, run: Callable[..., Result], hooks: dict[str, str], expected: str
) -> None:
    python = peer(**hooks)
    out = python.parent / "out.json"
    few = ("-p", 8, "-n", 2, "-r", 1, "-t", 1, "--accuracy-tokens", 4, "--json", out)
    status, text, err = run(tiny, "--peer-python", python, *few)
    assert (status, err) == (1, "")
    assert text.count(expected) == 4, text
    (model,) = json.loads(out.read_text())["models"]
    for test in model["tests"]:
        assert test["engine"]["median"] > 0
        assert test["peer"]["failure"].startswith(expected)
        assert test["ratio"] is None
    # Activations in int8.
    assert 0 < model["accuracy"]["one prefill"]["engine"]["nmse"] < 1e-2


def test_the_table_keeps_figures_of_rounds_before_a_crash() -> None:
    """The table shows the crash; the document has the rounds before it."""
    broken = summary(8, [1, 2], "crashed: SIGSEGV")
    assert broken["tokens_per_s"] == [8, 4]
    test = {"test": "pp8", "engine": summary(8, [1, 2, 4], ""), "peer": broken, "ratio": 1.0}
    table = speed_table([{"name": "m", "tests": [test]}])
    assert "4.0 (2.0–8.0)" in table
    assert "crashed: SIGSEGV" in table


def test_no_answer_in_time(peer: Peer, workers: Callable[[Path], Worker]) -> None:
    worker = workers(peer("import time; time.sleep(60)"))
    worker.ask("load", **LOAD)
    worker.timeout_s = 0.2
    for _ in range(2):
        with pytest.raises(WorkerFailure, match=r"^failed: no answer within 0\.2 s$"):
            worker.ask("prompt", tokens=[1])
    assert worker.process.returncode == -signal.SIGKILL


def test_a_worker_that_died_while_it_was_idle(
    peer: Peer, workers: Callable[[Path], Worker]
) -> None:
    worker = workers(peer())
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerFailure, match="crashed: SIGKILL"):
        worker.ask("load", **LOAD)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tiny: Path, peer: Peer, number: int) -> None:
    """Also the one of the two that is stopped then."""
    python = peer(
        "print(states(), file=open(__file__ + '.seen', 'w')); import time; time.sleep(60)"
    )
    seen = python.parent.parent / "fake_hook.py.seen"
    command = [sys.executable, ROOT / "tools" / "compare.py", tiny, "--peer-python", python, *SMALL]
    # A shell that runs the tests in the background may ignore SIGINT; children inherit that.
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(python.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        wait_until(lambda: seen.exists() and seen.read_text().endswith("\n"))
        process.send_signal(number)
        status = process.wait(20)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    states = eval(seen.read_text())
    assert sorted(states.values()) == ["R", "T"]
    if number != signal.SIGKILL:
        assert not list(python.parent.glob("compare-*"))
    wait_until(lambda: not any(is_alive(int(pid)) for pid in states))


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file"),
        ("directory", "a directory without bin/python"),
        ("#!/bin/sh\nexit 3", "a program that is none (crashed: exit status 3)"),
        ("#!/bin/sh\necho hello", "a program that is none (failed: its answer is none)"),
        ("not a program", "Exec format error"),
        (f"#!/bin/sh\nexec {sys.executable} -S $@", "ModuleNotFoundError: No module named"),
        (
            f"#!/bin/sh\nexec {sys.executable} $@",
            "ModuleNotFoundError: No module named 'llama_cpp'",
        ),
    ],
)
def test_a_peer_that_is_no_python_with_llama_cpp(
    tiny: Path, run: Callable[..., Result], tmp_path: Path, text: str | None, expected: str
) -> None:
    """One line, before anything is measured."""
    path = tmp_path / "python"
    if text == "directory":
        path.mkdir()
    elif text:
        program(path, text)
    line = run(tiny, "--peer-python", path, *SMALL).refused()
    assert line.startswith(f"{path}: expected a Python with llama_cpp, got {expected}"), line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-p", 0), "argument -p/--n-prompt: expected at least 1, got 0"),
        (("-p", "512,-1"), "argument -p/--n-prompt: expected at least 1, got -1"),
        (("-n", 0), "argument -n/--n-gen: expected at least 1, got 0"),
        (("-d", "x"), "argument -d/--n-depth: expected integers and commas"),
        (("-r", 0), "argument -r/--repetitions: expected at least 1, got 0"),
        (("-t", -2), "argument -t/--threads: expected at least 1, got -2"),
        (("-ub", 0), "argument -ub/--ubatch-size: expected at least 1, got 0"),
        (("--backend", "tpu"), "argument --backend: invalid choice"),
        (("--accuracy-tokens", -1), "argument --accuracy-tokens: expected at least 0, got -1"),
    ],
)
def test_wrong_options(
    tiny: Path, run: Callable[..., Result], options: tuple[object, ...], expected: str
) -> None:
    status, out, err = run(tiny, "--peer-python", sys.executable, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"compare.py: {expected}")


def test_files_that_are_not_there(
    tiny: Path, peer: Peer, run: Callable[..., Result], tmp_path: Path
) -> None:
    """They are errors before anything is measured, also if only the last model is missing."""
    python, missing = peer(), tmp_path / "missing.gguf"
    assert str(missing) in run(tiny, missing, "--peer-python", python, *SMALL).refused()
    nowhere = tmp_path / "no" / "where.json"
    line = run(tiny, "--peer-python", python, *SMALL, "--json", nowhere).refused()
    assert line == f"{nowhere}: No such file or directory"


def test_the_worker_names_a_missing_module(tmp_path: Path) -> None:
    worker = Worker("peer", sys.executable, tmp_path / "log", 30)
    with worker, pytest.raises(WorkerMissing, match="llama_cpp"):
        worker.start()
    assert worker.process.returncode is not None


def test_a_real_llama_cpp(
    request: pytest.FixtureRequest, models: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    """Both engines read the same model: llama.cpp's logits are near the reference's."""
    python = request.config.getoption("--peer-python")
    if python is None:
        pytest.skip("needs --peer-python PATH, a Python with llama-cpp-python")
    out = tmp_path / "out.json"
    status, text, err = run(
        models("tiny", "F32"),
        models("tiny", "Q8_0"),
        "--peer-python",
        python,
        *SMALL,
        "--json",
        out,
    )
    assert (status, err) == (0, ""), text
    for model in json.loads(out.read_text())["models"]:
        limits = (
            {"nmse": 1e-2, "kl": 1e-2} if "Q8_0" in model["name"] else {"nmse": 1e-4, "kl": 1e-4}
        )
        for way in ("one prefill", "token by token"):
            found = model["accuracy"][way]["peer"]
            assert all(0 < found[key] < limit for key, limit in limits.items()), (way, found)
