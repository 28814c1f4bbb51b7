"""Measure constrained output: masks, speed beside an output that is held, right answers.

    python tools/constraints.py masks VOCABULARY.gguf …
    python tools/constraints.py speed -m model.gguf [-np 8] [-n 256] [--backend cuda]
    python tools/constraints.py answers [-n 200]

masks: for each token of a document that follows a grammar, how long the mask after it is computed,
and how long it takes until it is there, in another thread. --extend adds made-up tokens to a
vocabulary: each is two of its tokens. speed: rounds of sequences, all free, and one of them held to
a grammar, in turns. answers: how often the demo model is right on held-out questions, free and
held to their schemas.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import Completion, Engine, Grammar, SamplingParams
from engine.engine import DEMO_MODEL
from engine.formats.gguf import GGUFFile
from engine.sampling import grammar as grammar_module
from engine.sampling.grammar import Grammars
from engine.server.calls import find_format
from engine.server.constraints import constraint
from engine.server.protocol import ChatRequest
from engine.text.tokenizer import Tokenizer
from tools.train_demo.answers import GREEDY, asked
from tools.train_demo.heldout import held_out
from tools.train_demo.questions import Question

_TEMPLATE = Path(__file__).parent / "train_demo" / "chat.jinja"
_N_TOOLS = 200
Json = dict[str, Any]
# Of a free text's length, so that an output does not end early.
_ENDLESS = Grammar.regex(r"[a-zA-Z .,]*")


def tools(n: int) -> list[Json]:
    """Strict tools, each of a text, a choice, a number and a list."""
    text, whole = {"type": "string"}, {"type": "integer"}
    properties = {
        "path": text, "mode": {"type": "string", "enum": ["read", "write", "append"]},
        "line": whole, "content": text, "tags": {"type": "array", "items": text},
    }  # fmt: skip
    schema = {"type": "object", "properties": properties, "required": list(properties),
              "additionalProperties": False}  # fmt: skip
    return [
        {
            "type": "function",
            "function": {"name": f"tool_{i}", "strict": True, "parameters": schema},
        }
        for i in range(n)
    ]


def documents(tokenizer: Tokenizer, n_words: int) -> Iterator[tuple[str, Grammar, str]]:
    """(what it is, a grammar, a text that follows it)."""
    rng = random.Random(0)
    words = DEMO_MODEL.with_name("heldout.txt").read_text().split()
    start = rng.randrange(len(words) - 4 * n_words)
    prose = " ".join(words[start : start + n_words])
    text, notes = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
    people = {"type": "object",
              "properties": {"name": text, "age": {"type": "integer"}, "notes": notes},
              "required": ["name", "age", "notes"], "additionalProperties": False}  # fmt: skip
    some = [{"name": words[i], "age": i % 99, "notes": [prose[i : i + 60], prose[i : i + 9]]}
            for i in range(8)]  # fmt: skip
    yield "JSON by a schema", Grammar.json({"type": "object", "properties": {
        "all": {"type": "array", "items": people}}, "required": ["all"],
        "additionalProperties": False}), json.dumps({"all": some})  # fmt: skip
    yield "any JSON", Grammar.json(), json.dumps({"a": some, "text": prose})
    call = ("<tool_call>\n<function=tool_1>\n<parameter=path>\n/a/b.py\n</parameter>\n"
            "<parameter=mode>\nread\n</parameter>\n<parameter=line>\n12\n</parameter>\n"
            f"<parameter=content>\n{prose}\n</parameter>\n<parameter=tags>\n[\"a\", \"b c\"]\n"
            "</parameter>\n</function>\n</tool_call>")  # fmt: skip
    yield "a call that must come", held(tokenizer, tools(8), "required"), call
    yield "calls in a text", held(tokenizer, tools(8), "auto"), f"{prose}\n\n{call}"
    yield f"a call of {_N_TOOLS} tools", held(tokenizer, tools(_N_TOOLS), "required"), call


def held(tokenizer: Tokenizer, given: Sequence[Json], choice: str) -> Grammar:
    """The grammar of calls in the XML format."""
    request = ChatRequest(messages=[], tool_choice=choice)
    found = constraint(request, given, find_format(_TEMPLATE.read_text()), tokenizer)
    assert found is not None
    return found[1]


class Extended:
    """A tokenizer with made-up tokens behind its own, each two of these."""

    def __init__(self, inner: Tokenizer, n_vocab: int) -> None:
        self._inner, self.n_vocab = inner, n_vocab
        rng = random.Random(0)
        short = [i for i in range(inner.n_vocab) if 0 < len(inner.token_bytes(i)) < 8]
        pairs = (rng.choices(short, k=2) for _ in range(n_vocab - inner.n_vocab))
        self._more = [b"".join(map(inner.token_bytes, pair)) for pair in pairs]

    def token_bytes(self, i: int, special: bool = False) -> bytes:
        n = i - self._inner.n_vocab
        return self._inner.token_bytes(i, special=special) if n < 0 else self._more[n]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def time_masks(path: Path, n_words: int, n_vocab: int) -> None:
    """Print a table of one vocabulary."""
    tokenizer: Any = Tokenizer.from_gguf(GGUFFile(path))
    tokenizer = Extended(tokenizer, n_vocab) if n_vocab else tokenizer
    grammars, inner, computed = Grammars(tokenizer, tokenizer.n_vocab), grammar_module._mask, []
    grammars.matcher(Grammar.regex("a"))  # Makes the vocabulary's trie.

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        bits = inner(*args)
        computed.append(1e6 * (time.perf_counter() - began))
        return bits

    grammar_module._mask = timed  # type: ignore[assignment]
    print(f"{path.name}: {tokenizer.n_vocab} tokens\n")
    print("| grammar | first, ms | masks | computed in us: median | 99th | most | there | 99th |")
    print("|---|---|---|---|---|---|---|---|")
    for name, grammar, text in documents(tokenizer, n_words):
        began = time.perf_counter()
        matcher = grammars.matcher(grammar)
        first, taken = time.perf_counter() - began, []
        computed.clear()
        for token in tokenizer.encode(text, False, True):
            began = time.perf_counter()
            matcher.accept(token)
            matcher.bits()
            taken.append(1e6 * (time.perf_counter() - began))
        taken.sort()
        computed.sort()
        n, high = len(taken), int(0.99 * len(taken))
        times = computed[n // 2], computed[high], computed[-1], taken[n // 2], taken[high]
        shown = " | ".join(f"{t:.0f}" for t in times)
        print(f"| {name} | {1e3 * first:.0f} | {n} | {shown} |", flush=True)
    grammar_module._mask = inner
    print()


def rate(done: list[Completion]) -> float:
    """Tokens a second of one sequence, on average."""
    times = [c.timings for c in done]
    return statistics.mean(t.n_eval / t.eval_s for t in times)


def time_speed(engine: Engine, n_parallel: int, n_tokens: int, n_rounds: int) -> None:
    """Print tokens/s of the free sequences, and of the one that is held, in turns."""
    params = SamplingParams(temperature=0.8, top_k=40, max_tokens=n_tokens, ignore_eos=True, seed=1)
    held = replace(params, grammar=_ENDLESS)
    prompts = [
        [i % engine.tokenizer.n_vocab for i in range(7 * k, 7 * k + 32)] for k in range(n_parallel)
    ]
    rows: list[tuple[float, float, float]] = []
    for i in range(n_rounds + 1):
        free = engine.generate_batch(prompts, params, cache_prompt=False)
        mixed = engine.generate_batch(
            prompts, [held, *[params] * (n_parallel - 1)], cache_prompt=False
        )
        assert {len(c.tokens) for c in (*free, *mixed)} == {n_tokens}, "an output has ended early"
        if i:  # The first captures what later ones replay.
            rows.append((rate(free), rate(mixed[1:] or mixed), rate(mixed[:1])))
    ratios = [statistics.median(row[i] / row[0] for row in rows) for i in (1, 2)]
    medians = [statistics.median(row[i] for row in rows) for i in range(3)]
    print(
        "| sequences | all free, tokens/s each | others | the one held | ratio of others | of it |"
    )
    print("|---|---|---|---|---|---|")
    print(f"| {n_parallel} | {medians[0]:.1f} | {medians[1]:.1f} | {medians[2]:.1f} "
          f"| {ratios[0]:.3f} | {ratios[1]:.3f} |")  # fmt: skip


def asked_grammar(question: Question, engine: Engine) -> tuple[Grammar, Callable[[str], bool]]:
    """What holds the answer of a question to its schema, or to a call of its tools; and whether a
    text is such an answer."""
    if not question.tools:
        schema, _ = json.JSONDecoder().raw_decode(question.text, question.text.index('{"type"'))
        closed = {"additionalProperties": False} | schema
        return Grammar.json(closed), partial(_matches, schema)
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in question.tools]
    grammar = held(engine.tokenizer, strict, "required")
    return grammar, lambda text: text.endswith("</tool_call>")


def _matches(schema: Any, text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def count_answers(engine: Engine, task: str, n: int) -> None:
    """Print how many answers of a task end, match, and are right, free and held."""
    questions = held_out(task, n)
    pairs = [asked(question) for question in questions]
    found = [asked_grammar(question, engine) for question in questions]
    each = [replace(GREEDY, grammar=grammar) for grammar, _ in found]
    for name, params in (("free", [GREEDY] * n), ("held", each)):
        done = engine.generate_batch([text for text, _ in pairs], params)
        ended = [c.finish_reason == "stop" for c in done]
        match = [
            ok and is_one(c.text) for ok, c, (_, is_one) in zip(ended, done, found, strict=True)
        ]
        right = [ok and c.text == a for ok, c, (_, a) in zip(ended, done, pairs, strict=True)]
        print(f"| {task} | {name} | {sum(ended)} | {sum(match)} | {sum(right)} |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    masks = commands.add_parser("masks", help="the times of masks")
    masks.add_argument("files", nargs="*", type=Path, default=[DEMO_MODEL])
    masks.add_argument("--words", type=int, default=800, help="of the longest text in a document")
    masks.add_argument("--extend", type=int, default=0, help="tokens of the vocabulary, in all")
    speed = commands.add_parser("speed", help="tokens/s beside an output that is held")
    speed.add_argument("-m", "--model", help="GGUF file (default: the demo model)")
    speed.add_argument("-np", type=int, default=8, help="sequences")
    speed.add_argument("-n", type=int, default=256, help="tokens of each")
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--backend", default="auto")
    answers = commands.add_parser("answers", help="the demo model's answers, free and held")
    answers.add_argument("-n", type=int, default=200, help="questions of each task")
    args = parser.parse_args()
    if args.command == "masks":
        for path in args.files:
            time_masks(path, args.words, args.extend)
        return
    if args.command == "answers":
        print(
            "| task | output | end by themselves | of their schema | right |\n|---|---|---|---|---|"
        )
        with Engine.load(n_ctx=16384, n_parallel=8) as engine:
            for task in ("json", "tool_call", "tool_calls"):
                count_answers(engine, task, args.n)
        return
    n_ctx = args.np * (args.n + 64)
    with Engine.load(args.model, backend=args.backend, n_ctx=n_ctx, n_parallel=args.np) as engine:
        time_speed(engine, args.np, args.n, args.rounds)


if __name__ == "__main__":
    main()
