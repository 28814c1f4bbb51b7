"""What the measurements share: timed prompts and generation, and the facts that stand beside them.

Tokens are random: what they say costs no more and no less. Generation runs through
`Engine.generate`, greedy and past every end-of-generation token, and counts only if every token was
delivered and the position moved with each.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import numpy as np

from engine.backends.native import library as cpu_library
from engine.engine import Engine
from engine.errors import EngineError
from engine.kvcache.sequences import Checkpoint
from engine.sampling.params import SamplingParams


class BenchError(EngineError):
    """A measurement that can't be made, or did not measure what it says."""


def random_tokens(engine: Engine, n: int, rng: np.random.Generator) -> list[int]:
    """`n` token ids, uniform over the vocabulary."""
    ids: list[int] = rng.integers(0, engine.model.n_vocab, n).tolist()
    return ids


def time_prompt(engine: Engine, seq: int, tokens: Sequence[int]) -> float:
    """Seconds to append tokens to a sequence, with the logits of the last."""
    start = time.perf_counter()
    engine.prefill(seq, tokens)
    return time.perf_counter() - start


def time_generation(
    engine: Engine, first: Sequence[int], n: int, after: Sequence[Checkpoint | None]
) -> float:
    """Seconds to generate `n` tokens in each of several sequences at once.

    Sequence i starts from the token first[i], after checkpoint after[i] (None: from nothing), so
    that each of the n steps processes one token of every sequence.
    """
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    start = time.perf_counter()
    running = [engine.generate([t], params, c) for t, c in zip(first, after, strict=True)]
    while any(c.finish_reason is None for c in running) and engine.advance():
        pass
    seconds = time.perf_counter() - start
    for c in running:
        n_steps = c.timings.n_prompt + c.timings.n_eval
        if (len(c.tokens), n_steps) != (n, n):
            raise BenchError(
                f"expected {n} tokens in {n} steps, got {len(c.tokens)} in {n_steps} ({c.detail})"
            )
    return seconds


def backend_names(engine: Engine) -> str:
    """The backends that have nodes, such as "cuda+cpu"."""
    return "+".join(backend.name for backend in engine.plan.backends)


def n_gpu_layers(engine: Engine) -> int:
    """As llama.cpp counts: -1 for all layers, 0 for none."""
    return -1 if any(backend.traits.own_memory for backend in engine.plan.backends) else 0


def n_threads(engine: Engine) -> int:
    """Threads asked for, else the cores that this process may use."""
    return engine.config.n_threads or cpu_library.n_cores()


def rss_hwm_mib() -> float:
    """The most memory that this process has had, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
