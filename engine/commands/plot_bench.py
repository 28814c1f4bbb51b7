"""`cli.py plot-bench`: draw what sweep-bench printed."""

from __future__ import annotations

import argparse

from engine.bench.plots import (
    Curve,
    PlotError,
    check_output,
    draw,
    labels_of,
    parse_facts,
    parse_points,
)
from engine.commands.options import InputError, Parser, read_text

ABOUT = "Draw prompt and generation speed against depth, a line for each output of sweep-bench."


def add_options(p: Parser) -> None:
    p.add_argument("files", nargs="+", metavar="FILE",
        help="output of sweep-bench, ours or ik_llama.cpp's (-: standard input)")  # fmt: skip
    p.add_argument("-o", "--output", required=True, metavar="OUT.png",
        help="picture to write (.png, .svg, .pdf)")  # fmt: skip
    p.flag("-v --verbose", "tracebacks of errors")


def run(parser: Parser, args: argparse.Namespace) -> int:
    check_output(args.output)
    labels = labels_of(args.files)
    draw([_curve(label, p) for label, p in zip(labels, args.files, strict=True)], args.output)
    return 0


def _curve(label: str, path: str) -> Curve:
    text = read_text(path)
    try:
        return Curve(label, parse_points(text), parse_facts(text))
    except PlotError as error:
        raise InputError(f"{path}: {error}") from None
