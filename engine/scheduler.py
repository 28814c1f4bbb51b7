"""Batches: pieces of several sequences packed into the inputs of one step.

Rows of all pieces lie one after another, any lengths together. Prefill pieces end at multiples of
64 positions, so that a prompt gives the same chunks however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Capacity, Live
from engine.kvcache.memory import SequenceMemory, Step

PIECE_MULTIPLE = 64


class Logits(Enum):
    """Which rows of a piece need logits."""

    NONE = 0
    LAST = 1
    ALL = 2


@dataclass(frozen=True)
class Piece:
    """The next `tokens` of sequence `seq`."""

    seq: int
    tokens: Sequence[int]
    logits: Logits = Logits.LAST


def cut(n_past: int, n_tokens: int, n_ubatch: int) -> Iterator[slice]:
    """Cut a prompt's `n_tokens` after position `n_past` into pieces of at most `n_ubatch`.

    From a limit of 64 up, pieces end at multiples of 64 positions (except the last).
    """
    start = 0
    while start < n_tokens:
        end = n_past + start + n_ubatch
        if n_ubatch >= PIECE_MULTIPLE:
            end -= end % PIECE_MULTIPLE
        stop = min(end - n_past, n_tokens)
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True)
class Batch:
    """Inputs of one step by name, at their live sizes."""

    inputs: dict[str, NDArray[np.int32]]
    live: Live


def begin(pieces: Sequence[Piece], memory: SequenceMemory) -> list[Step]:
    """Room in memory for every piece; if one finds none, all are undone and its error raised."""
    steps: list[Step] = []
    try:
        for piece in pieces:
            steps.append(memory.begin(piece.seq, len(piece.tokens)))
    except BaseException:
        for piece in pieces[: len(steps)]:
            memory.cancel(piece.seq)
        raise
    return steps


def pack(pieces: Sequence[Piece], steps: Sequence[Step], capacity: Capacity) -> Batch:
    """The inputs of a step over `pieces`, whose room in memory is `steps`."""
    lengths = [len(piece.tokens) for piece in pieces]
    starts = np.cumsum([0, *lengths])
    tables = np.full((len(pieces), capacity.n_blocks), -1)
    for table, step in zip(tables, steps, strict=True):
        table[: len(step.blocks)] = step.blocks
    positions = [np.arange(s.n_past, s.n_past + n) for s, n in zip(steps, lengths, strict=True)]
    rows = [_output_rows(p, int(start)) for p, start in zip(pieces, starts, strict=False)]
    inputs: dict[str, Any] = {
        "tokens": np.concatenate([piece.tokens for piece in pieces]),
        "positions": np.concatenate(positions),
        "seq_starts": starts,
        "state_src": [step.state_src for step in steps],
        "state_dst": [step.state_dst for step in steps],
        "snapshot_dst": np.full((len(pieces), capacity.n_snapshots), -1),
        "block_tables": tables,
        "output_rows": np.concatenate(rows),
    }
    live = Live(
        n_tokens=int(starts[-1]),
        n_seqs=len(pieces),
        n_outputs=len(inputs["output_rows"]),
        kv_rows=sum(int(p[-1]) + 1 for p in positions),
        kv_pairs=sum(int(p.sum()) + len(p) for p in positions),
    )
    for name, limit in (("n_tokens", capacity.n_tokens), ("n_seqs", capacity.n_seqs)):
        assert getattr(live, name) <= limit, (name, live, capacity)
    return Batch({name: np.asarray(v, np.int32) for name, v in inputs.items()}, live)


def _output_rows(piece: Piece, start: int) -> NDArray[np.int64]:
    n = len(piece.tokens)
    first = {Logits.NONE: n, Logits.LAST: n - 1, Logits.ALL: 0}[piece.logits]
    return np.arange(start + first, start + n)
