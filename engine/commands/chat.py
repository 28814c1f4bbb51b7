"""`cli.py -cnv`: a conversation, with the state kept between turns."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from engine.commands.options import InputError, Parser, load_engine, unescaped
from engine.commands.output import write
from engine.engine import Engine
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.runtime.completion import ChatCompletion
from engine.runtime.request import FinishReason
from engine.sampling.params import SamplingParams
from engine.text.template import ChatError, find_template

_QUOTES = '"""'
HELP = (
    '/exit, /reset, /stats; a line that ends in \\ goes on; """ begins and ends a block of lines; '
    "Ctrl-C stops an answer"
)


def add_options(p: Parser) -> None:
    add = p.add_argument_group("chat").add_argument
    add("-cnv", "--conversation", action="store_true",
        help="chat: read messages from standard input; -p or -f is the first one")  # fmt: skip
    add("-sys", "--system-prompt", metavar="TEXT", help="system message")
    add("--chat-template", metavar="FILE|NAME", help="Jinja template (default: the model's)")
    add("--reasoning", action=argparse.BooleanOptionalAction,
        help="let the model think before it answers (the template's enable_thinking)")  # fmt: skip


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    if args.conversation and args.prompts is not None:
        parser.error("argument -cnv: not allowed with argument --prompts")
    for name in ("system_prompt", "chat_template", "reasoning"):
        if getattr(args, name) is not None and not args.conversation:
            parser.error(f"argument --{name.replace('_', '-')}: expected -cnv too")


def run(args: argparse.Namespace, first: str | None, params: SamplingParams) -> int:
    """Answer `first`, if there is one, then every message until the input ends."""
    # Before the weights are loaded: a template that can't be used is refused at once.
    template = find_template(GGUFFile(args.model), args.chat_template)
    if args.reasoning is not None and "enable_thinking" not in template.variables:
        option = "--reasoning" if args.reasoning else "--no-reasoning"
        raise ChatError(f"{template.name} takes no {option}: it reads no enable_thinking")
    with load_engine(args) as engine:
        system = args.system_prompt and unescaped(args, args.system_prompt)
        chat = Chat(engine, system, params=params, reasoning=args.reasoning, template=template)
        if first is not None:
            chat.say(first)
        if is_interactive():
            print(HELP, file=sys.stderr)
        for message in read_messages() if sys.stdin is not None else ():
            if message == "/exit":
                break
            if message == "/reset":
                chat.reset()
            elif message == "/stats":
                print(chat.stats(), file=sys.stderr)
            else:
                chat.say(message)
    return 0


class Chat:
    """The messages so far, and the answers with their timings."""

    def __init__(self, engine: Engine, system: str | None, **options: Any) -> None:
        """system: text of the system message; options: those of `Engine.chat`."""
        self._engine, self._options = engine, options
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._system)
        self._answers: list[ChatCompletion] = []

    def reset(self) -> None:
        self._messages = list(self._system)
        self._engine.conversation.release()

    def say(self, text: str) -> None:
        """Print the answer to a message, which is taken back without one, and a line about it."""
        asked = [*self._messages, {"role": "user", "content": text}]
        written = ""
        try:
            answer = self._engine.chat(asked, **self._options)
            with stopping(answer):
                for token in answer:
                    written = token.text or written
                    write(token.text)
        except EngineError as error:
            if written:
                write("\n")
            if not is_interactive():
                raise
            print("error:", *str(error).splitlines(), file=sys.stderr)
            return
        write("\n")
        if not _is_taken_back(answer):
            self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        self._answers.append(answer)
        print(self._line(answer), file=sys.stderr)

    def _line(self, answer: ChatCompletion) -> str:
        t, prompt = answer.timings, answer.prompt
        kept = f"after {prompt.n_kept} kept"
        if prompt.n_dropped:
            kept += f", {prompt.n_dropped} dropped: the template changed what they say"
        end = f"; {answer.finish_reason} ({answer.detail})"
        if _is_taken_back(answer):
            end = "; stopped before its first token: the message is taken back"
        elif answer.finish_reason is FinishReason.STOP:
            end = ""
        return (
            f"[turn {len(self._answers)}: {t.n_prompt} tokens processed"
            f"{_rate(t.n_prompt, t.prompt_s)}; {kept}; "
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
            f"{self._engine.conversation.n_tokens} of {self._engine.n_ctx} positions of the "
            "context held]"
        )


def _is_taken_back(answer: ChatCompletion) -> bool:
    return answer.finish_reason is FinishReason.CANCELLED and not answer.tokens


def _rate(n: int, seconds: float) -> str:
    return f" ({n / seconds:.2f} tokens/s)" if n and seconds else ""


@contextlib.contextmanager
def stopping(answer: ChatCompletion) -> Iterator[None]:
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


def _read_line() -> str | None:
    """A line without its end; None at the end of the input. Raises InputError."""
    if not is_interactive():
        data = sys.stdin.buffer.readline()
        try:
            line = data.decode()
        except UnicodeDecodeError as error:
            came = f"byte 0x{data[error.start]:02x} in {data[:40]!r}"
            raise InputError(f"standard input: expected UTF-8, got {came}") from None
    elif sys.stdout.isatty():
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
