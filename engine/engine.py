"""The engine: a model with its memory, and text from it.

`Engine.load` reads a file, plans its graph and allocates; `generate` streams text, `logits` scores
tokens. A step runs one batch of pieces and keeps every sequence's memory in line with what ran.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import backends
from engine.errors import EngineError
from engine.gguf import GGUFFile
from engine.graph import Capacity, Graph
from engine.kvcache.memory import SequenceMemory
from engine.models import BuildOptions, load_model
from engine.planner import Executable, Plan, place
from engine.quants import F16, F32, DType
from engine.sampler import Sampler, SamplingParams
from engine.scheduler import Logits, Piece, begin, cut, pack
from engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
DEFAULT_CTX = 4096
# Positions are int32.
MAX_CTX = 2**31 - 1
CACHE_TYPES = {"f32": F32, "f16": F16}
GDN_MODES = ("auto", "scan", "chunk", "decomposed")


class PromptError(EngineError):
    """A prompt that can't be run."""


class ConfigError(EngineError):
    """An engine option out of its range."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine; see Engine.load. Raises ConfigError for values out of range."""

    backend: str = "auto"
    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_parallel: int = 1
    n_checkpoints: int = 4
    n_threads: int | None = None
    type_k: str | None = None
    type_v: str | None = None
    gdn: str = "auto"
    strict_backend: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("n_ctx", 0),
            ("n_batch", 1),
            ("n_ubatch", 1),
            ("n_parallel", 1),
            ("n_checkpoints", 0),
            ("n_threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: expected at least {low}, got {value}")
        for name, known in (
            ("backend", backends.NAMES),
            ("gdn", GDN_MODES),
            ("type_k", (None, *CACHE_TYPES)),
            ("type_v", (None, *CACHE_TYPES)),
        ):
            if (value := getattr(self, name)) not in known:
                choices = ", ".join(k for k in known if k)
                raise ConfigError(f"{name}: expected one of {choices}, got {value}")

    def cache_types(self) -> tuple[DType, DType]:
        """Types of the K and V cache. The reference backend keeps float32 unless told."""
        default = "f32" if self.backend in ("auto", "reference") else "f16"
        return CACHE_TYPES[self.type_k or default], CACHE_TYPES[self.type_v or default]


@dataclass
class Timings:
    """Seconds and token counts of the last `generate`, and of loading."""

    load_s: float = 0.0
    n_prompt: int = 0
    prompt_s: float = 0.0
    n_eval: int = 0
    eval_s: float = 0.0


@dataclass(frozen=True)
class Token:
    """A generated token and the text it completes (empty inside a character)."""

    text: str
    token: int


class Engine:
    """A loaded model. Make one with `Engine.load`; use it as a context manager, or `close` it.

    `tokenizer`, `model`, `memory` (of sequences) and `plan` (the placed graph) are there to be
    looked at; so are `n_ctx` (positions of memory), `capacity` (of one step) and `timings` (of the
    last generation).
    """

    def __init__(self, file: GGUFFile, config: EngineConfig) -> None:
        self.file, self.config, self.timings = file, config, Timings()
        self.tokenizer = Tokenizer.from_gguf(file)
        self.model = load_model(file)
        self.n_ctx = _context_size(config.n_ctx, self.model.n_ctx_train)
        self.capacity = _capacity(config, self.n_ctx)
        graph = self._build(self.capacity, config.gdn)
        self.plan = place(graph, backends.create(config.backend), config.strict_backend)
        if config.n_threads and all(b.name == "reference" for b in self.plan.backends):
            _log.warning("n_threads is ignored: numpy chooses the reference backend's threads")
        self._executable: Executable | None = Executable(self.plan, file)
        cap = self.capacity
        self.memory = SequenceMemory(cap.n_blocks, cap.n_slots, cap.block_size, self._copy_block)

    @classmethod
    def load(
        cls, path: str | Path, *, backend: str = "auto", n_ctx: int | None = None, **options: Any
    ) -> Engine:
        """Load a GGUF file.

        backend: auto, cpu, cuda or reference. n_ctx: positions of memory (None: 4096 or what the
        model was trained on, whichever is less; 0: the latter). Other options are those of
        EngineConfig: n_batch and n_ubatch (most tokens of a step), n_parallel (most sequences),
        n_checkpoints, n_threads, type_k and type_v (f32, f16), gdn (auto, scan, chunk,
        decomposed), strict_backend (fail rather than place a node elsewhere).
        Raises EngineError, in one line, for whatever the file or the options have wrong.
        """
        start = time.perf_counter()
        unknown = options.keys() - EngineConfig.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(f"unknown option {min(unknown)}")
        config = EngineConfig(backend=backend, n_ctx=n_ctx, **options)
        engine = cls(GGUFFile(path), config)
        engine.timings.load_s = time.perf_counter() - start
        return engine

    def close(self) -> None:
        """Release weights and states; nothing can be run after it."""
        self._executable = None

    def _running(self) -> Executable:
        if self._executable is None:
            raise ConfigError("the engine is closed")
        return self._executable

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def graph(self, n_tokens: int = 512, gdn: str = "fused") -> Graph:
        """The compute graph for batches of up to `n_tokens`; gdn: fused or decomposed."""
        capacity = _capacity(self.config, self.n_ctx, n_tokens)
        return self._build(capacity, "auto" if gdn == "fused" else gdn)

    def _build(self, capacity: Capacity, gdn: str) -> Graph:
        type_k, type_v = self.config.cache_types()
        return self.model.build(BuildOptions(capacity, type_k, type_v, gdn))

    def _copy_block(self, source: int, target: int) -> None:
        self._running().each_store(lambda store: store.copy("n_blocks", source, target))

    def step(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """Run one batch; returns the logits [n_outputs, n_vocab] of the rows that asked for them.

        Raises MemoryFullError, with nothing changed, if a sequence finds no room.
        """
        steps = begin(pieces, self.memory)
        try:
            batch = pack(pieces, steps, self.capacity)
            logits = self._running().run(batch.inputs, batch.live)["logits"]
        except BaseException:
            # States are updated in place: what a broken-off step left is no state at all.
            for piece in pieces:
                self.memory.reset(piece.seq)
            raise
        for piece in pieces:
            self.memory.finish(piece.seq, len(piece.tokens))
        return np.asarray(logits, np.float32)

    def prefill(
        self, seq: int, tokens: Sequence[int], logits: Logits = Logits.LAST
    ) -> NDArray[np.float32]:
        """Append tokens to a sequence in pieces; returns the logits asked for."""
        limit = min(self.config.n_batch, self.config.n_ubatch)
        pieces = list(cut(self.memory.n_tokens(seq), len(tokens), limit))
        out = []
        for part in pieces:
            wanted = Logits.NONE if logits is Logits.LAST and part != pieces[-1] else logits
            out.append(self.step([Piece(seq, tokens[part], wanted)]))
        return np.concatenate(out)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] after each of `ids`, on a fresh sequence."""
        self._check_prompt(ids)
        seq = self.memory.create()
        try:
            return self.prefill(seq, ids, Logits.ALL)
        finally:
            self.memory.free(seq)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt as llama.cpp makes them: special tokens added and parsed."""
        return self.tokenizer.encode(prompt, add_special=True, parse_special=True)

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[Token]:
        """Stream a completion, token by token, until its end, `max_tokens` or a full context.

        Raises PromptError at once for a prompt that is empty, too long or has unknown ids.
        """
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(ids)
        params = (params or SamplingParams()).resolved(self.file.metadata)
        return self._generate(ids, params)

    def _generate(self, ids: list[int], params: SamplingParams) -> Iterator[Token]:
        ends = self.tokenizer.eog_ids
        sampler = Sampler(params, ends if params.ignore_eos else ())
        for token in ids:
            sampler.accept(token)
        decoder = self.tokenizer.stream(at_start=False)
        room = self.n_ctx - len(ids) + 1
        n_max = room if params.max_tokens < 0 else min(params.max_tokens, room)
        t = self.timings = Timings(self.timings.load_s, n_prompt=len(ids) if n_max else 0)
        seq = self.memory.create()
        try:
            start = time.perf_counter()
            logits = self.prefill(seq, ids)[-1] if n_max else np.empty(0, np.float32)
            t.prompt_s = time.perf_counter() - start
            for n in range(n_max):
                token = sampler.sample(logits)
                sampler.accept(token)
                if token in ends:
                    if rest := decoder.finish():
                        yield Token(rest, token)
                    break
                last = n + 1 == n_max
                yield Token(decoder.push(token) + (decoder.finish() if last else ""), token)
                if last:
                    break
                start = time.perf_counter()
                logits = self.step([Piece(seq, [token])])[-1]
                t.eval_s += time.perf_counter() - start
                t.n_eval += 1
        finally:
            self.memory.free(seq)

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise PromptError("the prompt is empty: expected at least one token")
        if len(ids) > self.n_ctx:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the context {self.n_ctx}: "
                "shorten it or raise n_ctx (-c)"
            )
        if not 0 <= min(ids) <= max(ids) < self.model.n_vocab:
            bad = next(i for i in ids if not 0 <= i < self.model.n_vocab)
            raise PromptError(f"token id {bad}: expected 0 to {self.model.n_vocab - 1}")


def _context_size(n_ctx: int | None, n_ctx_train: int) -> int:
    size = min(DEFAULT_CTX, n_ctx_train) if n_ctx is None else n_ctx or n_ctx_train
    if size > MAX_CTX:
        raise ConfigError(f"n_ctx: expected at most {MAX_CTX}, got {size}")
    return size


def _capacity(config: EngineConfig, n_ctx: int, n_tokens: int | None = None) -> Capacity:
    n_tokens = n_tokens or min(config.n_batch, config.n_ubatch)
    block_size = Capacity.block_size
    # Every holder of a sequence may keep one partly filled block of its own.
    n_blocks = math.ceil(n_ctx / block_size) + config.n_parallel + config.n_checkpoints
    return Capacity(
        n_tokens=n_tokens,
        n_seqs=min(config.n_parallel, n_tokens),
        n_outputs=n_tokens,
        n_slots=config.n_parallel + config.n_checkpoints,
        n_blocks=n_blocks,
    )


def plan_only(
    path: str | Path, n_tokens: int, gdn: str = "fused", backend: str = "auto", strict: bool = False
) -> Plan:
    """The placed graph of a file for batches of `n_tokens`, from the file's header alone."""
    config = EngineConfig(backend=backend, n_ubatch=n_tokens, n_batch=n_tokens)
    model = load_model(GGUFFile(path))
    capacity = _capacity(config, _context_size(None, model.n_ctx_train))
    options = BuildOptions(capacity, *config.cache_types(), "auto" if gdn == "fused" else gdn)
    return place(model.build(options), backends.create(backend), strict)
