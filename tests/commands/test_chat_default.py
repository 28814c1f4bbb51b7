"""Chat as the default: on a terminal, with a chat template, in real processes."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.text.template import BUILT_IN
from tests.commands.test_cli_process import COMMAND, ENV
from tests.support.helpers import STD, without_summary
from tools.synth import write_model

SHORT = ("-n", "3", "--temp", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a template."""
    overrides = {"tokenizer.chat_template": BUILT_IN["chatml"]}
    path = tmp_path_factory.mktemp("chat") / "m.gguf"
    return write_model(path, "tiny", "Q8_0", std=STD, overrides=overrides)


def on_a_terminal(
    *argv: object, typed: Sequence[str] = (), stdout: int | None = None
) -> tuple[int, str, str]:
    """(status, terminal, standard error) of a process; a text is typed after each `> `."""
    terminal, child = pty.openpty()
    command = [*COMMAND, *map(str, argv)]
    out, env = child if stdout is None else stdout, {**ENV, "TERM": "dumb"}
    with subprocess.Popen(
        command, env=env, stdin=child, stdout=out, stderr=subprocess.PIPE
    ) as process:
        os.close(child)
        shown, n_typed, end = b"", 0, time.monotonic() + 60
        try:
            while time.monotonic() < end:
                if select.select([terminal], [], [], 0.1)[0]:
                    try:
                        part = os.read(terminal, 1000)
                    except OSError:  # The other end is closed.
                        break
                    shown += part
                if n_typed < len(typed) and shown.count(b"> ") > n_typed:
                    os.write(terminal, typed[n_typed].encode())
                    n_typed += 1
                if stdout is not None and process.poll() is not None:
                    break
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
            os.close(terminal)
    return process.returncode, shown.decode().replace("\r\n", "\n"), without_summary(err.decode())


def test_a_terminal_chats(model: Path) -> None:
    status, shown, err = on_a_terminal("-m", model, *SHORT, typed=["the cat\n", "/exit\n"])
    assert status == 0
    assert shown.startswith("> the cat\n")
    assert "[turn 1: " in err
    assert err.startswith("/exit")


def test_a_prompt_is_the_first_message(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("the cat")
    for source in (("-p", "the cat"), ("-f", tmp_path / "prompt")):
        status, shown, err = on_a_terminal("-m", model, *source, "-st", *SHORT)
        assert status == 0
        assert not shown.startswith("the cat")
        assert err.startswith("[turn 1: ")
        assert err.count("\n") == 1


def test_what_completes_raw_text(model: Path, tiny: Path, tmp_path: Path) -> None:
    """-no-cnv; a model without a template; an output or an input that is no terminal."""
    prompt = ("-p", "the cat", *SHORT)
    for chosen in (("-m", model, "-no-cnv"), ("-m", tiny)):
        status, shown, err = on_a_terminal(*chosen, *prompt)
        assert status == 0
        assert shown.startswith("the cat")
        assert "eval time" in err
    path = tmp_path / "out"
    with path.open("wb") as file:
        status, _, _ = on_a_terminal("-m", model, *prompt, stdout=file.fileno())
    assert status == 0
    assert path.read_text().startswith("the cat")
    piped = subprocess.run(
        [*COMMAND, "-m", str(model), *SHORT],
        input=b"the cat",
        capture_output=True,
        env=ENV,
        check=True,
    )
    assert piped.stdout.startswith(b"the cat")


def test_options_of_a_chat_on_a_terminal(model: Path, tiny: Path) -> None:
    """They need no -cnv where a chat is the default; a named template makes it so."""
    for argv in (("-m", model, "-sys", "x"), ("-m", tiny, "--chat-template", "chatml")):
        status, _, err = on_a_terminal(*argv, "-p", "a", "-st", *SHORT)
        assert status == 0
        assert "[turn 1: " in err
    status, shown, err = on_a_terminal("-m", model, "-no-cnv", "-sys", "x", "-p", "a")
    line = "argument --system-prompt: not allowed with argument -no-cnv"
    assert (status, shown, err) == (2, "", f"cli.py: {line} (see cli.py --help)\n")


def test_after_an_error_the_way_out_is_named(model: Path) -> None:
    """A message that finds no room in the context: the earlier ones do not have to stay."""
    typed = ["the cat\n", "a" * 30 + "\n", "/reset\n", "the cat\n", "/exit\n"]
    status, _, err = on_a_terminal("-m", model, *SHORT, "-c", 40, typed=typed)
    assert status == 0
    _, first, error, reset, again = err.splitlines()
    assert error.startswith("error: the prompt has ")
    assert error.endswith(" (-c); /reset empties the conversation")
    assert reset == "the conversation is empty again"
    assert (first[:8], again[:8]) == ("[turn 1:", "[turn 2:")
