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
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import EngineError

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


def _prompt_options(p: _Parser) -> None:
    source = p.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="prompt (default: standard input)")
    source.add_argument("-f", "--file", metavar="FILE", help="file with the prompt")
    p.add_argument(
        "--no-escape",
        action="store_true",
        help=r"take \n, \t, \\ … in -p as they stand instead of as what they mean",
    )


def _run_options(p: _Parser) -> None:
    from engine.version import version_line

    p.add_argument("--version", action="version", version=version_line())
    _common_options(p)
    _prompt_options(p)
    _backend_options(p)
    add = p.add_argument
    add("-n", "--predict", "--n-predict", type=_at_least(-1), default=-1, metavar="N",
        help="most tokens to generate (default: -1, until the context is full)")  # fmt: skip
    add("-c", "--ctx-size", type=_at_least(0), metavar="N",
        help="context size (default: 4096 or the model's, 0: the model's)")  # fmt: skip
    add("-b", "--batch-size", type=_at_least(1), default=2048, metavar="N",
        help="most tokens of a batch (default: 2048)")  # fmt: skip
    add("-ub", "--ubatch-size", type=_at_least(1), default=512, metavar="N",
        help="most tokens of a step (default: 512)")  # fmt: skip
    add("-t", "--threads", type=_at_least(1), metavar="N", help="threads (default: all cores)")
    add("-s", "--seed", type=_at_least(-1), default=-1, metavar="N",
        help="seed of the sampler (default: -1, a random one)")  # fmt: skip
    add("--temp", type=float, metavar="X", help="temperature (default: 0.8, 0: greedy)")
    add("--top-k", type=int, metavar="N", help="keep the N likeliest (default: 40, 0: all)")
    add("--top-p", type=float, metavar="X", help="keep the likeliest up to X (default: 0.95)")
    add("--min-p", type=float, metavar="X",
        help="keep what has X times the highest probability (default: 0.05)")  # fmt: skip
    add("--repeat-penalty", type=float, metavar="X", help="penalty (default: 1.0, none)")
    add("--repeat-last-n", type=_at_least(-1), metavar="N",
        help="tokens to penalize (default: 64, 0: none, -1: all)")  # fmt: skip
    add("--ignore-eos", action="store_true", help="never end before -n")
    add("--no-display-prompt", action="store_true", help="print the completion only")
    add("-ctk", "--cache-type-k", choices=("f32", "f16"), help="type of cached keys")
    add("-ctv", "--cache-type-v", choices=("f32", "f16"), help="type of cached values")
    add("--gdn", choices=("auto", "scan", "chunk"), default="auto",
        help="algorithm of the gated delta net (default: auto, by length)")  # fmt: skip


def _run(parser: _Parser, args: argparse.Namespace) -> int:
    prompt = _prompt(parser, args)
    from engine import Engine, SamplingParams

    params = SamplingParams(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        seed=args.seed,
        max_tokens=args.predict,
        ignore_eos=args.ignore_eos,
    )
    options = {
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "n_threads": args.threads,
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "gdn": args.gdn,
        "strict_backend": args.strict_backend,
    }
    with Engine.load(args.model, backend=args.backend, n_ctx=args.ctx_size, **options) as engine:
        tokens = engine.generate(prompt, params)
        status = 0
        try:
            if not args.no_display_prompt:
                _write(prompt)
            for token in tokens:
                _write(token.text)
        except KeyboardInterrupt:
            status = 130
        _write("\n")
        print(_timings(engine.timings), file=sys.stderr)
    return status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _timings(t: Any) -> str:
    def rate(seconds: float, n: int, unit: str) -> str:
        if not n or not seconds:
            return ""
        each = f"{seconds / n * 1e3:9.2f} ms per token, {n / seconds:9.2f} tokens per second"
        return f" / {n:5d} {unit} ({each})"

    rows = (
        ("load time", t.load_s, ""),
        ("prompt eval time", t.prompt_s, rate(t.prompt_s, t.n_prompt, "tokens")),
        ("eval time", t.eval_s, rate(t.eval_s, t.n_eval, "runs  ")),
    )
    return "\n".join(f"{name:>17} = {s * 1e3:10.2f} ms{more}" for name, s, more in rows)


def _prompt(parser: _Parser, args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt if args.no_escape else _unescape(args.prompt)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("a prompt is needed: -p TEXT, -f FILE, or standard input")
    name = "standard input" if args.file is None else args.file
    try:
        data = sys.stdin.buffer.read() if args.file is None else Path(args.file).read_bytes()
        text = data.decode()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: expected UTF-8, got byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    return text.removesuffix("\n")


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
