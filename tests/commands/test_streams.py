"""Standard streams that are closed, full, or broken pipes, with every command as a process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.commands.test_cli_process import COMMAND, ENV
from tests.support.helpers import without_summary
from tools.synth import write_model

# What each command writes to standard output, and none but plot-bench writes nothing there. MODEL,
# PROMPTS, TEXT and ROWS are files, PICTURE is to be one.
COMMANDS = {
    "run": "-m MODEL -p Once -n 3 -s 1",
    "prompts": "-m MODEL --prompts PROMPTS -n 3 -s 1",
    "chat": "-m MODEL -cnv -p Once -n 3 -s 1 --chat-template chatml",
    "graph": "graph -m MODEL",
    "tokenize": "tokenize -m MODEL -p Once",
    "perplexity": "perplexity -m MODEL -f TEXT -c 64",
    "sweep-bench": "sweep-bench -m MODEL -c 8 -ub 4 -n 1",
    "bench": "bench -m MODEL -p 4 -n 2 -r 1",
    "batched-bench": "batched-bench -m MODEL -npp 4 -ntg 2 -npl 1",
    "profile": "profile -m MODEL -n 1 --backend reference",
    "plot-bench": "plot-bench ROWS -o PICTURE",
    "help": "--help",
    "version": "--version",
}
SILENT = ("plot-bench",)
CLOSED, FULL = "Bad file descriptor", "No space left on device"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the files that COMMANDS name are."""
    folder = tmp_path_factory.mktemp("streams")
    paths = {name: folder / name for name in ("MODEL", "PROMPTS", "TEXT", "ROWS")}
    write_model(paths["MODEL"], "tiny", "Q8_0")
    paths["PROMPTS"].write_text("one\ntwo\nthree\n")
    paths["TEXT"].write_text("a text " * 40)
    row = {"n_kv": 0, "speed_pp": 5.0, "speed_tg": 2.0, "pp": 4, "tg": 1, "t_pp": 1.0, "t_tg": 0.5}
    paths["ROWS"].write_text(json.dumps(row) + "\n")
    return {name: str(path) for name, path in (paths | {"PICTURE": folder / "p.svg"}).items()}


def shell(files: dict[str, str], name: str, redirections: str) -> subprocess.CompletedProcess[str]:
    """Run a command of COMMANDS as a shell does, from an empty standard input."""
    argv = [files.get(word, word) for word in COMMANDS[name].split()]
    command = f"{shlex.join([*COMMAND, *argv])} {redirections}"
    return subprocess.run(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENV,
        timeout=60, check=False,
    )  # fmt: skip


def messages(err: str) -> list[str]:
    return without_summary(err).splitlines()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("redirection", "reason"), [(">&-", CLOSED), (">/dev/full", FULL)])
def test_an_output_that_cannot_be_written(
    files: dict[str, str], name: str, redirection: str, reason: str
) -> None:
    done = shell(files, name, redirection)
    expected = (0, []) if name in SILENT else (1, [f"error: standard output: {reason}"])
    assert (done.returncode, messages(done.stderr)) == expected


@pytest.fixture(scope="module")
def outputs(files: dict[str, str]) -> dict[str, str]:
    """What commands that measure nothing print."""
    return {name: shell(files, name, "").stdout for name in ("run", "prompts", "chat", "tokenize")}


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("help", "version")])
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_diagnostics_that_cannot_be_written(
    files: dict[str, str], outputs: dict[str, str], name: str, redirection: str
) -> None:
    """They are lost; standard output has what it has otherwise, and the model's file too."""
    before = Path(files["MODEL"]).read_bytes()
    done = shell(files, name, redirection)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == outputs.get(name, done.stdout)
    assert bool(done.stdout) == (name not in SILENT)
    for words in ("load time", "; context ", "chunks of"):
        assert words not in done.stdout
    assert Path(files["MODEL"]).read_bytes() == before


def test_only_results_can_be_written(files: dict[str, str]) -> None:
    lines = shell(files, "prompts", "<&- 2>&-").stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("redirections", "status"),
    [("--top-p 2 2>&-", 1), ("--top-p x 2>/dev/full", 2), ("--top-p x >&- 2>&-", 2),
     ("-v --top-p 2 2>/dev/full", 1)],
)  # fmt: skip
def test_errors_without_a_place_keep_their_status(
    files: dict[str, str], redirections: str, status: int
) -> None:
    done = shell(files, "run", redirections)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_broken_pipe_of_diagnostics(files: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, *(files.get(word, word) for word in COMMANDS["run"].split())]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=writing, env=ENV, timeout=60, check=False
    )
    os.close(writing)
    assert done.returncode == 0
    assert done.stdout.startswith(b"Once")


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        ("-m MODEL -n 3", 2, "cli.py: a prompt is needed: "),
        ("-m MODEL -f - -n 3", 1, "error: standard input: expected a text, got a closed stream"),
        ("-m MODEL -cnv --chat-template chatml", 0, ""),
        ("plot-bench - -o PICTURE", 1, "error: standard input: expected a text, got a closed"),
    ],
)
def test_an_input_that_is_closed(
    files: dict[str, str], command: str, status: int, line: str
) -> None:
    words: Sequence[str] = [files.get(word, word) for word in command.split()]
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join([*COMMAND, *words])} <&-"], capture_output=True, text=True,
        env=ENV, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (status, "")
    told = without_summary(done.stderr)
    assert told.startswith(line)
    assert told.count("\n") == bool(line)


def test_a_chat_whose_input_cannot_be_read(files: dict[str, str], tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        command = [*COMMAND, "-m", files["MODEL"], "-cnv", "--chat-template", "chatml"]
        done = subprocess.run(
            command, stdin=file, capture_output=True, text=True, env=ENV, timeout=60, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert messages(done.stderr) == [f"error: standard input: {CLOSED}"]
