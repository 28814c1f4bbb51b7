"""The command line as a process: exit status, real pipes, encodings, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.helpers import STD, without_summary
from tools.synth import write_model

ROOT = Path(__file__).resolve().parents[2]
# Warnings are errors: users should see none.
COMMAND = (sys.executable, "-W", "error", str(ROOT / "cli.py"))
# Output is buffered, as for users, also where the tests run unbuffered.
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run(*argv: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A command's process; `stderr`: without the summary."""
    command = [*COMMAND, *map(str, argv)]
    defaults: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "env": ENV,
        "timeout": 60,
    }
    options = defaults | options
    if "input" in options:
        del options["stdin"]
    done = subprocess.run(command, check=False, **options)
    if done.stderr:
        done.stderr = without_summary(done.stderr.decode()).encode()
    return done


def test_a_completion(tiny: Path) -> None:
    done = run("-m", tiny, "-p", "Once upon", "-n", 5, "--temp", 0)
    assert done.returncode == 0
    assert done.stdout.startswith(b"Once upon")
    assert done.stdout.endswith(b"\n")
    assert done.stdout.decode()
    assert len(done.stderr.splitlines()) == 4


def test_a_prompt_from_a_pipe(tiny: Path) -> None:
    done = run("tokenize", "-m", tiny, "--ids", input="é!\n".encode())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"[195, 169, 33]\n", b"")


def test_the_package_runs_as_the_command_line_does(tiny: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "engine"]
    for argv in (("tokenize", "-m", str(tiny), "-p", "ab"), ("-n", "x"), ("--help",)):
        done = subprocess.run(
            [*command, *argv], check=False, capture_output=True, cwd=ROOT, env=ENV
        )
        expected = run(*argv)
        assert done.returncode == expected.returncode
        called = f"{Path(sys.executable).name} -m engine".encode()
        assert done.stderr == expected.stderr.replace(b"cli.py", called)
        if argv == ("--help",):
            assert done.stdout.startswith(b"usage: " + called)
        else:
            assert done.stdout == expected.stdout


def test_errors_are_one_line_and_a_status(tiny: Path, tmp_path: Path) -> None:
    for argv, status, words in (
        (("-m", tmp_path / "none", "-p", "a"), 1, b"error: "),
        (("graph", "-m", tmp_path), 1, b"error: "),
        (("-m", tiny, "--temp", "x"), 2, b"cli.py: argument --temp: "),
    ):
        done = run(*argv)
        assert (done.returncode, done.stdout) == (status, b"")
        assert done.stderr.startswith(words)
        assert done.stderr.count(b"\n") == 1


def test_an_argument_that_is_not_utf8(tiny: Path) -> None:
    command: list[str | bytes] = [*map(str, COMMAND), "-m", str(tiny), "-p", b"a\xff"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    expected = "error: text cannot be encoded: lone surrogate '\\udcff' at character 1\n"
    assert without_summary(done.stderr.decode()) == expected


def test_an_output_without_unicode(tiny: Path) -> None:
    env = {**ENV, "PYTHONIOENCODING": "ascii"}
    done = run("-m", tiny, "-p", "né", "-n", 0, env=env)
    assert (done.returncode, done.stdout) == (0, b"n?\n")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    arrays = {"blk.1.ssm_norm.weight": np.full(16, value)}
    path = write_model(tmp_path / "m.gguf", "tiny", std=STD, arrays=arrays)
    done = run("-m", path, "-p", "a", "--no-display-prompt")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"error: non-finite values in the logits, sequence 0, position 0")
    assert done.stderr.count(b"\n") == 1


@pytest.fixture
def closed_pipe() -> Any:
    """The writing end of a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    "argv", [("-p", "a", "-n", "5"), ("graph",), ("graph", "--json"), ("tokenize", "-p", "a")]
)
def test_an_output_that_is_closed(tiny: Path, closed_pipe: int, argv: tuple[str, ...]) -> None:
    done = run(*argv, "-m", tiny, capture_output=False, stdout=closed_pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_output_that_is_closed_during_generation(tiny: Path) -> None:
    command = [*COMMAND, "-m", str(tiny), "-p", "Once", "-n", "-1", "-c", "4096", "--ignore-eos"]
    with subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.wait(30) == 1
        assert without_summary(process.stderr.read().decode()) == ""


# After the prompt's four bytes come the generated ones.
@pytest.mark.parametrize("n_read", [5, 60])
def test_interrupting_keeps_what_was_generated(tiny: Path, n_read: int) -> None:
    command = [*COMMAND, "-m", str(tiny), "-p", "Once", "-n", "-1", "-c", "4096", "--ignore-eos",
               "--temp", "0"]  # fmt: skip
    # Unbuffered, since `communicate` would not see what a buffer has read ahead.
    # A shell that runs the tests in the background may ignore SIGINT; children inherit that.
    with subprocess.Popen(
        command, bufsize=0, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = b""
        while len(first) < n_read:
            part = process.stdout.read(n_read - len(first))
            assert part
            first += part
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=30)
        assert time.perf_counter() - start < 5
    assert process.returncode == 130
    assert len(first + rest) > n_read
    text = (first + rest).decode()
    assert text.startswith("Once")
    assert text.endswith("\n")
    lines = without_summary(err.decode()).splitlines()
    names = [line.split(" time")[0].strip() for line in lines[:3]]
    assert names == ["load", "prompt eval", "eval"]
    assert lines[3].strip() == "ended : cancelled (by its user)"
