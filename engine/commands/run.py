"""`cli.py`: complete a prompt, or many, or chat."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from tqdm import tqdm

from engine import backends
from engine.commands import chat
from engine.commands.options import (
    OptionRow,
    Parser,
    at_least,
    common_options,
    engine_options,
    given_fields,
    prompt_options,
    read_prompt,
    read_text,
    table_options,
)
from engine.commands.prompts import read_prompts, result_line
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.runtime.request import Completion, FinishReason
from engine.sampling.params import SamplingParams
from engine.text.template import TEMPLATE_KEY
from engine.version import __version__

ABOUT = "Complete a prompt, or chat (-cnv). Other commands: %s."
_SAMPLING_OPTIONS: list[OptionRow] = [
    ("-n --predict --n-predict", "max_tokens", at_least(-1), "most tokens (-1: until full)"),
    ("-s --seed", "seed", at_least(-1), "seed (-1: a random one)"),
    ("--temp", "temperature", float, "temperature (0.8; 0: greedy)"),
    ("--dynatemp-range", "dynatemp_range", float, "temperature ± this, by entropy (0)"),
    ("--dynatemp-exp", "dynatemp_exponent", float, "exponent of that (1)"),
    ("--top-k", "top_k", int, "keep the N likeliest (40; 0: all)"),
    ("--top-p", "top_p", float, "keep the likeliest up to this probability (0.95)"),
    ("--min-p", "min_p", float, "keep what has this share of the highest probability (0.05)"),
    ("--typical", "typical_p", float, "keep the most typical up to this probability (1)"),
    ("--top-nsigma", "top_n_sigma", float, "keep what is within N sigma of the best (-1: off)"),
    ("--xtc-probability", "xtc_probability", float, "chance to drop the likeliest (0)"),
    ("--xtc-threshold", "xtc_threshold", float, "probability from which that applies (0.1)"),
    ("--repeat-penalty", "repeat_penalty", float, "divides logits of recent tokens (1: off)"),
    (
        "--repeat-last-n",
        "repeat_last_n",
        at_least(-1),
        "how many (64; 0: none, -1: all)",
    ),
    ("--presence-penalty", "presence_penalty", float, "lowers logits of recent tokens (0)"),
    ("--frequency-penalty", "frequency_penalty", float, "the same, for each occurrence (0)"),
    ("--dry-multiplier", "dry_multiplier", float, "strength of the repetition penalty DRY (0)"),
    ("--dry-base", "dry_base", float, "its growth with the length (1.75)"),
    ("--dry-allowed-length", "dry_allowed_length", int, "repetitions up to this are free (2)"),
    ("--dry-penalty-last-n", "dry_penalty_last_n", int, "how far back it looks (-1: all)"),
    ("--mirostat", "mirostat", int, "2: mirostat 2.0 instead of the samplers (0)"),
    ("--mirostat-ent", "mirostat_tau", float, "its target surprise in bits (5)"),
    ("--mirostat-lr", "mirostat_eta", float, "its learning rate (0.1)"),
]


class _Version(argparse.Action):
    """Prints the version and the backends, which are looked for only then."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        print(f"gdn-engine {__version__}: {backends.describe()}")
        parser.exit()


def add_options(p: Parser) -> None:
    """Its options."""
    p.add_argument(
        "--version", action=_Version, nargs=0, help="show program's version number and exit"
    )
    common_options(p)
    prompt_options(p, many=True)
    chat.add_options(p)
    engine_options(p)
    table_options(p.add_argument_group("sampling"), _SAMPLING_OPTIONS)
    given: Any = {"default": argparse.SUPPRESS}
    add = p.add_argument
    add("--check", action="store_true", help="look for non-finite values after every node", **given)
    add("--samplers", type=_names, metavar="A;B;…", help="the samplers, in order", **given)
    add("--dry-sequence-breaker", dest="dry_sequence_breakers", action="append", metavar="TEXT",
        help="text that ends a repetition, or none (default: newline : \" *)", **given)  # fmt: skip
    add("-l", "--logit-bias", type=_bias, action="append", metavar="ID±X",
        help="add X to a token's logit: 15043+1, 15043-inf", **given)  # fmt: skip
    add("-r", "--reverse-prompt", dest="stop", action="append", metavar="TEXT",
        help="text that ends the output", **given)  # fmt: skip
    add("--ignore-eos", action="store_true", help="never end before -n", **given)
    add("--no-display-prompt", action="store_true", help="print the completion only")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(";") if name)


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)([+-].+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a token id and a signed number, got {text}")
    return int(match[1]), float(match[2])


def _sampling(args: argparse.Namespace) -> SamplingParams:
    given = given_fields(args, SamplingParams)
    if breakers := given.get("dry_sequence_breakers"):
        given["dry_sequence_breakers"] = tuple(b for b in breakers if b != "none")
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return SamplingParams(**given)


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Stream the completion, chat, or print one line of JSON for each of many prompts."""
    chat.check_options(parser, args)
    if args.conversation:
        has_first = args.prompt is not None or args.file is not None
        return chat.run(args, read_prompt(parser, args) if has_first else None, _sampling(args))
    prompts = None if args.prompts is None else read_text(args.prompts).split("\n")
    prompt = read_prompt(parser, args) if prompts is None else ""
    params = _sampling(args)
    with Engine.load(args.model, **given_fields(args, EngineConfig)) as engine:
        if prompts is not None:
            return _run_many(engine, prompts, params)
        completion = engine.generate(prompt, params)
        status = 0
        try:
            if not args.no_display_prompt:
                _write(prompt)
            for token in completion:
                _write(token.text)
        except KeyboardInterrupt:
            completion.cancel()
            status = 130
        except EngineError:
            if completion.text or not args.no_display_prompt:
                _write("\n")
            raise
        _write("\n")
        print(_timings(engine.load_s, completion), file=sys.stderr)
        ended_at_once = completion.finish_reason is FinishReason.STOP and not completion.text
        if ended_at_once and engine.file.string(TEMPLATE_KEY, ""):
            print("it said nothing: with -cnv, it is asked by its chat template", file=sys.stderr)
    return status


def _run_many(engine: Engine, lines: list[str], params: SamplingParams) -> int:
    """Complete every line; results in order as soon as they are there."""
    prompts = list(read_prompts(lines, params))
    good = [p for p in prompts if not p.error]
    finished: dict[int, str] = {p.number: result_line(p, None) for p in prompts if p.error}
    n_failed = len(finished)
    order = iter(p.number for p in prompts)
    following = next(order, None)

    def flush() -> None:
        nonlocal following
        while following in finished:
            print(finished.pop(following), flush=True)
            following = next(order, None)

    def done(index: int, completion: Completion) -> None:
        nonlocal n_failed
        if completion.finish_reason == "error":
            print(f"error: line {good[index].number}: {completion.detail}", file=sys.stderr)
            n_failed += 1
        finished[good[index].number] = result_line(good[index], completion)
        flush()
        bar.update()

    for line in prompts:
        if line.error:
            print(f"error: {line.error}", file=sys.stderr)
    flush()
    with tqdm(total=len(good), unit="prompt", disable=None) as bar:
        engine.generate_batch([p.prompt for p in good], [p.params for p in good], done)
    return 1 if n_failed else 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _timings(load_s: float, completion: Completion) -> str:
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
    reason = completion.finish_reason or "stopped"
    return "\n".join([*lines, f"{'ended':>17} : {reason} ({completion.detail})"])
