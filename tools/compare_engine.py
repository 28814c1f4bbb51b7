"""This engine's side of compare.py: load a model, time a prompt, time generation, write logits.

Generation is timed as a user gets it, through `Engine.generate` with sampling and text; the peer's
side has neither. Every prompt starts on a fresh sequence. The context before generated tokens is
processed once; each generation starts from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.bench.facts import backend_names, n_threads
from engine.bench.measure import time_generation, time_prompts
from engine.engine import Engine
from engine.errors import EngineError
from engine.kvcache.sequences import Checkpoint
from engine.runtime.batch import Logits
from engine.version import __version__


class EngineRunner:
    """Answers a worker's requests."""

    errors = (EngineError, MemoryError)
    engine: Engine

    def __init__(self) -> None:
        self._past: tuple[int, ...] = ()
        self._checkpoint: Checkpoint | None = None

    def about(self) -> dict[str, Any]:
        """The engine's version."""
        return {"version": __version__}

    def load(
        self, model: str, backend: str, n_ctx: int, n_ubatch: int, n_threads: int
    ) -> dict[str, Any]:
        """Load a model; returns backends, cache types, threads and seconds of loading."""
        n_batch = max(n_ubatch, 2048)
        self.engine = Engine.load(
            model, backend=backend, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch,
            n_threads=n_threads, cache_ram=0,
        )  # fmt: skip
        return self._facts()

    def _facts(self) -> dict[str, Any]:
        type_k, type_v = self.engine.config.cache_types()
        return {
            "backends": backend_names(self.engine),
            "n_threads": n_threads(self.engine),
            "type_k": type_k.name.lower(),
            "type_v": type_v.name.lower(),
            "load_s": self.engine.load_s,
        }

    def prompt(self, tokens: Sequence[int]) -> dict[str, float]:
        """Seconds for a prompt, with the logits of its last token."""
        seq = self.engine.memory.create()
        try:
            return {"seconds": time_prompts(self.engine, [seq], [tokens])}
        finally:
            self.engine.memory.free(seq)

    def generate(self, past: Sequence[int], tokens: Sequence[int]) -> dict[str, float]:
        """Seconds to generate len(tokens) tokens after `past`; the first of `tokens` starts it."""
        self._go_to(tuple(past))
        n = len(tokens)
        return {"seconds": time_generation(self.engine, tokens[:1], n, [self._checkpoint])}

    def _go_to(self, past: tuple[int, ...]) -> None:
        """Make `_checkpoint` that of `past`; None for no tokens."""
        if past == self._past:
            return
        if self._checkpoint:
            self._checkpoint.release()
            self._past, self._checkpoint = (), None
        if not past:
            return
        memory = self.engine.memory
        seq = memory.create()
        try:
            self.engine.prefill(seq, past, Logits.NONE)
            self._past, self._checkpoint = past, memory.checkpoint(seq)
        finally:
            memory.free(seq)

    def logits(self, tokens: Sequence[int], one_by_one: bool, file: str) -> dict[str, Any]:
        """Write the logits [n_tokens, n_vocab] after each token to a file."""
        self._go_to(())  # A checkpoint would hold blocks that these tokens may need.
        if not one_by_one:
            np.save(file, self.engine.logits(tokens))
            return {}
        seq = self.engine.memory.create()
        try:
            np.save(file, np.concatenate([self.engine.prefill(seq, [t]) for t in tokens]))
        finally:
            self.engine.memory.free(seq)
        return {}
