"""`cli.py perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice

from tqdm import tqdm

from engine.bench.perplexity import MIN_CTX, Estimate, chunks, encode, perplexity, window
from engine.commands.options import CACHE, InputError, Parser, load_engine, read_text
from engine.commands.output import write

DEFAULT_CTX = 512
SHORT_S = 1.0
ABOUT = (
    "Measure the perplexity of a text, as llama-perplexity does: over text chunks of -c tokens, of "
    "which the second half is scored. Prints the estimate so far after each chunk."
)


def add_options(p: Parser) -> None:
    p.common_options()
    p.add_argument("-f", "--file", required=True, metavar="FILE",
        help="the text (-: standard input)")  # fmt: skip
    p.number("-c --ctx-size", f"tokens of a text chunk ({DEFAULT_CTX})", low=MIN_CTX,
        dest="n_ctx_chunk", default=DEFAULT_CTX)  # fmt: skip
    p.number("--chunks", "score at most N text chunks (-1: all)", low=-1, default=-1)
    p.number("--stride --ppl-stride", "score overlapping windows of -c + N/2 tokens, each "
        "N tokens further, in their last N tokens (0: off)", low=0, default=0)  # fmt: skip
    p.engine_options("n_ctx", "n_parallel", *CACHE)


def run(parser: Parser, args: argparse.Namespace) -> int:
    n_ctx, stride = args.n_ctx_chunk, args.stride
    if stride > n_ctx:
        parser.error(f"argument --stride: expected at most the {n_ctx} of -c, got {stride}")
    if args.chunks == 0:
        parser.error("argument --chunks: expected at least 1, or -1 for all, got 0")
    text, size = _text_of(args.file), window(n_ctx, stride)
    with load_engine(args, n_ctx=size, cache_ram=0) as engine:
        ids = encode(engine, text)
        n_chunks = len(chunks(len(ids), n_ctx, stride))
        if args.chunks > 0:
            n_chunks = min(n_chunks, args.chunks)
        start = time.perf_counter()
        estimate = _print_all(islice(perplexity(engine, ids, n_ctx, stride), n_chunks), n_chunks)
        seconds = time.perf_counter() - start
    print(f"Final estimate: PPL = {estimate.ppl:.4f} +/- {estimate.error:.5f}")
    print(
        f"{n_chunks} chunks of {size} tokens, {estimate.n_scored} tokens scored, "
        f"in {seconds:.2f} s ({n_chunks * size / seconds:.2f} tokens per second)",
        file=sys.stderr,
    )
    return 0


def _print_all(estimates: Iterator[Estimate], n_chunks: int) -> Estimate:
    """Print estimates on one line as they come; after the first one, the time that all take, if it
    is more than SHORT_S seconds.

    A bar beside them would be garbled: standard output may lead to the same terminal.
    """
    i, start = 0, time.perf_counter()
    try:
        for i, estimate in enumerate(estimates, 1):
            seconds = time.perf_counter() - start
            if i == 1 and n_chunks * seconds > SHORT_S:
                rest = tqdm.format_interval(n_chunks * seconds)
                first = f"{n_chunks} chunks, the first in {seconds:.2f} s: about {rest} for all"
                print(first, file=sys.stderr)
            write(f"[{i}]{estimate.ppl:.4f},")
    finally:
        if i:
            write("\n")
    return estimate


def _text_of(path: str) -> str:
    """A file's text without the last line's end, as llama.cpp reads it. Raises InputError."""
    text = read_text(path).removesuffix("\n")
    name = "standard input" if path == "-" else path
    if not text:
        raise InputError(f"{name}: expected a text, got nothing")
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{name}: expected a text, got a NUL at character {at}")
    return text
