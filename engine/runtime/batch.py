"""Batches: chunks of several sequences, one after another, as the inputs of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import checks
from engine.errors import EngineError
from engine.graph import Capacity, Live
from engine.kvcache.sequences import SequenceMemory, Step

# Chunks of prompts end at its multiples: backends that compute aligned runs group them alike.
BLOCK_POSITIONS = 64


class BatchError(EngineError):
    """A batch that the graph can't run."""


class Logits(Enum):
    """Which rows of a chunk need logits."""

    NONE = 0
    LAST = 1
    ALL = 2


@dataclass(frozen=True)
class Chunk:
    """The next `tokens` of sequence `seq`; states after the last `n_snapshots` of them are kept."""

    seq: int
    tokens: Sequence[int]
    logits: Logits = Logits.LAST
    n_snapshots: int = 0

    @property
    def n_outputs(self) -> int:
        if self.logits is Logits.LAST:
            return 1
        return len(self.tokens) if self.logits is Logits.ALL else 0


@dataclass(frozen=True)
class Batch:
    """Inputs of one step by name, at their live sizes."""

    inputs: dict[str, NDArray[np.int32]]
    live: Live


def checked(chunks: Any, n_vocab: int) -> list[Chunk]:
    """A user's chunks, with their token ids as lists. Raises BatchError for values of another type
    and for ids out of the vocabulary."""
    made = []
    for chunk in checks.sequence(BatchError, "chunks", chunks, "chunks"):
        checks.instance(BatchError, "chunks", chunk, Chunk)
        checks.instance(BatchError, "chunk: logits", chunk.logits, Logits)
        ids = checks.token_ids(BatchError, "chunk: tokens", chunk.tokens, n_vocab)
        n = checks.integer(BatchError, "chunk: n_snapshots", chunk.n_snapshots)
        made.append(Chunk(chunk.seq, ids, chunk.logits, n))
    return made


def check_fits(chunks: Sequence[Chunk], capacity: Capacity) -> None:
    """Raise BatchError unless a graph of this capacity can run the chunks in one step."""
    seqs = [chunk.seq for chunk in chunks]
    for what, n, limit in (
        ("sequences", len(chunks), capacity.n_seqs),
        ("tokens", sum(len(chunk.tokens) for chunk in chunks), capacity.n_tokens),
        ("snapshots", max((c.n_snapshots for c in chunks), default=0), capacity.n_snapshots),
    ):
        if n > limit:
            raise BatchError(f"{n} {what} in one step: expected at most {limit}")
    if not chunks or not all(len(chunk.tokens) for chunk in chunks):
        raise BatchError("expected at least one token of each sequence, got none")
    if len(set(seqs)) < len(seqs):
        raise BatchError(f"sequence {max(seqs, key=seqs.count)} twice in one step")


def begin(
    chunks: Sequence[Chunk], memory: SequenceMemory, preserve_state: bool = False
) -> list[Step]:
    """Allocate memory for every chunk (SequenceMemory.begin), or for none: MemoryFullError."""
    steps: list[Step] = []
    try:
        for c in chunks:
            steps.append(memory.begin(c.seq, len(c.tokens), c.n_snapshots, preserve_state))
    except BaseException:
        for chunk in chunks[: len(steps)]:
            memory.cancel(chunk.seq)
        raise
    return steps


def pack(chunks: Sequence[Chunk], steps: Sequence[Step], capacity: Capacity) -> Batch:
    """The inputs of a step over `chunks`; `steps` say where each reads and writes memory."""
    lengths, outputs = [len(p.tokens) for p in chunks], [p.n_outputs for p in chunks]
    pasts, starts = [step.n_past for step in steps], np.cumsum([0, *lengths])
    positions = _ranges(pasts, lengths)
    tables = np.full((len(chunks), capacity.n_blocks), -1, np.int32)
    snapshots = np.full((len(chunks), capacity.n_snapshots), -1)
    for s, step in enumerate(steps):
        tables[s, : len(step.blocks)] = step.blocks
        snapshots[s, capacity.n_snapshots - len(step.snapshot_dst) :] = step.snapshot_dst
    inputs: dict[str, Any] = {
        "tokens": np.fromiter(chain.from_iterable(p.tokens for p in chunks), np.int32, starts[-1]),
        "positions": positions, "seq_starts": starts,
        "state_src": [step.state_src for step in steps],
        "state_dst": [step.state_dst for step in steps],
        "snapshot_dst": snapshots, "block_tables": tables,
        "output_rows": _ranges(starts[1:] - outputs, outputs),
    }  # fmt: skip
    live = Live(
        n_tokens=int(starts[-1]), n_seqs=len(chunks), n_outputs=len(inputs["output_rows"]),
        kv_rows=sum(pasts) + sum(lengths), kv_pairs=int(positions.sum()) + len(positions),
        chunks=tuple(zip(pasts, lengths, strict=True)),
    )  # fmt: skip
    return Batch({name: np.asarray(v, np.int32) for name, v in inputs.items()}, live)


def _ranges(firsts: Any, lengths: Sequence[int]) -> NDArray[np.int64]:
    """The numbers first, first + 1, … of each length, one range after another."""
    ends = np.cumsum(lengths)
    return np.asarray(np.arange(ends[-1]) + np.repeat(firsts - (ends - lengths), lengths))
