"""Perplexity of a text, as llama.cpp's `llama-perplexity` defines it (tools/perplexity).

Each text chunk of n_ctx tokens runs on a fresh sequence; only its second half is scored. With a
stride, overlapping windows are scored in their last tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.engine import Engine
from engine.errors import EngineError
from engine.runtime.batch import BLOCK_POSITIONS, Chunk, Logits
from engine.runtime.scheduler import cut

Scores = NDArray[np.float64]
MIN_CTX = 4  # In a text chunk of fewer tokens, no token is scored.
# Most bytes of logits that a step returns, and that are exponentiated at a time.
_STEP_BYTES, _BLOCK_BYTES = 2**28, 2**23


class PerplexityError(EngineError):
    """A text, or sizes, for which perplexity is not defined."""


@dataclass(frozen=True)
class ScoredChunk:
    """`n_tokens` tokens of a text from `start` on; all but the first `first` are scored."""

    start: int
    n_tokens: int
    first: int


@dataclass(frozen=True)
class Estimate:
    """`ppl` is e to the mean negative log-likelihood (nats) of the `n_scored` tokens so far.
    `error` is llama.cpp's: the standard error of that mean, times ppl; NaN for one token."""

    ppl: float
    error: float
    n_scored: int


def window(n_ctx: int, stride: int = 0) -> int:
    """Tokens of a text chunk: n_ctx, plus half a stride if there is one."""
    return n_ctx + stride // 2


def chunks(n_tokens: int, n_ctx: int, stride: int = 0) -> list[ScoredChunk]:
    """The text chunks of a text of `n_tokens`. Raises PerplexityError if there are none.

    Without a stride: chunks of n_ctx, one after another, scored after position n_ctx/2; a shorter
    rest is dropped. With a stride: windows of n_ctx + stride/2, each `stride` further, whose last
    `stride` tokens are scored.
    """
    if n_ctx < MIN_CTX:
        raise PerplexityError(f"n_ctx: expected at least {MIN_CTX}, got {n_ctx}")
    if not 0 <= stride <= n_ctx:
        raise PerplexityError(f"stride: expected 0 to the {n_ctx} of n_ctx, got {stride}")
    size = window(n_ctx, stride)
    # As in llama.cpp, a window that ends where the text ends is left out.
    n_chunks = -(-(n_tokens - size) // stride) if stride else n_tokens // n_ctx
    if n_chunks < 1:
        needed = size + 1 if stride else size
        raise PerplexityError(
            f"the text has {n_tokens} tokens: expected at least the {needed} of one chunk "
            "(-c is its size)"
        )
    first = size - stride if stride else n_ctx // 2 + 1
    return [ScoredChunk(i * (stride or n_ctx), size, first) for i in range(n_chunks)]


def encode(engine: Engine, text: str) -> list[int]:
    """The tokens of a text, after BOS if the model adds it; special tokens are treated as text."""
    tokenizer = engine.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text)


def perplexity(
    engine: Engine, ids: Sequence[int], n_ctx: int = 512, stride: int = 0
) -> Iterator[Estimate]:
    """The estimate after each text chunk of `ids` (from `encode`); the last one is the result.

    If the model adds BOS, it replaces the first input token of every chunk, but as in llama.cpp not
    of windows with a stride. The engine's context must hold `window(n_ctx, stride)` tokens.
    """
    parts = chunks(len(ids), n_ctx, stride)
    tokenizer = engine.tokenizer
    bos_id = tokenizer.bos_id if tokenizer.add_bos and not stride else None
    n_scored, total, squares = 0, 0.0, 0.0
    for chunk in parts:
        tokens = list(ids[chunk.start : chunk.start + chunk.n_tokens])
        given = tokens if bos_id is None else [bos_id, *tokens[1:]]
        nll = _score(engine, given, tokens, chunk.first)
        n_scored += len(nll)
        total += float(nll.sum())
        squares += float(nll @ nll)
        yield _estimate(n_scored, total, squares)


def _estimate(n: int, total: float, squares: float) -> Estimate:
    mean = total / n
    try:
        ppl = math.exp(mean)
    except OverflowError:
        ppl = math.inf
    # Rounding may make a variance of 0 negative.
    variance = max(0.0, squares / n - mean * mean)
    return Estimate(ppl, ppl * math.sqrt(variance / (n - 1)) if n > 1 else math.nan, n)


def _score(engine: Engine, given: Sequence[int], targets: Sequence[int], first: int) -> Scores:
    """Negative log-likelihoods [n_tokens - first] of the targets from `first` on."""
    n_rows = max(_STEP_BYTES // (4 * engine.model.n_vocab), BLOCK_POSITIONS)
    n_rows = min(n_rows, engine.capacity.n_tokens)
    # Chunks end at multiples of 64 positions, so some rows before `first` have logits: dropped.
    n_unscored = (first - 1) // BLOCK_POSITIONS * BLOCK_POSITIONS
    seq = engine.memory.create()
    scores = []
    try:
        if n_unscored:
            engine.prefill(seq, given[:n_unscored], Logits.NONE)
        for part in cut(n_unscored, len(given) - 1 - n_unscored, n_rows):
            at = slice(n_unscored + part.start, n_unscored + part.stop)
            logits = engine.step([Chunk(seq, given[at], Logits.ALL)])
            skip = max(0, first - 1 - at.start)
            wanted = targets[at.start + skip + 1 : at.stop + 1]
            scores.append(negative_log_likelihood(logits[skip:], wanted))
    finally:
        engine.memory.drop(seq)
    return np.concatenate(scores)


def negative_log_likelihood(logits: NDArray[np.float32], targets: Sequence[int]) -> Scores:
    """-log softmax(logits)[target] in nats; logits [n, n_vocab], n targets. Exponents are float32
    relative to the row's maximum and summed in float64, as in llama.cpp."""
    n_rows = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    out = np.empty(len(targets))
    for start in range(0, len(targets), n_rows):
        rows = logits[start : start + n_rows]
        highest = rows.max(axis=1, keepdims=True)
        total = np.exp(rows - highest).sum(axis=1, dtype=np.float64)
        chosen = rows[np.arange(len(rows)), targets[start : start + n_rows]].astype(np.float64)
        out[start : start + n_rows] = np.log(total) + (highest[:, 0] - chosen)
    return out
