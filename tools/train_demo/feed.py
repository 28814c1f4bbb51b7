"""Batches made by other processes while the GPU trains.

Which rows come first depends on how fast each process is; what each makes depends on the seed. When
none is ready, a row of before is taken again, and counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.train_demo.rows import Rows, load_text
from tools.train_demo.tokenizer import load_tokenizer

BLOCK = 8  # rows that are handed over together
_MOST_WAITING, _MOST_KEPT = 1000, 4000  # blocks

Block = tuple[NDArray[np.uint16], NDArray[np.uint8]]


def open_rows(corpus: Path, length: int, seed: str) -> Rows:
    """The stream of rows of a seed."""
    python = json.loads((corpus / "python.json").read_text())
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    return Rows(tokenizer, load_text(corpus), python, length, seed)


def _work(corpus: Path, length: int, seed: str, out: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = iter(open_rows(corpus, length, seed))
    while True:
        ids, kinds = zip(*(next(rows) for _ in range(BLOCK)), strict=True)
        out.put((np.stack(ids), np.stack(kinds)))


class Feed:
    """Start it before anything of CUDA: its processes are forks."""

    def __init__(self, corpus: Path, length: int, seed: int, n_workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._queue: Any = context.Queue(_MOST_WAITING)
        self._workers = [
            context.Process(
                target=_work, args=(corpus, length, f"{seed} {i}", self._queue), daemon=True
            )
            for i in range(n_workers)
        ]
        for worker in self._workers:
            worker.start()
        self._kept: list[Block] = []
        self._rng = Random(seed)
        self.n_fresh = self.n_again = 0

    def _block(self) -> Block:
        try:
            block: Block = self._queue.get(block=not self._kept, timeout=120)
        except queue.Empty:
            if not self._kept:
                raise
            self.n_again += BLOCK
            return self._rng.choice(self._kept)
        self.n_fresh += BLOCK
        if len(self._kept) < _MOST_KEPT:
            self._kept.append(block)
        else:
            self._kept[self._rng.randrange(_MOST_KEPT)] = block
        return block

    def batch(self, n_rows: int) -> Block:
        """Ids and kinds [n_rows, length]; n_rows is a multiple of BLOCK."""
        ids, kinds = zip(*(self._block() for _ in range(n_rows // BLOCK)), strict=True)
        return np.concatenate(ids), np.concatenate(kinds)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
