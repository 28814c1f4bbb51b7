"""`--session FILE`: runs that go on from each other, and what can't be read or written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.helpers import Cli

TEXT = ("--temp", 1, "--seed", 5, "--ignore-eos", "-no-cnv", "--no-display-prompt")
PROMPT = ("-p", "Once upon a time")


def processed(err: str) -> int:
    """Tokens of the prompt that steps had."""
    found = re.search(r"prompt eval time = .*? / +(\d+) tokens", err)
    return int(found[1]) if found else 0


def test_a_text_goes_on_as_if_it_had_not_ended(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "story.session"
    whole = cli("-m", tiny, *TEXT, *PROMPT, "-n", 24)
    first = cli("-m", tiny, *TEXT, *PROMPT, "-n", 9, "--session", file)
    second = cli("-m", tiny, *TEXT, "-n", 15, "--session", file)
    assert (first.status, second.status) == (0, 0)
    assert first.out.removesuffix("\n") + second.out == whole.out
    assert processed(second.err) == 1  # The last token that came is in no state yet.
    assert f"{file}: " in second.err


def test_a_prompt_goes_on_from_a_text(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "story.session"
    greedy = ("-m", tiny, "--temp", 0, "--ignore-eos", "-no-cnv", "--no-display-prompt", "-n", 8)
    first = cli(*greedy, *PROMPT, "--session", file)
    n_first = processed(first.err)
    second = cli(*greedy, "-p", " and then", "--session", file, "-v")
    n_new = processed(second.err) - 1
    assert n_new > 0
    assert f"reused {n_first + 7} of {n_first + 8 + n_new} tokens" in second.err


def test_a_chat_goes_on(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    chat = ("-m", tiny, "-cnv", "--chat-template", "chatml", "--temp", 0, "-n", 6)
    whole = cli(*chat, stdin=b"hello\nagain\n")
    first = cli(*chat, "--session", file, stdin=b"hello\n")
    second = cli(*chat, "--session", file, stdin=b"again\n")
    assert first.out + second.out == whole.out
    lines = [line for line in whole.err.splitlines() if line.startswith("[turn")]
    expected = re.search(r": (\d+) tokens processed.*; (reused \d+ of \d+ tokens)", lines[1])
    came = re.search(r"\[turn 1: (\d+) tokens processed.*; (reused \d+ of \d+ tokens)", second.err)
    assert expected is not None
    assert came is not None
    assert came.groups() == expected.groups()


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_file_that_can_t_be_written_is_said(
    cli: Cli, tiny: Path, tmp_path: Path, kind: str
) -> None:
    """The run goes on, and its answers are there."""
    file = tmp_path / "missing" / "x.session"
    options = ("-m", tiny, "-n", 3, "--temp", 0, "--session", file)
    if kind == "chat":
        result = cli(*options, "-cnv", "--chat-template", "chatml", stdin=b"a\nb\n")
    else:
        result = cli(*options, "-no-cnv", *PROMPT)
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    line = f"error: {file}: can't be written: No such file or directory"
    assert errors == [line] * (2 if kind == "chat" else 1)
    assert result.status == 0
    assert result.out.strip()


def test_files_that_are_no_session_of_it(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """They are left as they are."""
    file = tmp_path / "x.session"
    file.write_bytes(b"something else that somebody needs")
    result = cli("-m", tiny, "-no-cnv", *PROMPT, "--session", file)
    assert result.status == 1
    assert result.err.splitlines()[-1] == (
        f"error: {file}: expected a session, got no safetensors file"
    )
    assert file.read_bytes() == b"something else that somebody needs"

    file.unlink()
    assert cli("-m", tiny, "-no-cnv", *PROMPT, "-n", 2, "--session", file).status == 0
    before = file.read_bytes()
    chat = ("-m", tiny, "-cnv", "--chat-template", "chatml", "--session", file)
    result = cli(*chat, stdin=b"a\n")
    assert result.status == 1
    assert result.err.splitlines()[-1] == (
        f"error: {file}: expected the session of a chat, got that of a text"
    )
    assert file.read_bytes() == before


def test_another_system_message_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.session"
    chat = ("-m", tiny, "-cnv", "--chat-template", "chatml", "-n", 2, "--session", file)
    assert cli(*chat, "-sys", "Be brief.", stdin=b"a\n").status == 0
    assert cli(*chat, "-sys", "Be brief.", stdin=b"a\n").status == 0
    assert cli(*chat, stdin=b"a\n").status == 0
    result = cli(*chat, "-sys", "Be long.", stdin=b"a\n")
    assert result.status == 1
    assert result.err.splitlines()[-1] == (
        f"error: {file}: expected a session with this system message"
    )


def test_many_prompts_have_no_session(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    result = cli("-m", tiny, "--prompts", tmp_path / "x", "--session", tmp_path / "y")
    assert result.status == 2
    assert "argument --session: not allowed with argument --prompts" in result.err
