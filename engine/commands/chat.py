"""`cli.py -cnv`: a conversation, with the state kept between turns.

Answers go to standard output; what is asked, and a line about each turn, to standard error.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.commands.messages import is_interactive, read_messages
from engine.commands.options import Parser, given_fields, unescaped
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.runtime.request import ChatCompletion, FinishReason
from engine.sampling.params import SamplingParams
from engine.text.template import ChatError, ChatTemplate, find_template

HELP = (
    '/exit, /reset, /stats; a line that ends in \\ goes on; """ begins and ends a block of lines; '
    "Ctrl-C stops an answer"
)


def add_options(p: Parser) -> None:
    """Options of a chat."""
    group = p.add_argument_group("chat")
    add = group.add_argument
    add("-cnv", "--conversation", action="store_true",
        help="chat: read messages from standard input, -p or -f being the first")  # fmt: skip
    add("-sys", "--system-prompt", metavar="TEXT", help="system message")
    add("--chat-template", metavar="FILE|NAME", help="Jinja template (default: the model's)")
    add("--reasoning", action=argparse.BooleanOptionalAction,
        help="think before an answer, or don't (the template's enable_thinking)")  # fmt: skip


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse options that don't go together."""
    if args.conversation and args.prompts is not None:
        parser.error("argument -cnv: not allowed with argument --prompts")
    for name in ("system_prompt", "chat_template", "reasoning"):
        if getattr(args, name) is not None and not args.conversation:
            parser.error(f"argument --{name.replace('_', '-')}: expected -cnv too")


def run(args: argparse.Namespace, first: str | None, params: SamplingParams) -> int:
    """Answer `first`, if there is one, then every message until the input ends."""
    # Before the weights: a template that can't be used shows at once.
    template = find_template(GGUFFile(args.model), args.chat_template)
    if args.reasoning is not None and "enable_thinking" not in template.variables:
        option = "--reasoning" if args.reasoning else "--no-reasoning"
        raise ChatError(f"{template.name} takes no {option}: it reads no enable_thinking")
    with Engine.load(args.model, **given_fields(args, EngineConfig)) as engine:
        chat = Chat(engine, template, args, params)
        if first is not None:
            chat.say(first)
        if sys.stdin is None:
            return 0
        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        for message in read_messages():
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
    """The messages so far, and what answering them took."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        args: argparse.Namespace,
        params: SamplingParams,
    ) -> None:
        self._engine, self._template, self._params = engine, template, params
        self._reasoning: bool | None = args.reasoning
        self._system: list[dict[str, str]] = []
        if args.system_prompt is not None:
            text = unescaped(args, args.system_prompt)
            self._system.append({"role": "system", "content": text})
        self._messages = list(self._system)
        self._n_turns = self._n_prompt = self._n_generated = 0
        self._prompt_s = self._eval_s = 0.0

    def reset(self) -> None:
        """Forget all but the system message."""
        self._messages = list(self._system)
        self._engine.conversation.release()

    def say(self, text: str) -> None:
        """Print the answer to a message, and a line about the turn.

        A message that gets no answer is taken back: an error, or an interrupt before its first
        token. On a terminal the chat goes on after an error.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        written = ""
        try:
            answer = self._engine.chat(
                asked, self._params, reasoning=self._reasoning, template=self._template
            )
            with stopping(answer):
                for token in answer:
                    written = token.text or written
                    _write(token.text)
        except EngineError as error:
            if written:
                _write("\n")
            if not is_interactive():
                raise
            print("error:", *str(error).splitlines(), file=sys.stderr)
            return
        _write("\n")
        if not _is_taken_back(answer):
            self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        self._count(answer)
        print(self._line(answer), file=sys.stderr)

    def _count(self, answer: ChatCompletion) -> None:
        t = answer.timings
        self._n_turns += 1
        self._n_prompt += t.n_prompt
        self._n_generated += len(answer.tokens)
        self._prompt_s += t.prompt_s
        self._eval_s += t.eval_s

    def _line(self, answer: ChatCompletion) -> str:
        t, prompt = answer.timings, answer.prompt
        kept = f"after {prompt.n_kept} kept"
        if prompt.n_dropped:
            kept += f", {prompt.n_dropped} dropped: the template changed what they say"
        parts = [
            f"turn {self._n_turns}: {t.n_prompt} tokens processed{_rate(t.n_prompt, t.prompt_s)}",
            kept,
            f"{len(answer.tokens)} generated{_rate(t.n_eval, t.eval_s)}",
        ]
        if _is_taken_back(answer):
            parts.append("stopped before its first token: the message is taken back")
        elif answer.finish_reason is not FinishReason.STOP:
            parts.append(f"{answer.finish_reason} ({answer.detail})")
        return f"[{'; '.join(parts)}]"

    def stats(self) -> str:
        """Tokens of the whole chat."""
        return (
            f"[{self._n_turns} turns: {self._n_prompt} tokens processed"
            f"{_rate(self._n_prompt, self._prompt_s)}; {self._n_generated} generated"
            f"{_rate(self._n_generated, self._eval_s)}; {self._engine.conversation.n_tokens} of "
            f"{self._engine.n_ctx} positions of the context held]"
        )


def _is_taken_back(answer: ChatCompletion) -> bool:
    return answer.finish_reason is FinishReason.CANCELLED and not answer.tokens


def _rate(n: int, seconds: float) -> str:
    return f" ({n / seconds:.2f} tokens/s)" if n and seconds else ""


@contextmanager
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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
