"""What the commands share: options, prompts, and how a mistake on the command line is answered."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from engine import backends
from engine.engine import DEMO_MODEL
from engine.errors import EngineError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "'": "'", '"': '"', "\\": "\\"}


class InputError(EngineError):
    """A file that can't be read or written."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line in one line, with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def at_least(low: int) -> Callable[[str], int]:
    """Reads an integer of at least `low`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
        return value

    convert.__name__ = "integer"
    return convert


def common_options(p: Parser, many: bool = False) -> None:
    """The model, or with `many` a list of them, and how much to say."""
    how: Any = {"default": str(DEMO_MODEL), "metavar": "FILE"}
    about = "GGUF file (default: the small model that comes with the engine)"
    if many:
        how = {"type": _paths, "action": "extend", "required": True, "metavar": "FILE[,FILE…]"}
        about = "GGUF file"
    p.add_argument("-m", "--model", help=about, **how)
    p.add_argument("-v", "--verbose", action="store_true", help="more detail; tracebacks of errors")


def _comma_list(text: str) -> list[str]:
    return text.split(",")


def _paths(text: str) -> list[str]:
    paths = text.split(",")
    if not all(paths):
        raise argparse.ArgumentTypeError(f"expected files and commas between them, got {text!r}")
    return paths


def backend_options(p: Parser) -> None:
    """What runs the graph."""
    p.add_argument(
        "--backend",
        choices=backends.names(),
        default="auto",
        help="what runs the graph (default: auto, the best that is there)",
    )
    p.add_argument(
        "--strict-backend", action="store_true", help="fail rather than run a node elsewhere"
    )
    given: Any = {"default": argparse.SUPPRESS}
    group = p.add_argument_group("placement")
    group.add_argument(
        "-ngl", "--n-gpu-layers", type=at_least(0), metavar="N", dest="n_gpu_layers",
        help="layers on the GPU, from the last; the head is one more (all that fit)", **given,
    )  # fmt: skip
    group.add_argument(
        "-ncmoe", "--n-cpu-moe", type=at_least(0), metavar="N", dest="n_cpu_moe",
        help="layers, from the first, whose experts stay on the CPU (0)", **given,
    )  # fmt: skip
    group.add_argument(
        "-cmoe", "--cpu-moe", action="store_const", const=ALL_LAYERS, dest="n_cpu_moe",
        help="the experts of all layers stay on the CPU", **given,
    )  # fmt: skip
    group.add_argument(
        "-ot", "--override-tensor", action="extend", type=_comma_list, metavar="REGEX=cpu|cuda",
        dest="override_tensor", help="nodes whose weight's name matches run there", **given,
    )  # fmt: skip


def prompt_options(p: Parser, many: bool = False) -> None:
    """Where the prompt comes from; with `many`, a file of prompts too."""
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


# More layers than any model has.
ALL_LAYERS = 1 << 20
_CACHE_TYPES = ("f32", "f16")
# Names, the field of an options class that they set, how to read a value, and what it means.
OptionRow = tuple[str, str, Any, str]
_ENGINE_OPTIONS: list[OptionRow] = [
    ("-c --ctx-size", "n_ctx", at_least(0), "context (4096 or the model's; 0: the model's)"),
    ("-b --batch-size", "n_batch", at_least(1), "most tokens of a batch (2048, or -ub)"),
    ("-ub --ubatch-size", "n_ubatch", at_least(1), "most tokens of a step (512; cuda: 4096)"),
    ("-t --threads", "n_threads", at_least(1), "threads (all cores)"),
    ("--cpu-isa", "cpu_isa", str, "instruction set of the CPU kernels (the best there is)"),
    ("-np --parallel", "n_parallel", at_least(1), "sequences that run together (1)"),
]


def table_options(p: Any, rows: list[OptionRow]) -> None:
    """Options that leave their field to its default when they are not given."""
    for names, field, convert, about in rows:
        p.add_argument(
            *names.split(),
            dest=field,
            type=convert,
            default=argparse.SUPPRESS,
            metavar="N",
            help=about,
        )


def engine_options(p: Parser, without: tuple[str, ...] = ()) -> None:
    """Options that set fields of EngineConfig, but for some fields."""
    backend_options(p)
    group = p.add_argument_group("engine")
    table_options(group, [row for row in _ENGINE_OPTIONS if row[1] not in without])
    given: Any = {"default": argparse.SUPPRESS}
    for short, name, field in (("-ctk", "key", "type_k"), ("-ctv", "value", "type_v")):
        group.add_argument(
            short,
            f"--cache-type-{name[0]}",
            dest=field,
            choices=_CACHE_TYPES,
            help=f"type of cached {name}s",
            **given,
        )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="cuda: a sequence's bits don't depend on what runs beside it, at some cost",
        **given,
    )
    group.add_argument(
        "--gdn", choices=("auto", "scan", "chunk"), help="algorithm of the delta net", **given
    )


def given_fields(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line sets."""
    given = {f.name: getattr(args, f.name) for f in fields(options) if hasattr(args, f.name)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def integers(low: int) -> Callable[[str], list[int]]:
    """Reads integers of at least `low`, with commas between them."""

    def convert(text: str) -> list[int]:
        try:
            return [at_least(low)(part) for part in text.split(",")]
        except ValueError:
            message = f"expected integers and commas between them, got {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return convert


def read_prompt(parser: Parser, args: argparse.Namespace) -> str:
    """The prompt that `prompt_options` name."""
    if args.prompt is not None:
        return unescaped(args, args.prompt)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("a prompt is needed: -p TEXT, -f FILE, or standard input")
    return read_text(args.file).removesuffix("\n")


def read_text(path: str | None) -> str:
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


def unescaped(args: argparse.Namespace, text: str) -> str:
    """A text of the command line with escapes as what they mean, unless --no-escape."""
    if args.no_escape:
        return text
    return re.sub(r"\\([ntr'\"\\])", lambda match: _ESCAPES[match[1]], text)


def write_text(path: str, text: str) -> None:
    """Write a file. Raises InputError if it can't be."""
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
