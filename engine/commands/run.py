"""`cli.py`: complete a prompt, or many, or chat."""

from __future__ import annotations

import argparse
import sys

from engine import backends
from engine.commands import chat, prompts, session, summary
from engine.commands.options import (
    Parser,
    given_fields,
    load_engine,
    read_prompt,
    read_text,
    sampling_params,
)
from engine.commands.output import write
from engine.commands.progress import prompt_bar
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason
from engine.sampling.params import SamplingParams
from engine.text.template import TEMPLATE_KEY
from engine.version import __version__, commit

ABOUT = (
    "Complete a prompt, or chat: the default on a terminal if the model has a chat template. "
    "Other commands: %s."
)


class _Version(argparse.Action):
    """Prints the version, its commit and the backends, which are looked for only then."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        known = f" ({found})" if (found := commit()) else ""
        print(f"gdn-engine {__version__}{known}: {backends.describe()}")
        parser.exit()


def add_options(p: Parser) -> None:
    p.add_argument("--version", action=_Version, nargs=0, help="print version and backends")
    p.common_options()
    p.prompt_options(many=True)
    p.epilog = prompts.HELP
    p.add_argument("--display-prompt", action=argparse.BooleanOptionalAction, default=True,
        help="print the prompt before its completion (yes)")  # fmt: skip
    chat.add_options(p)
    session.add_options(p)
    p.engine_options()
    p.sampling_options()
    check = "name the first node with values that are not finite; slow"
    p.table("debugging", [("--check", "check", {"action": "store_true"}, check)])


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Stream the completion, chat, or print one line of JSON for each of many prompts."""
    if chat.is_wanted(parser, args):
        has_first = args.prompt is not None or args.file is not None
        first = read_prompt(parser, args) if has_first else None
        return chat.run(args, first, sampling_params(args))
    params = sampling_params(args)
    if args.prompts is not None:
        if args.session is not None:
            parser.error("argument --session: not allowed with argument --prompts")
        return _run_many(args, params)
    file = session.SessionFile(args)
    goes_on = file.is_there and args.prompt is None and args.file is None
    prompt = "" if goes_on else read_prompt(parser, args)
    with Engine.load(args.model, **given_fields(args, EngineConfig)) as engine:
        summary.show(engine, args.verbose)
        completion = session.start(engine, file.restore(engine), prompt, params, args)
        status = _show(engine, completion, prompt, args)
        file.save(engine, completion)
    return status


def _run_many(args: argparse.Namespace, params: SamplingParams) -> int:
    # Editors of other systems may have begun the file with a byte order mark.
    lines = read_text(args.prompts).removeprefix("\ufeff").split("\n")
    is_given = any(getattr(args, name) for name in chat.FOR_A_TEMPLATE)
    options = chat.template_options(args) if is_given else {}
    with load_engine(args) as engine:
        return prompts.run(engine, lines, params, options, verbose=args.verbose)


def _show(engine: Engine, completion: Completion, prompt: str, args: argparse.Namespace) -> int:
    """Stream a completion; Ctrl-C ends it, with status 130."""
    status, unseen = 0, prompt if args.display_prompt else ""
    try:
        with prompt_bar(completion):
            completion.wait_for_token()
        for token in completion:
            write(unseen + token.text)
            unseen = ""
        write(unseen)
    except KeyboardInterrupt:
        completion.cancel()
        status = 130
    except EngineError:
        if completion.text:
            write("\n")
        raise
    write("\n")
    print(_timings(engine.load_s, completion, status == 130), file=sys.stderr)
    if args.verbose:
        print(f"{'prompt':>17} : {completion.reuse}", file=sys.stderr)
        print(summary.cache_line(engine), file=sys.stderr)
    ended_at_once = completion.finish_reason is FinishReason.STOP and not completion.text
    if ended_at_once and engine.file.string(TEMPLATE_KEY, ""):
        print("it said nothing: with -cnv, it is asked by its chat template", file=sys.stderr)
    return status


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
