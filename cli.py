"""The command line: complete a prompt, or show the graph or the tokens of a model.

    python cli.py -m model.gguf -p "Once upon a time"
    python cli.py graph -m model.gguf
    python cli.py tokenize -m model.gguf -p "text"

Options are named as llama.cpp's. Text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine import Engine, SamplingParams
    from engine.request import Completion

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "'": "'", '"': '"', "\\": "\\"}


class InputError(EngineError):
    """A prompt that can't be read."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    args_in = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[_Parser], None], Callable[..., int]]] = {
        "graph": (_graph_options, _graph),
        "tokenize": (_tokenize_options, _tokenize),
    }
    options, command = commands.get(args_in[0] if args_in else "", (_run_options, _run))
    name = args_in.pop(0) if command is not _run else ""
    parser = _Parser(prog=f"cli.py {name}".strip(), allow_abbrev=False, description=_about(name))
    options(parser)
    args = parser.parse_args(args_in)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = command(parser, args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except EngineError as error:
        if args.verbose:
            raise
        # A file's name may hold line ends.
        print("error:", *str(error).splitlines(), file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"error: out of memory: {error or 'lower -c or -ub'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone; nothing is to be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _about(command: str) -> str:
    return {
        "": "Complete a prompt. Other commands: cli.py graph, cli.py tokenize.",
        "graph": "Show a model's compute graph: node counts, and which backend runs each and why.",
        "tokenize": "Show a text's tokens.",
    }[command]


def _at_least(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
        return value

    convert.__name__ = "integer"
    return convert


def _common_options(p: _Parser) -> None:
    p.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file")
    p.add_argument("-v", "--verbose", action="store_true", help="more detail; tracebacks of errors")


def _backend_options(p: _Parser) -> None:
    p.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda", "reference"),
        default="auto",
        help="what runs the graph (default: auto, the best that is there)",
    )
    p.add_argument(
        "--strict-backend", action="store_true", help="fail rather than run a node elsewhere"
    )


def _prompt_options(p: _Parser, many: bool = False) -> None:
    source = p.add_mutually_exclusive_group()
    if many:
        source.add_argument(
            "--prompts", metavar="FILE", help="one prompt a line, text or JSON; prints JSON lines"
        )
    source.add_argument("-p", "--prompt", metavar="TEXT", help="prompt (default: standard input)")
    source.add_argument("-f", "--file", metavar="FILE", help="file with the prompt")
    p.add_argument(
        "--no-escape",
        action="store_true",
        help=r"take \n, \t, \\ … in -p as they stand instead of as what they mean",
    )


_CACHE_TYPES = ("f32", "f16")
# Options of a run: names, the field of SamplingParams or EngineConfig that they set, and the rest.
# Those that are not given are left to the field's default.
_OPTIONS: dict[str, list[tuple[str, str, Any, str]]] = {
    "engine": [
        (
            "-c --ctx-size",
            "n_ctx",
            _at_least(0),
            "context (4096 or the model's; 0: the model's)",
        ),
        ("-b --batch-size", "n_batch", _at_least(1), "most tokens of a batch (2048)"),
        ("-ub --ubatch-size", "n_ubatch", _at_least(1), "most tokens of a step (512)"),
        ("-t --threads", "n_threads", _at_least(1), "threads (all cores)"),
        ("-np --parallel", "n_parallel", _at_least(1), "sequences that run together (1)"),
    ],
    "sampling": [
        ("-n --predict --n-predict", "max_tokens", _at_least(-1), "most tokens (-1: until full)"),
        ("-s --seed", "seed", _at_least(-1), "seed (-1: a random one)"),
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
            _at_least(-1),
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
    ],
}


def _run_options(p: _Parser) -> None:
    from engine.version import version_line

    p.add_argument("--version", action="version", version=version_line())
    _common_options(p)
    _prompt_options(p, many=True)
    _backend_options(p)
    for title, rows in _OPTIONS.items():
        group = p.add_argument_group(title)
        for names, field, convert, about in rows:
            group.add_argument(
                *names.split(),
                dest=field,
                type=convert,
                default=argparse.SUPPRESS,
                metavar="N",
                help=about,
            )
    given: Any = {"default": argparse.SUPPRESS}
    add = p.add_argument
    add(
        "-ctk",
        "--cache-type-k",
        dest="type_k",
        choices=_CACHE_TYPES,
        help="type of cached keys",
        **given,
    )
    add(
        "-ctv",
        "--cache-type-v",
        dest="type_v",
        choices=_CACHE_TYPES,
        help="type of cached values",
        **given,
    )
    add("--gdn", choices=("auto", "scan", "chunk"), help="algorithm of the delta net", **given)
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


def _given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line sets."""
    given = {f.name: getattr(args, f.name) for f in fields(options) if hasattr(args, f.name)}
    if breakers := given.get("dry_sequence_breakers"):
        given["dry_sequence_breakers"] = tuple(b for b in breakers if b != "none")
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def _run(parser: _Parser, args: argparse.Namespace) -> int:
    prompts = None if args.prompts is None else _read(args.prompts).splitlines()
    prompt = _prompt(parser, args) if prompts is None else ""
    from engine import Engine, SamplingParams
    from engine.config import EngineConfig

    params = SamplingParams(**_given(args, SamplingParams))
    with Engine.load(args.model, **_given(args, EngineConfig)) as engine:
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
    return status


def _run_many(engine: Engine, lines: list[str], params: SamplingParams) -> int:
    """Complete every line; results in order as soon as they are there."""
    from tqdm import tqdm

    from engine.prompts import read_prompts, result_line

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


def _prompt(parser: _Parser, args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt if args.no_escape else _unescape(args.prompt)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("a prompt is needed: -p TEXT, -f FILE, or standard input")
    return _read(args.file).removesuffix("\n")


def _read(path: str | None) -> str:
    """The text of a file, of standard input for None or `-`."""
    name = "standard input" if path in (None, "-") else path
    try:
        data = sys.stdin.buffer.read() if path in (None, "-") else Path(str(path)).read_bytes()
        return data.decode()
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            came = f"byte 0x{data[error.start]:02x} at offset {error.start}"
            raise InputError(f"{name}: expected UTF-8, got {came}") from None
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def _unescape(text: str) -> str:
    return re.sub(r"\\([ntr'\"\\])", lambda match: _ESCAPES[match[1]], text)


def _sizes(text: str) -> list[int]:
    try:
        return [_at_least(1)(part) for part in text.split(",")]
    except ValueError:
        message = f"expected integers and commas between them, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _graph_options(p: _Parser) -> None:
    _common_options(p)
    _backend_options(p)
    add = p.add_argument
    add("--bs", type=_sizes, default=[512, 1], metavar="N[,N…]", help="batch sizes (512,1)")
    add("--gdn", choices=("fused", "decomposed"), default="fused",
        help="the delta net as one node, or as primitive ops")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    add("--dot", metavar="FILE", help="write the graph for Graphviz")


def _graph(parser: _Parser, args: argparse.Namespace) -> int:
    from engine import report
    from engine.engine import plan_only

    plans = {
        bs: plan_only(args.model, bs, args.gdn, args.backend, args.strict_backend) for bs in args.bs
    }
    if args.dot is not None:
        try:
            Path(args.dot).write_text(report.as_dot(plans[args.bs[0]]))
        except OSError as error:
            raise InputError(f"{args.dot}: {error.strerror}") from None
    print(report.as_json(plans) if args.json else report.text(plans, args.verbose))
    return 0


def _tokenize_options(p: _Parser) -> None:
    _common_options(p)
    _prompt_options(p)
    p.add_argument("--ids", action="store_true", help="print the ids only, as a list")
    p.add_argument("--no-bos", action="store_true", help="add no BOS or EOS token")
    p.add_argument("--no-parse-special", action="store_true", help="take special tokens as text")


def _tokenize(parser: _Parser, args: argparse.Namespace) -> int:
    from engine.gguf import GGUFFile
    from engine.tokenizer import Tokenizer

    text = _prompt(parser, args)
    tokenizer = Tokenizer.from_gguf(GGUFFile(args.model))
    ids = tokenizer.encode(text, not args.no_bos, not args.no_parse_special)
    if args.ids:
        print(ids)
        return 0
    for i in ids:
        piece = tokenizer.token_bytes(i, special=True).decode("utf-8", "replace")
        print(f"{i:6d} -> '{piece}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
