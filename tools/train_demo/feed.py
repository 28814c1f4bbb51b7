"""Batches made by other processes while the GPU trains, and put on it by a thread.

Which rows come first depends on how fast each process is; what each makes depends on the seed. When
none is ready, a row of before is taken again, and counted. The thread that trains does nothing but
start kernels: a GPU that waits for the host to copy rows is idle for a quarter of the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import time
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.train_demo.rows import Rows, load_text
from tools.train_demo.tokenizer import load_tokenizer

BLOCK = 8  # rows that are handed over together
_MOST_WAITING, _MOST_KEPT = 1000, 4000  # blocks
_FEWEST_KEPT = 60  # before any is taken again
_N_READY = 4  # batches on the GPU

Block = tuple[NDArray[np.uint16], NDArray[np.uint8]]


def open_rows(corpus: Path, length: int, seed: str) -> Rows:
    """The stream of rows of a seed."""
    python = json.loads((corpus / "python.json").read_text())
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    return Rows(tokenizer, load_text(corpus), python, length, seed)


def _work(corpus: Path, length: int, seed: str, out: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(10)  # the thread that trains comes first
    rows = iter(open_rows(corpus, length, seed))
    while True:
        ids, kinds = zip(*(next(rows) for _ in range(BLOCK)), strict=True)
        out.put((np.stack(ids), np.stack(kinds)))


class Feed:
    """Start it before anything of CUDA: its processes are forks."""

    def __init__(self, corpus: Path, length: int, seed: str, n_workers: int) -> None:
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
        may_repeat = len(self._kept) >= _FEWEST_KEPT
        try:
            block: Block = self._queue.get(block=not may_repeat, timeout=120)
        except queue.Empty:
            if not may_repeat:
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


class Batches:
    """Batches of a feed, on the device before they are asked for. It closes the feed."""

    def __init__(self, feed: Feed, n_rows: int, device: str) -> None:
        self._feed, self._n_rows, self._device = feed, n_rows, device
        self._ready: queue.Queue[tuple[Tensor, Tensor] | Exception] = queue.Queue(_N_READY)
        self._closed = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            stream = torch.cuda.Stream() if self._device == "cuda" else None
            while not self._closed.is_set():
                self._ready.put(self._copied(*self._feed.batch(self._n_rows), stream))
        except Exception as error:  # whoever asks for a batch gets it
            self._ready.put(error)

    def _copied(
        self, ids: NDArray[np.uint16], kinds: NDArray[np.uint8], stream: Any
    ) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(kinds)
        if stream is None:
            return both
        pinned = [x.pin_memory() for x in both]
        with torch.cuda.stream(stream):
            copies = [x.to("cuda", non_blocking=True) for x in pinned]
        stream.synchronize()
        return copies[0], copies[1]

    def next(self) -> tuple[Tensor, Tensor]:
        """Ids (int32) and kinds (uint8) of the next batch, each [n_rows, length]."""
        batch = self._ready.get(timeout=300)
        if isinstance(batch, Exception):
            raise batch
        if self._device == "cuda":
            for x in batch:  # Their memory is the other stream's: it must wait for this one.
                x.record_stream(torch.cuda.current_stream())
        return batch

    def facts(self) -> dict[str, int]:
        """How many rows were new, and how many were taken again."""
        return {"rows_fresh": self._feed.n_fresh, "rows_again": self._feed.n_again}

    def close(self) -> None:
        """End the thread and the feed's processes."""
        self._closed.set()
        self._feed.close()
        end = time.monotonic() + 2
        while self._thread.is_alive() and time.monotonic() < end:  # It may wait for room.
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)
