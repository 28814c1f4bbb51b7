"""How long a look-up takes with 100,000 cached tokens, some 400 kB of text."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Room
from engine.kvcache.policy import Kind
from engine.kvcache.sequences import SequenceMemory
from tests.support.timing import judge

N_TOKENS, N_STATES = 100_000, 16
# Seconds that a look-up may take.
MOST_IN_TREE, MOST_WITH_TEXT = 0.0002, 0.002


@pytest.fixture(scope="module")
def ids() -> bytes:
    return bytes(np.random.default_rng().integers(0, 1 << 17, N_TOKENS, np.int32).tobytes())


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(map(chr, np.random.default_rng().integers(32, 127, 4 * N_TOKENS).tolist()))


@pytest.fixture(scope="module")
def cache(ids: bytes, text: str) -> PrefixCache:
    """One prompt, as long prefills leave it: states at distances, and its text."""
    n_blocks = N_TOKENS // 64 + N_STATES + 1
    memory = SequenceMemory(n_blocks, N_STATES + 1, 64, lambda source, target: None)
    cache = PrefixCache(memory, Room(1 << 40, 1, 1, N_STATES, n_blocks))
    seq, step = memory.create(), N_TOKENS // N_STATES
    for end in range(step, N_TOKENS + 1, step):
        memory.begin(seq, step)
        memory.finish(seq, step)
        cache.keep(ids[: 4 * end], seq, Kind.DISTANCE)
    cache.name(text, ids, ())
    return cache


def best(call: Callable[[], object]) -> float:
    """Seconds of a call at its best."""
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.timing
@pytest.mark.parametrize("n_same", [N_TOKENS, N_TOKENS - 10])
def test_a_look_up_in_the_tree(cache: PrefixCache, ids: bytes, n_same: int) -> None:
    prompt = ids[: 4 * n_same] + b"\xff\xff\xff\x7f" * 20
    assert cache.match(prompt, N_TOKENS + 10).n_known == n_same
    judge("s of a look-up", lambda: best(lambda: cache.match(prompt, N_TOKENS)), 0, MOST_IN_TREE)


@pytest.mark.timing
def test_a_look_up_of_a_text(cache: PrefixCache, ids: bytes, text: str) -> None:
    prompt = text + "and what is new"
    end, found = cache.match_text(prompt)
    assert end == len(text)
    assert found is not None
    assert found.ids == ids
    judge("s of a look-up", lambda: best(lambda: cache.match_text(prompt)), 0, MOST_WITH_TEXT)
