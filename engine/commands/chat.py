"""A conversation in the terminal or through pipes, with the state kept between turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from engine.checks import shown
from engine.commands.options import InputError, Parser, load_engine, read_text, unescaped
from engine.commands.output import write
from engine.commands.progress import prompt_bar
from engine.commands.session import SessionFile
from engine.commands.summary import cache_line
from engine.engine import Engine
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason
from engine.runtime.requests import PromptError
from engine.sampling.params import SamplingParams
from engine.text.template import (
    TEMPLATE_KEY,
    ChatError,
    ChatTemplate,
    check_variables,
    find_template,
)

_QUOTES = '"""'
HELP = (
    '/exit, /reset, /stats, /help; a line that ends in \\ goes on; """ begins and ends a block of '
    "lines; Ctrl-C stops an answer"
)
_ADVICE = "/reset empties the conversation"
_SWITCH: dict[str, bool | None] = {
    **dict.fromkeys(("on", "enabled", "true", "1"), True),
    **dict.fromkeys(("off", "disabled", "false", "0"), False),
    **dict.fromkeys(("auto", "-1")),
}
_ONLY_IN_A_CHAT = ("system_prompt", "system_prompt_file", "single_turn")
# For the chats in a file of prompts, too.
FOR_A_TEMPLATE = ("chat_template", "chat_template_kwargs", "reasoning")


def add_options(p: Parser) -> None:
    group = p.add_argument_group("chat")
    add = group.add_argument
    add("-cnv", "--conversation", action="store_true", default=None,
        help="chat: read messages from standard input; -p or -f is the first one (the default "
        "with an option below, and on a terminal if the model has a chat template)")  # fmt: skip
    add("-no-cnv", "--no-conversation", dest="conversation", action="store_false", default=None,
        help="complete the prompt as it is")  # fmt: skip
    add("-st", "--single-turn", action="store_true", default=None, help="end after one answer")
    system = group.add_mutually_exclusive_group().add_argument
    system("-sys", "--system-prompt", metavar="TEXT", help="system message")
    system("-sysf", "--system-prompt-file", metavar="FILE", help="file with it")
    add_template_options(group)


def add_template_options(group: argparse._ArgumentGroup) -> None:
    """Those of `template_options`."""
    add = group.add_argument
    add("--chat-template", metavar="FILE|NAME|TEXT", help="Jinja template (default: the model's)")
    add(
        "--chat-template-kwargs",
        type=_variables,
        metavar="JSON",
        help="object with variables of the template: '{\"preserve_thinking\": true}'",
    )
    add("-rea", "--reasoning", nargs="?", const="on", choices=_SWITCH, metavar="on|off|auto",
        help="let the model think before it answers (the template's enable_thinking)")  # fmt: skip
    add("--no-reasoning", dest="reasoning", action="store_const", const="off",
        help="the same as off")  # fmt: skip


def is_wanted(parser: Parser, args: argparse.Namespace) -> bool:
    """Decide between a chat and raw text: as -cnv or -no-cnv says. Otherwise an option of chats
    makes it a chat, and so does a terminal if the model has a template."""
    if args.conversation and args.prompts is not None:
        parser.error("argument -cnv: not allowed with argument --prompts")
    given = [n for n in (*_ONLY_IN_A_CHAT, *FOR_A_TEMPLATE) if getattr(args, n) is not None]
    other, refused = "", list[str]()
    if args.conversation is False:
        other, refused = "-no-cnv", given
    elif args.prompts is not None:
        other, refused = "--prompts", [n for n in given if n in _ONLY_IN_A_CHAT]
    if refused:
        option = refused[0].replace("_", "-")
        parser.error(f"argument --{option}: not allowed with argument {other}")
    if args.conversation is not None or args.prompts is not None:
        return bool(args.conversation)
    return bool(given) or (is_terminal() and _has_template(args))


def _has_template(args: argparse.Namespace) -> bool:
    return bool(GGUFFile(args.model).string(TEMPLATE_KEY, ""))


def run(args: argparse.Namespace, first: str | None, params: SamplingParams) -> int:
    """Answer `first`, if there is one, then every message until the input ends."""
    # Before the weights are loaded: what can't be used is refused at once.
    options = template_options(args) | {"params": params}
    system, file = _system_message(args), SessionFile(args)
    with load_engine(args) as engine:
        chat = Chat(engine, system, file, is_interactive() and not args.single_turn, **options)
        if first is not None:
            chat.say(first)
            if args.single_turn:
                return 0
        if is_interactive():
            print(HELP, file=sys.stderr)
        for message in read_messages() if sys.stdin is not None else ():
            if message.strip() == "/exit":
                break
            if not chat.follows(message):
                chat.say(message)
                if args.single_turn:
                    break
    return 0


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of Engine.chat about the template. Raises ChatError for what it can't do."""
    template, reasoning = _template(args), _SWITCH[args.reasoning or "auto"]
    if reasoning is not None and "enable_thinking" not in template.variables:
        raise ChatError(
            f"{template.name} takes no --reasoning {args.reasoning}: it reads no enable_thinking"
        )
    given = args.chat_template_kwargs
    check_variables(given, reasoning)
    return {"template": template, "reasoning": reasoning, "template_kwargs": given}


def _variables(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {shown(text)}")
    return value


def _template(args: argparse.Namespace) -> ChatTemplate:
    choice = args.chat_template
    if choice is not None and re.search("{[{%]", choice):
        return ChatTemplate(choice, "--chat-template")
    return find_template(GGUFFile(args.model), choice)


def _system_message(args: argparse.Namespace) -> str | None:
    if args.system_prompt_file is not None:
        return read_text(args.system_prompt_file).removesuffix("\n")
    return None if args.system_prompt is None else unescaped(args, args.system_prompt)


class Chat:
    """The messages so far, and the answers with their timings."""

    def __init__(
        self, engine: Engine, system: str | None, file: SessionFile, goes_on: bool, **options: Any
    ) -> None:
        """system: text of the system message; goes_on: whether the chat goes on after an error;
        options: those of `Engine.chat`."""
        self._engine, self._options, self._goes_on = engine, options, goes_on
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._file, self._n_held = file, 0
        self._messages = file.messages(engine, list(self._system))
        self._answers: list[Completion] = []

    def follows(self, message: str) -> bool:
        """Whether a message is a command, which is then followed."""
        match = re.fullmatch(r"(/[A-Za-z][^\s/]*)( .*)?", message.rstrip())
        if match is None:
            return False
        word = match[1]
        said = f"unknown command {word}: /help lists them; to send it, begin with a space"
        if word == "/help":
            said = HELP
        elif word == "/stats":
            said = self.stats()
        elif word in ("/reset", "/clear"):
            self.reset()
            said = "the conversation is empty again" + "; the system message stays" * bool(
                self._system
            )
        print(said, file=sys.stderr)
        return True

    def reset(self) -> None:
        self._messages, self._n_held = list(self._system), 0

    def say(self, text: str) -> None:
        """Print the answer to a message, which is taken back without one, and a line about it."""
        asked = [*self._messages, {"role": "user", "content": text}]
        n_shown = 0
        try:
            answer = self._engine.chat(asked, **self._options)
            with stopping(answer):
                with prompt_bar(answer):
                    answer.wait_for_token()
                for token in answer:
                    n_shown += len(token.text)
                    write(token.text)
                # What may have begun a stop text, if it was stopped.
                write(answer.text[n_shown:])
        except EngineError as error:
            if n_shown:
                write("\n")
            if not self._goes_on:
                raise
            is_too_long = isinstance(error, PromptError) and self._messages != self._system
            advice = f"; {_ADVICE}" * is_too_long
            print("error:", *(str(error) + advice).splitlines(), file=sys.stderr)
            return
        write("\n")
        if not _is_taken_back(answer):
            self._messages = [*asked, {"role": "assistant", "content": answer.text}]
            self._file.save(self._engine, answer, self._messages)
        self._answers.append(answer)
        self._n_held = answer.reuse.n_prompt + len(answer.tokens)
        print(self._line(answer), file=sys.stderr)

    def _line(self, answer: Completion) -> str:
        t = answer.timings
        advice = f": {_ADVICE}" * answer.detail.endswith("is full")
        end = f"; {answer.finish_reason} ({answer.detail}{advice})"
        if _is_taken_back(answer):
            end = "; stopped before its first token: the message is taken back"
        elif answer.finish_reason is FinishReason.STOP:
            end = ""
        return (
            f"[turn {len(self._answers)}: {t.n_prompt} tokens processed"
            f"{_rate(t.n_prompt, t.prompt_s)}; {answer.reuse}; "
            f"{len(answer.tokens)} generated{_rate(t.n_eval, t.eval_s)}{end}]"
        )

    def stats(self) -> str:
        timings = [answer.timings for answer in self._answers]
        n_prompt = sum(t.n_prompt for t in timings)
        n_generated = sum(len(answer.tokens) for answer in self._answers)
        return (
            f"[{len(timings)} turns: {n_prompt} tokens processed"
            f"{_rate(n_prompt, sum(t.prompt_s for t in timings))}; {n_generated} generated"
            f"{_rate(n_generated, sum(t.eval_s for t in timings))}; "
            f"{self._n_held} of {self._engine.n_ctx} positions of the context used; "
            f"{cache_line(self._engine)}]"
        )


def _is_taken_back(answer: Completion) -> bool:
    return answer.finish_reason is FinishReason.CANCELLED and not answer.tokens


def _rate(n: int, seconds: float) -> str:
    return f" ({n / seconds:.2f} tokens/s)" if n and seconds else ""


@contextlib.contextmanager
def stopping(answer: Completion) -> Iterator[None]:
    """Within it, Ctrl-C stops the answer after its step; a second one interrupts as usual."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        answer.stop()

    earlier = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def read_messages() -> Iterator[str]:
    """Messages from standard input until it ends, except empty ones."""
    while (line := _read_line()) is not None:
        start = line.lstrip()
        if start.startswith(_QUOTES):
            message = _quoted(start.removeprefix(_QUOTES))
        else:
            message = _continued(line)
        if message.strip():
            yield message


def _quoted(line: str | None) -> str:
    """The lines up to one that ends in quotes."""
    lines = []
    while line is not None:
        text = line.rstrip()
        lines.append(text.removesuffix(_QUOTES) if text.endswith(_QUOTES) else line)
        line = None if text.endswith(_QUOTES) else _read_line()
    return "\n".join(lines).strip("\n")


def _continued(line: str | None) -> str:
    """A line, and the next as long as a line ends in a backslash."""
    lines = []
    while line is not None:
        lines.append(line.removesuffix("\\"))
        line = _read_line() if line.endswith("\\") else None
    return "\n".join(lines)


def is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def is_terminal() -> bool:
    """Whether a person reads and writes."""
    return is_interactive() and sys.stdout is not None and sys.stdout.isatty()


def _read_line() -> str | None:
    """A line without its end; None at the end of the input. Raises InputError."""
    if not is_interactive():
        try:
            data = sys.stdin.buffer.readline()
            line = data.decode()
        except UnicodeDecodeError as error:
            came = f"byte 0x{data[error.start]:02x} in {data[:40]!r}"
            raise InputError(f"standard input: expected UTF-8, got {came}") from None
        except OSError as error:
            raise InputError(f"standard input: {error.strerror or error}") from None
    elif is_terminal():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (with it, input() edits lines)
        try:
            return input("> ")
        except EOFError:
            print(file=sys.stderr)
            return None
    else:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
