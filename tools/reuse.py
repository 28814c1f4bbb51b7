"""Measure what the prefix cache saves: tokens processed and time to the first token, turn by turn.

    python tools/reuse.py -m MODEL.gguf [--peer-python PATH]

Every scenario runs on an engine with the cache; the token ids of its prompts then run on one
without and, with --peer-python, in llama.cpp, with the reuse that llama-cpp-python has
(tools/reuse_peer.py). Texts are random, but follow from --seed. Answers have a fixed length.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import ChatTemplate, Completion, Engine, SamplingParams
from engine.commands.options import InputError, Parser
from engine.engine import DEMO_MODEL
from engine.errors import EngineError
from engine.text.template import BUILT_IN
from engine.threads import n_cores
from tests.support.chats import QWEN35_STYLE
from tools.compare import python_of
from tools.compare_process import Worker, WorkerFailure, WorkerMissing
from tools.endings import ends_in_one_line, heading

Messages = list[dict[str, Any]]
Ask = Callable[..., str]


@dataclass(frozen=True)
class Sizes:
    """Turns of a chat; tokens, about, of an agent's system prompt (tools are half of it) and of a
    user's message, and exactly of an answer."""

    n_turns: int = 20
    n_system: int = 6000
    n_message: int = 64
    n_answer: int = 48

    @property
    def n_ctx(self) -> int:
        """Positions that the longest prompt needs; half an answer may be tokenized anew."""
        n_turn = self.n_message + 2 * self.n_answer + 32
        return self.n_system * 5 // 4 + n_turn * self.n_turns


@dataclass(frozen=True)
class Turn:
    """A prompt, its answer, and what was processed until its first token; `said`: of its reuse."""

    ids: list[int]
    answer: list[int]
    text: str
    n_processed: int
    seconds: float
    said: str


class Texts:
    """Makes messages of random words."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._rng, self._encode = np.random.default_rng(seed), engine.encode_prompt

    def text(self, n_tokens: int) -> str:
        words = ["".join(self._rng.choice(list("aeioulnrst"), 5)) for _ in range(n_tokens)]
        n_each = len(self._encode(" ".join(words))) / n_tokens
        return " ".join(words[: max(1, int(n_tokens / n_each))])

    def said(self, role: str, n_tokens: int) -> dict[str, Any]:
        return {"role": role, "content": self.text(n_tokens)}

    def tool(self, name: str, n_tokens: int) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "description": self.text(n_tokens)}}


def _chat(ask: Ask, texts: Texts, sizes: Sizes, how: str = "") -> None:
    """how: `thinks`: a thought ends half way into each answer; `edited`: of 20 turns, the user's
    message of turn 5 is another one from turn 8 on, and from turn 12 on."""
    messages, n = [texts.said("system", sizes.n_message)], sizes.n_turns
    for turn in range(n):
        if how == "edited" and turn in (2 * n // 5 - 1, 3 * n // 5 - 1):
            messages[1 + 2 * (n // 5)] = texts.said("user", sizes.n_message)
        messages.append(texts.said("user", sizes.n_message))
        answer = ask(messages)
        if how == "thinks":
            half = len(answer) // 2
            answer = f"{answer[:half]}\n</think>\n\n{answer[half:]}"
        messages.append({"role": "assistant", "content": answer})


def _eight_chats(ask: Ask, texts: Texts, sizes: Sizes) -> None:
    """Their system message is the same."""
    system = texts.said("system", sizes.n_message)
    chats = [[system] for _ in range(8)]
    for _ in range(sizes.n_turns // 5):
        for messages in chats:
            messages.append(texts.said("user", sizes.n_message))
            messages.append({"role": "assistant", "content": ask(messages)})


def _agent(ask: Ask, texts: Texts, sizes: Sizes) -> None:
    """Half way, two tools in the midst of eight change places."""
    tools = [texts.tool(f"tool{i}", max(1, sizes.n_system // 16 - 32)) for i in range(8)]
    messages = [texts.said("system", sizes.n_system // 2)]
    n_turns = 2 * sizes.n_turns // 5
    for turn in range(n_turns):
        if turn == n_turns // 2:
            tools[4], tools[6] = tools[6], tools[4]
        messages.append(texts.said("user", sizes.n_message))
        messages.append({"role": "assistant", "content": ask(messages, tools=list(tools))})


# What happens, and by which template.
SCENARIOS: dict[str, tuple[Callable[[Ask, Texts, Sizes], None], str]] = {
    "a chat of growing history": (_chat, BUILT_IN["chatml"]),
    "a template that drops thinking": (partial(_chat, how="thinks"), QWEN35_STYLE),
    "a message edited twice": (partial(_chat, how="edited"), BUILT_IN["chatml"]),
    "eight conversations in turns": (_eight_chats, BUILT_IN["chatml"]),
    "an agent, of whose tools two change places": (_agent, QWEN35_STYLE),
}


def measure(model: Path, name: str, sizes: Sizes, seed: int, n_threads: int) -> list[list[Turn]]:
    """The turns of a scenario with the cache, and without it, on an engine each. The second gets
    the ids of the first one's prompts: its tokenizer would make others of random answers."""
    scenario, source = SCENARIOS[name]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=sizes.n_answer)
    template, turns = ChatTemplate(source), list[Turn]()
    with _engine(model, sizes, n_threads, None) as engine:

        def ask(messages: Messages, **tools: Any) -> str:
            chat = partial(engine.chat, messages, params, template=template, **tools)
            turns.append(_timed(chat))
            return turns[-1].text

        scenario(ask, Texts(engine, seed), sizes)
    one = replace(params, max_tokens=1)
    with _engine(model, sizes, n_threads, 0) as engine:
        return [turns, [_timed(partial(engine.generate, turn.ids, one)) for turn in turns]]


def _engine(model: Path, sizes: Sizes, n_threads: int, cache_ram: int | None) -> Engine:
    engine = Engine.load(model, n_ctx=sizes.n_ctx, n_threads=n_threads, cache_ram=cache_ram)
    # The first step touches all weights for the first time.
    engine.generate([1] * 64, SamplingParams(max_tokens=1), cache_prompt=False).wait()
    return engine


def _timed(start: Callable[[], Completion]) -> Turn:
    begin, answer = time.perf_counter(), start()
    answer.wait_for_token()
    seconds = time.perf_counter() - begin
    reuse, n = answer.wait().reuse, answer.timings.n_prompt
    if n != reuse.n_prompt - reuse.n_reused:  # No number is better than a wrong one.
        raise EngineError(f"{n} tokens were processed, but the completion {reuse}")
    return Turn(answer.request.ids, answer.tokens, answer.text, n, seconds, str(reuse))


def table(sides: Sequence[Sequence[Turn]]) -> str:
    """A scenario's turns; the last row has the sums as multiples of those with the cache."""
    names = ("", ", no cache", ", llama.cpp")[: len(sides)]
    head = ["turn", *(f"{what}{n}" for what in ("tokens", "ms") for n in names), "the first one"]
    tokens: list[list[float]] = [[turn.n_processed for turn in side] for side in sides]
    times = [[1e3 * turn.seconds for turn in side] for side in sides]
    columns, said = tokens + times, [turn.said for turn in sides[0]]
    lines = [head, ["---"] * len(head)]
    for i, row in enumerate(zip(*columns, strict=True)):
        lines.append([str(i + 1), *(f"{x:.0f}" for x in row), said[i]])
    lines.append(["sum", *(f"{sum(c):.0f}" for c in columns), ""])
    lines.append(["median", *(f"{statistics.median(c):.0f}" for c in columns), ""])
    ratios = [f"{sum(c) / sum(of[0]):.2f}" for of in (tokens, times) for c in of]
    lines.append(["ratio", *ratios, ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    p = Parser(prog="reuse.py", allow_abbrev=False, description=str(__doc__).split("\n")[0])
    p.add_argument("-m", "--model", type=Path, default=DEMO_MODEL, help="GGUF file (demo model)")
    p.add_argument("--peer-python", type=Path, metavar="PATH",
        help="a Python, or a virtual environment, with llama-cpp-python")  # fmt: skip
    p.number("--turns", "turns of a chat (20)", low=10, default=Sizes.n_turns)
    p.number("--system", "tokens of an agent's system prompt (6000)", default=Sizes.n_system)
    p.number("--message", "tokens of a user's message (64)", default=Sizes.n_message)
    p.number("-n --n-gen", "tokens of an answer (48)", low=4, default=Sizes.n_answer)
    p.number("-t --threads", "threads (all cores)", default=n_cores())
    p.number("--seed", "seed of the texts (0)", low=0, default=0)
    return p.parse_args(argv)


@contextmanager
def _peer(args: argparse.Namespace, sizes: Sizes) -> Iterator[Worker]:
    """The process with llama.cpp. Raises InputError, WorkerFailure."""
    python, env = python_of(args.peer_python), {"GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryDirectory(prefix="reuse-") as folder, ExitStack() as stack:
        try:
            worker = Worker("reuse", python, Path(folder) / "log", 1800, env)
            about = stack.enter_context(worker).start()
        except WorkerMissing as missing:
            raise InputError(f"{python}: expected a Python with llama_cpp, got {missing}") from None
        print(f"{about['version']}: {about['system_info']}")
        worker.ask("load", model=str(args.model), n_ctx=sizes.n_ctx, n_threads=args.threads)
        yield worker


@ends_in_one_line(EngineError, WorkerFailure)
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = arguments(argv)
    sizes = Sizes(args.turns, args.system, args.message, args.n_gen)
    print(heading(args.model, args.threads))
    with ExitStack() as stack:
        peer = stack.enter_context(_peer(args, sizes)) if args.peer_python else None
        for name in SCENARIOS:
            sides = measure(args.model, name, sizes, args.seed, args.threads)
            if peer:
                peer.ask("clear")
                asked = ({"prompt": turn.ids, "answer": turn.answer} for turn in sides[0])
                found = [peer.ask("turn", **turn) for turn in asked]
                sides.append([replace(t, **f) for t, f in zip(sides[0], found, strict=True)])
            print(f"\n{name}\n\n{table(sides)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
