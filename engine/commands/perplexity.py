"""`cli.py perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import sys
import time

from tqdm import tqdm

from engine.bench.perplexity import MIN_CTX, chunks, encode, perplexity, window
from engine.commands.options import InputError, Parser, load_engine, read_text
from engine.commands.output import say

DEFAULT_CTX = 512
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
    p.number("--stride --ppl-stride", "score overlapping windows of -c + N/2 tokens, each "
        "N tokens further, in their last N tokens (0: off)", low=0, default=0)  # fmt: skip
    p.engine_options("n_ctx", "n_parallel")


def run(parser: Parser, args: argparse.Namespace) -> int:
    n_ctx, stride = args.n_ctx_chunk, args.stride
    if stride > n_ctx:
        parser.error(f"argument --stride: expected at most the {n_ctx} of -c, got {stride}")
    text, size = _text_of(args.file), window(n_ctx, stride)
    with load_engine(args, n_ctx=size) as engine:
        ids = encode(engine, text)
        n_chunks = len(chunks(len(ids), n_ctx, stride))
        start = time.perf_counter()
        estimates = perplexity(engine, ids, n_ctx, stride)
        with tqdm(estimates, total=n_chunks, unit="chunk", disable=None) as bar:
            for i, estimate in enumerate(bar, 1):
                say(f"[{i}]{estimate.ppl:.4f}")
        seconds = time.perf_counter() - start
    print(f"Final estimate: PPL = {estimate.ppl:.4f} +/- {estimate.error:.5f}")
    print(
        f"{n_chunks} chunks of {size} tokens, {estimate.n_scored} tokens scored, "
        f"in {seconds:.2f} s ({n_chunks * size / seconds:.2f} tokens per second)",
        file=sys.stderr,
    )
    return 0


def _text_of(path: str) -> str:
    """A file's text without the last line's end, as llama.cpp reads it. Raises InputError."""
    text = read_text(path).removesuffix("\n")
    name = "standard input" if path == "-" else path
    if not text:
        raise InputError(f"{name}: expected a text, got nothing")
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{name}: expected a text, got a NUL at character {at}")
    return text
