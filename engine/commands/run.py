"""`cli.py`: complete a prompt, or many, or chat."""

from __future__ import annotations

import argparse
import sys
from collections import deque

from tqdm import tqdm

from engine import backends
from engine.commands import chat
from engine.commands.options import Parser, given_fields, read_prompt, read_text, sampling_params
from engine.commands.output import write
from engine.commands.prompts import PromptLine, read_prompts, result_line
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason
from engine.sampling.params import SamplingParams
from engine.text.template import TEMPLATE_KEY
from engine.version import __version__

ABOUT = "Complete a prompt, or chat (-cnv). Other commands: %s."


class _Version(argparse.Action):
    """Prints the version and the backends, which are looked for only then."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        print(f"gdn-engine {__version__}: {backends.describe()}")
        parser.exit()


def add_options(p: Parser) -> None:
    p.add_argument("--version", action=_Version, nargs=0, help="print version and backends")
    p.common_options()
    p.prompt_options(many=True)
    p.flag("--no-display-prompt", "print the completion only")
    chat.add_options(p)
    p.engine_options()
    p.sampling_options()
    check = "name the first node with values that are not finite; slow"
    p.table("debugging", [("--check", "check", {"action": "store_true"}, check)])


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Stream the completion, chat, or print one line of JSON for each of many prompts."""
    chat.check_options(parser, args)
    if args.conversation:
        has_first = args.prompt is not None or args.file is not None
        first = read_prompt(parser, args) if has_first else None
        return chat.run(args, first, sampling_params(args))
    prompts = None if args.prompts is None else read_text(args.prompts).split("\n")
    prompt = read_prompt(parser, args) if prompts is None else ""
    params = sampling_params(args)
    with Engine.load(args.model, **given_fields(args, EngineConfig)) as engine:
        if prompts is not None:
            return _run_many(engine, prompts, params)
        return _run_one(engine, prompt, params, show_prompt=not args.no_display_prompt)


def _run_one(engine: Engine, prompt: str, params: SamplingParams, show_prompt: bool) -> int:
    """Stream a completion; Ctrl-C ends it, with status 130."""
    completion = engine.generate(prompt, params)
    status = 0
    try:
        if show_prompt:
            write(prompt)
        for token in completion:
            write(token.text)
    except KeyboardInterrupt:
        completion.cancel()
        status = 130
    except EngineError:
        if completion.text or show_prompt:
            write("\n")
        raise
    write("\n")
    print(_timings(engine.load_s, completion, status == 130), file=sys.stderr)
    ended_at_once = completion.finish_reason is FinishReason.STOP and not completion.text
    if ended_at_once and engine.file.string(TEMPLATE_KEY, ""):
        print("it said nothing: with -cnv, it is asked by its chat template", file=sys.stderr)
    return status


def _run_many(engine: Engine, lines: list[str], params: SamplingParams) -> int:
    """Complete every line; results in order of the lines, each as soon as it can be printed."""
    prompts = list(read_prompts(lines, params))
    valid = [p for p in prompts if not p.error]
    results: dict[int, str] = {}
    waiting = deque(p.number for p in prompts)

    def show(line: PromptLine, completion: Completion | None, error: str) -> None:
        if error:
            print(f"error: {error}", file=sys.stderr)
        results[line.number] = result_line(line, completion)
        while waiting and waiting[0] in results:
            print(results.pop(waiting.popleft()), flush=True)

    def done(index: int, completion: Completion) -> None:
        is_failed = completion.finish_reason is FinishReason.ERROR
        error = f"line {valid[index].number}: {completion.detail}" if is_failed else ""
        show(valid[index], completion, error)
        bar.update()

    for line in prompts:
        if line.error:
            show(line, None, line.error)
    with tqdm(total=len(valid), unit="prompt", disable=None) as bar:
        finished = engine.generate_batch([p.prompt for p in valid], [p.params for p in valid], done)
    all_good = all(c.finish_reason is not FinishReason.ERROR for c in finished)
    return 0 if all_good and len(valid) == len(prompts) else 1


def _timings(load_s: float, completion: Completion, is_interrupted: bool) -> str:
    def rate(seconds: float, n: int, unit: str) -> str:
        if not n or not seconds:
            return ""
        each = f"{seconds / n * 1e3:9.2f} ms per token, {n / seconds:9.2f} tokens per second"
        return f" / {n:5d} {unit} ({each})"

    t = completion.timings
    rows = (
        ("load time", load_s, ""),
        ("prompt eval time", t.prompt_s, rate(t.prompt_s, t.n_prompt, "tokens")),
        ("eval time", t.eval_s, rate(t.eval_s, t.n_eval, "runs  ")),
    )
    lines = [f"{name:>17} = {s * 1e3:10.2f} ms{more}" for name, s, more in rows]
    why = f"{completion.finish_reason} ({completion.detail})"
    if is_interrupted:  # In a step or between two.
        why = f"{FinishReason.CANCELLED} (by its user)"
    return "\n".join([*lines, f"{'ended':>17} : {why}"])
