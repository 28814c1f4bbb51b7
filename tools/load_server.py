"""Load a server with clients, and measure it beside the engine in process.

    python tools/load_server.py -m model.gguf [--one | --vanish | --agent]

The server is a process of its own, on a free port. Without a further option streaming clients take
turns with `generate_batch` on the same prompts. --one: what the server adds for one client.
--vanish: clients that close their connections at any moment. --agent: a conversation with tools,
for a model that calls them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import Engine, SamplingParams
from engine.commands.options import Parser
from engine.engine import DEMO_MODEL
from engine.errors import EngineError
from engine.runtime.completion import Completion
from engine.text.template import ChatTemplate, find_template
from engine.threads import n_cores
from tools.endings import ends_in_one_line, heading
from tools.load_agent import MARGIN, converse, table
from tools.load_client import Client, LoadError, ServerProcess, Streamed, request_bytes
from tools.load_vanish import vanish

_WORDS = ("river", "stone", "cloud", "garden", "market", "lamp", "rope", "coin", "bridge")
_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_FIELDS = {"temperature": 0, "ignore_eos": True, "stream": True}
# Positions of a sequence, and of an agent; sequences where clients vanish; MiB of both sides.
_SHARE, _AGENT_CONTEXT, _FEW, _CACHE_RAM = 512, 4096, 4, 512
Question = tuple[list[dict[str, str]], int]


class Questions:
    """Questions that all differ, each with the tokens of its answer: `n`, half more or less."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._random = n, random.Random(seed)

    def draw(self, is_exact: bool = False) -> Question:
        draw = self._random
        words = " ".join(draw.choices(_WORDS, k=draw.randint(4, 12)))
        text = f"{draw.randrange(10**6)} {words}: which of them is number {draw.randrange(9)}?"
        n = self._n if is_exact else draw.randint(self._n // 2, self._n * 3 // 2)
        return [{"role": "user", "content": text}], n


def _request(question: Question) -> bytes:
    messages, n = question
    return request_bytes({"messages": messages, "max_tokens": n, **_FIELDS})


async def drive(
    port: int, n_clients: int, seconds: float, questions: Questions
) -> tuple[list[Question], list[Streamed], float]:
    """Clients that ask again and again: (questions, what came of each, seconds to the last end)."""
    asked, came = list[Question](), list[Streamed]()
    clients = [await Client.connected(port) for _ in range(n_clients)]
    begun = time.perf_counter()

    async def ask(client: Client) -> None:
        while time.perf_counter() < begun + seconds:
            asked.append(question := questions.draw())
            came.append(await client.stream(_request(question)))
            if came[-1].error:
                raise LoadError(f"expected a whole answer, got {came[-1].error}")

    await asyncio.gather(*map(ask, clients))
    seconds = time.perf_counter() - begun
    for client in clients:
        client.close()
    return asked, came, seconds


def in_process(engine: Engine, template: ChatTemplate, asked: Sequence[Question]) -> float:
    """Tokens per second of generate_batch on the same prompts."""
    ids = [engine.encode_chat(messages, template=template) for messages, _ in asked]
    params = [replace(_GREEDY, max_tokens=n) for _, n in asked]
    begun = time.perf_counter()
    done = engine.generate_batch(ids, params)
    seconds = time.perf_counter() - begun
    if bad := [c for c in done if len(c.tokens) != c.request.params.max_tokens]:
        raise LoadError(f"generate_batch: {bad[0]}")
    return sum(len(c.tokens) for c in done) / seconds


def many(args: argparse.Namespace, server: ServerProcess, engine: Engine) -> None:
    """Streaming clients and generate_batch, in turns. A short round of both warms up."""
    questions = Questions(args.n_gen, args.seed)
    template = find_template(engine.file, args.chat_template)
    load = partial(drive, server.port, args.clients)
    in_process(engine, template, asyncio.run(load(0.1, questions))[0])
    print("\n| round | requests | first token, s: median | longest | tokens/s | in process | ratio "
          "| cores: clients | event loop |\n" + "|---" * 9 + "|")  # fmt: skip
    ratios = []
    for i in range(args.rounds):
        before = sum(os.times()[:2]), server.loop_seconds
        asked, came, seconds = asyncio.run(load(args.seconds / args.rounds, questions))
        after = sum(os.times()[:2]), server.loop_seconds
        cores = [(b - a) / seconds for a, b in zip(before, after, strict=True)]
        firsts = [s.first_s for s in came]
        speed = sum(s.n_tokens for s in came) / seconds
        alone = in_process(engine, template, asked)
        ratios.append(speed / alone)
        print(f"| {i + 1} | {len(came)} | {statistics.median(firsts):.3f} | {max(firsts):.3f} | "
              f"{speed:.0f} | {alone:.0f} | {ratios[-1]:.2f} | {cores[0]:.2f} | {cores[1]:.2f} |",
              flush=True)  # fmt: skip
    print(f"no errors; median ratio: {statistics.median(ratios):.2f}")


def one(args: argparse.Namespace, server: ServerProcess, engine: Engine) -> None:
    """One client, and such questions in process, in turns. The first round warms up."""
    questions = Questions(args.n_gen, args.seed)
    template = find_template(engine.file, args.chat_template)
    params = replace(_GREEDY, max_tokens=args.n_gen)

    def generate(question: Question) -> tuple[float, float]:
        ids = engine.encode_chat(question[0], template=template)
        return _timed(partial(engine.generate, ids, params))

    ways: dict[str, Callable[[Question], tuple[float, float]]] = {
        "Engine.generate": generate,
        "Engine.chat": lambda q: _timed(partial(engine.chat, q[0], params, template=template)),
        "the server": lambda q: asyncio.run(_streamed(server.port, q)),
    }
    rounds = [
        [way(questions.draw(is_exact=True)) for way in ways.values()]
        for _ in range(args.repetitions + 1)
    ][1:]
    print("\n| one client | first token, ms | between tokens, ms |\n|---|---|---|")
    medians = [[statistics.median(x) for x in zip(*of, strict=True)]
               for of in zip(*rounds, strict=True)]  # fmt: skip
    for name, (first, between) in zip(ways, medians, strict=True):
        print(f"| {name} | {1e3 * first:.2f} | {1e3 * between:.3f} |")
    first, between = (a - b for a, b in zip(medians[-1], medians[0], strict=True))
    print(f"| the server adds to Engine.generate | {1e3 * first:.2f} | {1e3 * between:.3f} |")


async def _streamed(port: int, question: Question) -> tuple[float, float]:
    """Seconds to the first token, and between tokens, over HTTP."""
    client = await Client.connected(port)
    got = await client.stream(_request(question))
    client.close()
    if got.error:
        raise LoadError(f"expected a whole answer, got {got.error}")
    return got.first_s, (got.seconds - got.first_s) / (got.n_tokens - 1)


def _timed(start: Callable[[], Completion]) -> tuple[float, float]:
    """As `_streamed`, in process."""
    begun, completion = time.perf_counter(), start()
    completion.wait_for_token()
    first = time.perf_counter()
    completion.wait()
    return first - begun, (time.perf_counter() - first) / (len(completion.tokens) - 1)


def beside_engine(args: argparse.Namespace) -> None:
    n = 1 if args.one else args.parallel or args.clients
    sizes: dict[str, Any] = {"n_ctx": _SHARE * n, "n_parallel": n, "cache_ram": _CACHE_RAM}
    with (
        ServerProcess(*_options(args, n, _SHARE * n), "-cram", _CACHE_RAM) as server,
        Engine.load(args.model, n_threads=args.threads, **sizes) as engine,
    ):
        (one if args.one else many)(args, server, engine)


def come_and_go(args: argparse.Namespace) -> None:
    fields = {"max_tokens": args.n_gen, **_FIELDS}
    for cache_ram in (0, 64):
        options = (*_options(args, _FEW, _FEW * 2048), "-cram", cache_ram)
        with ServerProcess(*options) as server:
            found = vanish(server, args.clients, args.seconds / 2, fields, bool(cache_ram))
        print(f"\nprefix cache of {cache_ram} MiB; {found}", flush=True)


def agent(args: argparse.Namespace) -> None:
    """Raises LoadError if the server processed more than it had to."""
    fields = {"chat_template_kwargs": {"enable_thinking": args.thinking}}
    with ServerProcess(*_options(args, 1, _AGENT_CONTEXT)) as server:
        asked = converse(server, args.turns, args.seed, **fields)
    print(f"\n{table(asked)}")
    for a in asked:
        if a.n_processed > a.n_needed + MARGIN:
            raise LoadError(
                f"turn {a.turn}: expected {a.n_needed} tokens processed, got {a.n_processed}"
            )


def _options(args: argparse.Namespace, n_parallel: int, n_ctx: int) -> list[object]:
    template = ["--chat-template", args.chat_template] if args.chat_template else []
    return ["-m", args.model, "-t", args.threads, "-np", n_parallel, "-c", n_ctx, *template]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    p = Parser(prog="load_server.py", allow_abbrev=False, description=str(__doc__).split("\n")[0])
    p.add_argument("-m", "--model", type=Path, default=DEMO_MODEL, help="GGUF file (demo model)")
    p.add_argument("--chat-template", metavar="FILE|NAME", help="Jinja template (the model's)")
    ways = p.add_mutually_exclusive_group()
    for name, about in (
        ("--one", "what the server adds for one client"),
        ("--vanish", "clients that close their connections at any moment"),
        ("--agent", "a conversation with tools"),
    ):
        ways.add_argument(name, action="store_true", help=about)
    p.number("--clients", "clients at the same time (64)", default=64)
    p.number("--seconds", "seconds that they ask, in all rounds together (120)", default=120)
    p.number("--rounds", "rounds, in which both sides take turns (2)", default=2)
    p.number("-r --repetitions", "answers that --one times (20)", default=20)
    p.number("-n --n-gen", "tokens of an answer, half more or less (64)", low=2, default=64)
    p.number("-np --parallel", "sequences at a time (as many as clients)")
    p.number("-t --threads", "threads (all cores)", default=n_cores())
    p.number("--turns", "turns of an agent (20)", default=20)
    p.flag("--thinking", "an agent that thinks")
    p.number("--seed", "seed of the questions (0)", low=0, default=0)
    return p.parse_args(argv)


@ends_in_one_line(EngineError)
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = arguments(argv)
    print(heading(args.model, args.threads), flush=True)
    (come_and_go if args.vanish else agent if args.agent else beside_engine)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
