"""`cli.py perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import sys
import time

from tqdm import tqdm

from engine.bench.perplexity import MIN_CTX, chunks, encode, perplexity, window
from engine.commands.options import (
    InputError,
    Parser,
    at_least,
    common_options,
    engine_options,
    given_fields,
    read_text,
)
from engine.config import EngineConfig
from engine.engine import Engine

DEFAULT_CTX = 512
ABOUT = (
    "Measure the perplexity of a text, as llama-perplexity does: over chunks of -c tokens, of "
    "which the second half is scored. Prints the estimate so far after each chunk."
)


def add_options(p: Parser) -> None:
    """Its options."""
    common_options(p)
    add = p.add_argument
    add("-f", "--file", required=True, metavar="FILE", help="the text (-: standard input)")
    add("-c", "--ctx-size", dest="n_ctx_chunk", type=at_least(MIN_CTX), default=DEFAULT_CTX,
        metavar="N", help=f"tokens of a chunk ({DEFAULT_CTX})")  # fmt: skip
    add("--stride", "--ppl-stride", type=at_least(0), default=0, metavar="N",
        help="windows of -c and N/2 tokens, each N further, scoring N tokens (0: off)")  # fmt: skip
    engine_options(p, without=("n_ctx", "n_parallel"))


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print a line for every chunk, and the result."""
    n_ctx, stride = args.n_ctx_chunk, args.stride
    if stride > n_ctx:
        parser.error(f"argument --stride: expected at most the {n_ctx} of -c, got {stride}")
    text = _text_of(args.file)
    options = given_fields(args, EngineConfig)
    with Engine.load(args.model, n_ctx=window(n_ctx, stride), **options) as engine:
        ids = encode(engine, text)
        n_chunks = len(chunks(len(ids), n_ctx, stride))
        start = time.perf_counter()
        with tqdm(total=n_chunks, unit="chunk", disable=None) as bar:
            for i, estimate in enumerate(perplexity(engine, ids, n_ctx, stride), 1):
                tqdm.write(f"[{i}]{estimate.ppl:.4f}", file=sys.stdout)
                sys.stdout.flush()
                bar.update()
        seconds = time.perf_counter() - start
    print(f"Final estimate: PPL = {estimate.ppl:.4f} +/- {estimate.error:.5f}")
    n_tokens = n_chunks * window(n_ctx, stride)
    print(
        f"{n_chunks} chunks of {window(n_ctx, stride)} tokens, {estimate.n_scored} tokens scored, "
        f"in {seconds:.2f} s ({n_tokens / seconds:.2f} tokens per second)",
        file=sys.stderr,
    )
    return 0


def _text_of(path: str) -> str:
    """A file's text without the last line's end, as llama.cpp reads it."""
    text = read_text(path).removesuffix("\n")
    name = "standard input" if path == "-" else path
    if not text:
        raise InputError(f"{name}: expected a text, got nothing")
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{name}: expected a text, got a NUL at character {at}")
    return text
