"""`cli.py`: complete a prompt, or many, or chat."""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque

from tqdm import tqdm

from engine import backends
from engine.commands import chat
from engine.commands.options import (
    OptionRow,
    Parser,
    at_least,
    given_fields,
    load_engine,
    read_prompt,
    read_text,
)
from engine.commands.output import write
from engine.commands.prompts import PromptLine, read_prompts, result_line
from engine.engine import Engine
from engine.errors import EngineError
from engine.runtime.request import Completion, FinishReason
from engine.sampling.params import SamplingParams
from engine.text.template import TEMPLATE_KEY
from engine.version import __version__

ABOUT = "Complete a prompt, or chat (-cnv). Other commands: %s."


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(";") if name)


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)([+-].+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a token id and a signed number, got {text}")
    return int(match[1]), float(match[2])


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
    ("--repeat-last-n", "repeat_last_n", at_least(-1), "how many (64; 0: none, -1: all)"),
    ("--presence-penalty", "presence_penalty", float, "lowers logits of recent tokens (0)"),
    ("--frequency-penalty", "frequency_penalty", float, "the same, for each occurrence (0)"),
    ("--dry-multiplier", "dry_multiplier", float, "strength of the repetition penalty DRY (0)"),
    ("--dry-base", "dry_base", float, "its growth with the length (1.75)"),
    ("--dry-allowed-length", "dry_allowed_length", int, "repetitions up to this are free (2)"),
    ("--dry-penalty-last-n", "dry_penalty_last_n", int, "how far back it looks (-1: all)"),
    ("--mirostat", "mirostat", int, "2: mirostat 2.0 instead of the samplers (0)"),
    ("--mirostat-ent", "mirostat_tau", float, "its target surprise in bits (5)"),
    ("--mirostat-lr", "mirostat_eta", float, "its learning rate (0.1)"),
    ("--samplers", "samplers", {"type": _names, "metavar": "A;B;…"}, "the samplers, in order"),
    ("--dry-sequence-breaker", "dry_sequence_breakers", {"action": "append", "metavar": "TEXT"},
     "text that ends a repetition for DRY; none: no such text (default: newline : \" *)"),
    ("-l --logit-bias", "logit_bias", {"type": _bias, "action": "append", "metavar": "ID±X"},
     "add X to the logit of token ID: 15043+1, 15043-inf"),
    ("-r --reverse-prompt", "stop", {"action": "append", "metavar": "TEXT"},
     "stop where the output has this text"),
    ("--ignore-eos", "ignore_eos", bool, "don't stop at the end-of-generation token"),
]  # fmt: skip


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
    p.table("sampling", _SAMPLING_OPTIONS)
    check = "name the first node with values that are not finite; slow"
    p.table("debugging", [("--check", "check", bool, check)])


def _sampling(args: argparse.Namespace) -> SamplingParams:
    given = given_fields(args, SamplingParams)
    if breakers := given.get("dry_sequence_breakers"):
        given["dry_sequence_breakers"] = tuple(b for b in breakers if b != "none")
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
    with load_engine(args) as engine:
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
    print(_timings(engine.load_s, completion), file=sys.stderr)
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
