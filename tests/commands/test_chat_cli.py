"""`cli.py -cnv`: its input and output, its errors, and Ctrl-C in a real process."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import ChatTemplate, Engine, SamplingParams
from engine.commands.chat import HELP, read_messages
from engine.text.template import BUILT_IN
from tests.commands.test_cli_process import COMMAND, ENV
from tests.support.chats import CHATML, QWEN35_STYLE
from tests.support.helpers import STD, Cli, without_summary
from tools.synth import write_model

GREEDY = ("-n", 6, "--temp", 0)
TURN = re.compile(
    r"\[turn (\d+): (\d+) tokens processed(?: \(.* tokens/s\))?; reused (\d+) of (\d+) tokens"
    r"(?: \((?:nothing known begins like it|the rest is new|diverged at (\d+), .*)\))?"
    r"; (\d+) generated.*\]"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a template."""
    overrides = {"tokenizer.chat_template": BUILT_IN["chatml"]}
    path = tmp_path_factory.mktemp("chat") / "m.gguf"
    return write_model(path, "tiny", "Q8_0", std=STD, overrides=overrides)


def answers(path: Path, *messages: str, system: str | None = None, **options: Any) -> list[str]:
    """The answers of `Engine.chat`, turn by turn."""
    params = SamplingParams(max_tokens=6, temperature=0)
    history = [] if system is None else [{"role": "system", "content": system}]
    with Engine.load(path) as engine:
        for message in messages:
            history.append({"role": "user", "content": message})
            answer = engine.chat(history, params, **options)
            for _ in answer:
                pass
            history.append({"role": "assistant", "content": answer.text})
    return [message["content"] for message in history if message["role"] == "assistant"]


def turns(err: str) -> list[tuple[int, ...]]:
    """(turn, processed, reused, of the prompt, diverged at or 0, generated) of each line."""
    matches = [TURN.fullmatch(line) for line in err.splitlines()]
    assert all(matches), err
    return [tuple(int(n or 0) for n in match.groups()) for match in matches if match]


def test_a_chat(cli: Cli, model: Path) -> None:
    result = cli("-m", model, "-cnv", *GREEDY, stdin="the cat\n\nand the hat é\n".encode())
    assert result.status == 0
    first, second = answers(model, "the cat", "and the hat é")
    assert result.out == f"{first}\n{second}\n"
    (_, n_first, reused, _, _, n), (turn, more, reused_then, all_then, left, _) = turns(result.err)
    assert (reused, turn, left) == (0, 2, 0)
    assert n_first + n - 1 <= reused_then <= n_first + n
    assert more + reused_then == all_then


def test_the_first_message_is_the_prompt(cli: Cli, model: Path, tmp_path: Path) -> None:
    first, second = answers(model, "a\nb", "c", system="Be\nbrief.")
    for prompt in (("-p", r"a\nb"), ("--no-escape", "-p", "a\nb")):
        system = r"Be\nbrief." if "--no-escape" not in prompt else "Be\nbrief."
        result = cli("-m", model, "-cnv", *prompt, "-sys", system, *GREEDY, stdin=b"c\n")
        assert result.out == f"{first}\n{second}\n"
    (tmp_path / "first").write_text("a\nb\n")
    result = cli("-m", model, "-cnv", "-f", tmp_path / "first", "-sys", r"Be\nbrief.", *GREEDY)
    assert result.out == f"{first}\n"


def test_a_prompt_alone_stays_a_completion(cli: Cli, model: Path) -> None:
    result = cli("-m", model, "-p", "the cat", *GREEDY)
    assert result.out.startswith("the cat")
    assert "turn" not in result.err


def test_commands(cli: Cli, model: Path) -> None:
    asked = b"the cat\n/stats\n/reset\n/stats\nthe cat\n/exit\nmore\n"
    result = cli("-m", model, "-cnv", "-sys", "x", *GREEDY, stdin=asked)
    (answer,) = answers(model, "the cat", system="x")
    # The same answer after /reset as at first.
    assert result.out == f"{answer}\n{answer}\n"
    first, stats_then, said, stats_now, last = result.err.splitlines()
    (_, n_prompt, *_, n_new), again = turns(f"{first}\n{last}")
    assert first.split("; ")[1] == (
        f"reused 0 of {n_prompt} tokens (nothing known begins like it)"
    )  # fmt: skip
    # What was said before is known, though the conversation is another one.
    assert again == (2, 0, n_prompt, n_prompt, 0, n_new)
    assert said == "the conversation is empty again; the system message stays"
    stats = (
        rf"\[1 turns: {n_prompt} tokens processed \(.*\); {n_new} generated \(.*\); "
        rf"{{}} of 4096 positions of the context used; prefix cache: \d+\.\d of \d+\.\d MiB "
        rf"\(states: (\d+), \d+\.\d MiB; tokens: (\d+), \d+\.\d MiB\); "
        rf"reused 0 of {n_prompt} tokens; states given up: 0\]"
    )
    held = re.fullmatch(stats.format(n_prompt + n_new), stats_then)
    assert held
    assert int(held[1]) >= 2
    assert n_prompt + n_new - int(held[2]) in (0, 1)  # The last token is in no state yet.
    assert re.fullmatch(stats.format(0), stats_now)


def test_words_that_begin_with_a_slash(cli: Cli, model: Path) -> None:
    """They are commands, but not a path, nor what comes after a space."""
    asked = b"/help\n/foo bar \n/Reset\n/clear\n/home/x\n /foo bar\n"
    result = cli("-m", model, "-cnv", *GREEDY, stdin=asked)
    told, unknown, other, cleared, *more = result.err.splitlines()
    assert told == HELP
    assert unknown == "unknown command /foo: /help lists them; to send it, begin with a space"
    assert other.startswith("unknown command /Reset: ")
    assert cleared == "the conversation is empty again"
    assert len(turns("\n".join(more))) == 2
    assert result.out == "".join(f"{text}\n" for text in answers(model, "/home/x", " /foo bar"))


@pytest.mark.parametrize(
    "option", [("-st",), ("-sys", "Be brief."), ("--chat-template", "chatml")], ids="".join
)
def test_an_option_of_chats_makes_it_one(cli: Cli, model: Path, option: tuple[str, ...]) -> None:
    """Also in a pipe."""
    run = ("-m", model, "-p", "the cat", *GREEDY, *option)
    assert cli(*run).out == cli(*run, "-cnv").out
    assert "[turn 1: " in cli(*run).err


def test_one_turn(cli: Cli, model: Path) -> None:
    (answer,) = answers(model, "the cat")
    for options, asked in ((("-p", "the cat"), b"more\n"), ((), b"/stats\nthe cat\nmore\n")):
        result = cli("-m", model, "-cnv", "-st", *options, *GREEDY, stdin=asked)
        assert (result.status, result.out) == (0, f"{answer}\n")
    # An error is the end then, also on a terminal.
    too_long = ("-m", model, "-cnv", "-st", "-c", 20, "-p", "a" * 30)
    assert cli(*too_long, stdin=None).refused().startswith("the prompt has ")


def test_a_system_message_from_a_file(cli: Cli, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "system"
    path.write_text("Be\\n brief.\n")
    result = cli("-m", model, "-cnv", "-sysf", path, "-p", "a", *GREEDY)
    assert result.out == f"{answers(model, 'a', system='Be' + chr(92) + 'n brief.')[0]}\n"
    line = cli("-m", tmp_path / "none", "-cnv", "-sysf", tmp_path, "-p", "a").refused()
    assert line == f"{tmp_path / 'none'}: No such file or directory"


def test_a_full_context_names_the_way_out(cli: Cli, model: Path, tmp_path: Path) -> None:
    """The line of an answer that fills it, and the error about a later message."""
    full = cli("-m", model, "-cnv", "-c", 40, "-n", -1, "--ignore-eos", "-p", "a")
    assert full.err.endswith(
        "(the context of 40 positions is full: /reset empties the conversation)]\n"
    )


def test_templates(cli: Cli, model: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(QWEN35_STYLE, "utf-8")
    for option, reasoning in (
        ((), None), (("-rea", "auto"), None), (("--reasoning",), True), (("-rea", "on"), True),
        (("--no-reasoning",), False), (("--reasoning", "off"), False),
    ):  # fmt: skip
        result = cli("-m", model, "-cnv", "--chat-template", template, *option, *GREEDY,
                     stdin=b"the cat\nmore\n")  # fmt: skip
        options: Any = {"template": ChatTemplate(QWEN35_STYLE), "reasoning": reasoning}
        assert result.out == "".join(f"{t}\n" for t in answers(model, "the cat", "more", **options))
        # The template drops thinking: a state from before it is the nearest.
        _, (_, processed, reused, n_prompt, left, _) = turns(result.err)
        assert 0 < reused < left < n_prompt == processed + reused
    named = cli("-m", model, "-cnv", "--chat-template-file", template, "-p", "the cat", *GREEDY)
    text = cli("-m", model, "-cnv", "--chat-template", QWEN35_STYLE, "-p", "the cat", *GREEDY)
    expected = answers(model, "the cat", template=ChatTemplate(QWEN35_STYLE))
    assert named.out == text.out == f"{expected[0]}\n"


def test_variables_of_a_template(cli: Cli, model: Path) -> None:
    source, given = "{{ style }}" + CHATML, {"style": "<|im_end|>", "unread": [None]}
    options: Any = {"template": ChatTemplate(source), "template_kwargs": given}
    said = ("--chat-template", source, "--chat-template-kwargs", json.dumps(given))
    result = cli("-m", model, "-p", "the cat", *said, *GREEDY)
    assert result.out == f"{answers(model, 'the cat', **options)[0]}\n"
    assert result.out != f"{answers(model, 'the cat', template=ChatTemplate(source))[0]}\n"
    line = cli("-m", model, "-cnv", "--chat-template-kwargs", '{"tools": 1}').refused()
    assert line.startswith("template_kwargs: expected names other than messages, tools, ")
    for text in ("{", "[1]", "5"):
        result = cli("-m", model, "--chat-template-kwargs", text)
        expected = f"argument --chat-template-kwargs: expected a JSON object, got '{text}'"
        assert result == (2, "", f"cli.py: {expected} (see cli.py --help)\n")


def test_a_model_without_a_template(cli: Cli, model: Path, tiny: Path) -> None:
    named = cli("-m", tiny, "-cnv", "--chat-template", "chatml", "-p", "the cat", *GREEDY)
    assert len(named.err.splitlines()) == 1
    assert named.out == f"{answers(model, 'the cat')[0]}\n"
    assert cli("-m", tiny, "-cnv", "-p", "the cat", *GREEDY).out == named.out


def test_a_terminal(cli: Cli, model: Path) -> None:
    """Help and the prompt go to standard error; after an error the chat continues."""
    result = cli("-m", model, "-cnv", "-c", 20, "-p", "a" * 30, *GREEDY, stdin=None)
    assert (result.status, result.out) == (0, "")
    error, told, prompt = result.err.splitlines()
    assert error.startswith("error: the prompt has ")
    assert "/reset" in told
    assert prompt == "> "


# Reading messages.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", []),
        ("\n \n\t\n", []),
        ("a\nb", ["a", "b"]),
        ("  a  \r\n", ["  a  "]),
        ("a \\\n  b\\\nc\nd\n", ["a \n  b\nc", "d"]),
        ("a\\\n", ["a"]),
        ("\\\n\\\n", []),
        ('"""a"""\nb\n', ["a", "b"]),
        ('"""\na\n\n  b\\\n"""\nc\n', ["a\n\n  b\\", "c"]),
        ('  """a\nb""" \nc\n', ["a\nb", "c"]),
        ('"""a\nb', ["a\nb"]),
        ('a """ b\n', ['a """ b']),
        ("/exit \\\nb\n", ["/exit \nb"]),
    ],
)
def test_messages(monkeypatch: pytest.MonkeyPatch, given: str, expected: list[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode()), "ascii"))
    assert list(read_messages()) == expected


# Errors.


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("-cnv", "--prompts", "x"), "argument -cnv: not allowed with argument --prompts"),
        (("-st", "--prompts", "x"),
         "argument --single-turn: not allowed with argument --prompts"),
        (("-sysf", "x", "--prompts", "x"),
         "argument --system-prompt-file: not allowed with argument --prompts"),
        (("-cnv", "-no-cnv", "-sys", "x"),
         "argument --system-prompt: not allowed with argument -no-cnv"),
        (("-no-cnv", "--chat-template", "x"),
         "argument --chat-template: not allowed with argument -no-cnv"),
        (("-no-cnv", "--no-reasoning", "-p", "a"),
         "argument --reasoning: not allowed with argument -no-cnv"),
        (("-cnv", "-sys", "x", "-sysf", "x"), "argument -sysf/--system-prompt-file: not allowed "
         "with argument -sys/--system-prompt"),
        (("-cnv", "-p", "a", "-f", "b"),
         "argument -f/--file: not allowed with argument -p/--prompt"),
    ],
)  # fmt: skip
def test_usage(cli: Cli, model: Path, options: tuple[object, ...], line: str) -> None:
    result = cli("-m", model, *options)
    assert result == (2, "", f"cli.py: {line} (see cli.py --help)\n")


def test_reasoning_is_on_off_or_auto(cli: Cli, model: Path) -> None:
    result = cli("-m", model, "-cnv", "-rea", "2")
    assert result.status == 2
    assert result.err.startswith("cli.py: argument -rea/--reasoning: invalid choice: '2' (choose ")


def test_templates_that_cannot_be_used(cli: Cli, model: Path, tmp_path: Path) -> None:
    def refused(source: str | None, *options: object) -> str:
        path = tmp_path / "t.jinja"
        if source is not None:
            path.write_text(source)
        more = ("--chat-template", path, "-p", "a", *options)
        line = cli("-m", model, "-cnv", *GREEDY, *more).refused()
        return line.removeprefix(f"chat template {path}: ")

    assert refused(None) == "expected a file or one of chatml (No such file or directory)"
    assert refused("{% for %}").startswith("line 1: ")
    unsafe = "{{ messages.__class__.__mro__ }}"
    assert refused(unsafe) == "access to attribute '__class__' of 'list' object is unsafe."
    assert refused("{{ raise_exception('two\nlines') }}") == "two lines"
    option = "takes no --reasoning off: it reads no enable_thinking"
    assert refused("a", "--no-reasoning").endswith(option)
    assert refused("") == "the prompt is empty: expected at least one token"


def test_a_bad_template_in_the_model(cli: Cli, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"tokenizer.chat_template": "{{ a b }}"}
    path = write_model(tmp_path / "m.gguf", "tiny", overrides=overrides)
    line = cli("-m", path, "-cnv", "-p", "a").refused()
    assert line.startswith(f"{path}: chat template: line 1: expected token")
    overrides = {"tokenizer.chat_template": 5}
    path = write_model(tmp_path / "n.gguf", "tiny", overrides=overrides)
    assert "expected a string" in cli("-m", path, "-cnv", "-p", "a").refused()


def test_messages_that_cannot_be_used(cli: Cli, model: Path) -> None:
    """If the input is not a terminal, the first error ends the chat."""
    line = cli("-m", model, "-cnv", stdin=b"a\xff\n").refused()
    assert line.startswith("standard input: expected UTF-8, got byte 0xff")
    line = cli("-m", model, "-cnv", "-c", 12, stdin=b"aaaaaaaaaa\nb\n").refused()
    assert line.startswith("the prompt has ")


# In a process.


class Running:
    """A chat in a process; only an interrupt ends its answers."""

    def __init__(self, *argv: object) -> None:
        command = [*COMMAND, *map(str, argv), "-cnv", "-n", "-1", "--ignore-eos", "--temp", "0"]
        # A shell that runs the tests in the background may ignore SIGINT; children inherit that.
        self.process = subprocess.Popen(
            command, bufsize=0, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def read(self, n: int) -> bytes:
        """At least so many bytes of the answer."""
        assert self.process.stdout is not None
        found = b""
        while len(found) < n:
            part = self.process.stdout.read(n - len(found))
            assert part
            found += part
        return found

    def line(self) -> str:
        """The next line on standard error after the summary."""
        assert self.process.stderr is not None
        text = ""
        while not text.endswith("\n"):
            part = self.process.stderr.read(1)
            assert part, text
            text = without_summary(text + part.decode())
        return text.removesuffix("\n")


@pytest.fixture
def start() -> Any:
    started: list[tuple[Running, threading.Timer]] = []

    def run(*argv: object) -> Running:
        running = Running(*argv)
        # A test that waits in vain then reads the end of the output.
        timer = threading.Timer(60, running.process.kill)
        timer.start()
        started.append((running, timer))
        return running

    yield run
    for running, timer in started:
        timer.cancel()
        running.process.kill()
        running.process.communicate()


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    model: Path, start: Callable[..., Running]
) -> None:
    chat = start("-m", model, "-c", 4096)
    n_before = 0
    for turn in (1, 2):
        chat.say(f"question {turn}\n")
        chat.read(30)
        chat.process.send_signal(signal.SIGINT)
        line = chat.line()
        assert line.endswith("; cancelled (by its user)]")
        ((number, processed, reused, n_prompt, left, generated),) = turns(line)
        # The text before the interrupt is history; none of it is processed again.
        assert (number, left) == (turn, 0)
        assert generated > 5
        assert reused >= n_before
        assert processed < 40
        n_before = n_prompt + generated - 2
    chat.say("/stats\n/exit\n")
    assert chat.line().startswith("[2 turns: ")
    out, err = chat.process.communicate(timeout=30)
    assert chat.process.returncode == 0
    assert out.endswith(b"\n")
    assert err == b""


def test_ctrl_c_while_nothing_is_answered_ends_the_chat(
    model: Path, start: Callable[..., Running]
) -> None:
    chat = start("-m", model, "-c", 64)
    chat.say("question\n")
    assert "the context of 64 positions is full" in chat.line()
    chat.process.send_signal(signal.SIGINT)
    assert chat.process.wait(30) == 130


def test_the_reader_of_the_answers_leaves(model: Path, start: Callable[..., Running]) -> None:
    chat = start("-m", model, "-c", 4096)
    chat.say("question\n")
    chat.read(10)
    assert chat.process.stdout is not None
    chat.process.stdout.close()
    assert chat.process.wait(30) == 1
    assert chat.process.stderr is not None
    assert without_summary(chat.process.stderr.read().decode()) == ""


def test_typing(model: Path) -> None:
    """On a terminal lines can be edited, and the end of the input ends the chat."""
    terminal, child = pty.openpty()
    command = [*COMMAND, "-m", str(model), "-cnv", "-n", "3", "--temp", "0"]
    with subprocess.Popen(
        command, env={**ENV, "TERM": "dumb"}, stdin=child, stdout=child, stderr=subprocess.PIPE
    ) as process:
        os.close(child)
        shown = b""

        def read_until(n_prompts: int) -> None:
            nonlocal shown
            while shown.count(b"> ") < n_prompts:
                assert select.select([terminal], [], [], 30)[0], shown
                shown += os.read(terminal, 1000)

        try:
            read_until(1)
            os.write(terminal, b"the catX\x7f\n")  # X is deleted again.
            read_until(2)
            os.write(terminal, b"\x04")  # Ctrl-D
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
            os.close(terminal)
    assert process.returncode == 0
    told, turn = [line for line in without_summary(err.decode()).splitlines() if line]
    assert told.startswith("/exit")
    assert turns(turn)[0][1] == len(prompt_ids(model, "the cat"))


def prompt_ids(path: Path, message: str) -> list[int]:
    with Engine.load(path) as engine:
        return engine.encode_chat([{"role": "user", "content": message}])
